# SPDX-License-Identifier: Apache-2.0
"""Tiny models with random weights, one of each kind that transformers' integration extends or refuses.

Their attention is sharp on purpose: freshly initialised models attend almost evenly to everything, so their outputs
would hardly show where a key is thought to be.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from ropewalk.testing.configurations import VOCABULARY as VOCABULARY
from ropewalk.testing.configurations import small_configuration

_LOCAL_AND_GLOBAL = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}


@dataclass(frozen=True)
class TinyModel:
    """How to make a tiny model.

    Args:
        config: name of a configuration class of transformers.
        options: its arguments, beside the sizes that all share. Those of a configuration within it are a mapping under
            its name.
        auto: the class of transformers that makes the model.
        refused: text that must be in the error of `ropewalk.extend`; empty for a model that can be extended.
        disable_window: whether `extend` needs `sliding_window="disable"` to find a layer to extend.
    """

    config: str
    options: Mapping[str, Any] = field(default_factory=dict)
    auto: str = "AutoModelForCausalLM"
    refused: str = ""
    disable_window: bool = False

    def build(self, trained_window: int, *, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
        """The model, with weights that depend on their names and shapes alone. Leaves the random state as it was.

        Args:
            trained_window: tokens that it says it was trained on.
            dtype: of its weights.
            changes: further arguments of its configuration.
        """
        options = {**self.options, **changes}
        config = small_configuration(getattr(transformers, self.config), options, trained_window)
        if dtype == torch.float64:
            config._experts_implementation = "eager"  # the others do without it
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # for what is not filled below
            model: PreTrainedModel = getattr(transformers, self.auto).from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                _fill(name, parameter)
        model.train(False)
        nn.Module.to(model, dtype)  # the model's own says something else of its types
        return model


TINY_MODELS: dict[str, TinyModel] = {
    "llama": TinyModel("LlamaConfig"),
    "llama-yarn": TinyModel(
        "LlamaConfig",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10_000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "mistral": TinyModel("MistralConfig", {"sliding_window": None}),
    "mistral-sliding": TinyModel("MistralConfig", {"sliding_window": 24}, disable_window=True),
    "qwen2": TinyModel("Qwen2Config"),
    "qwen2-sliding": TinyModel("Qwen2Config", {"use_sliding_window": True, **_LOCAL_AND_GLOBAL}),
    "qwen3": TinyModel("Qwen3Config", {"head_dim": 16}),
    "phi": TinyModel("PhiConfig", {"partial_rotary_factor": 0.5}),
    "phi3": TinyModel("Phi3Config"),
    "gemma": TinyModel("GemmaConfig", {"head_dim": 16}),
    "gemma2": TinyModel(
        "Gemma2Config",
        {"head_dim": 16, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0, **_LOCAL_AND_GLOBAL},
    ),
    "gemma3": TinyModel("Gemma3TextConfig", {"head_dim": 16, "query_pre_attn_scalar": 16, **_LOCAL_AND_GLOBAL}),
    "gpt-neox": TinyModel("GPTNeoXConfig", {"rotary_pct": 0.25, "head_dim": 16}),
    "cohere": TinyModel("CohereConfig", {"logit_scale": 1.0}),
    "glm": TinyModel("GlmConfig", {"head_dim": 16}),
    # What does not go through the AttentionInterface by itself.
    "falcon": TinyModel("FalconConfig", {"alibi": False}),
    "gptj": TinyModel("GPTJConfig", {"rotary_dim": 8}),
    "codegen": TinyModel("CodeGenConfig", {"rotary_dim": 8}),
    "gpt-neox-japanese": TinyModel("GPTNeoXJapaneseConfig", {"attention_dropout": 0.0, "hidden_dropout": 0.0}),
    "diffllama": TinyModel("DiffLlamaConfig"),  # each module attends twice
    "smollm3": TinyModel("SmolLM3Config", {"num_hidden_layers": 4}),
    "llama-dynamic": TinyModel(
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}},
    ),
    "phi3-longrope": TinyModel(
        "Phi3Config",
        {
            "max_position_embeddings": 256,
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10_000.0,
                "short_factor": [1.0] * 8,
                "long_factor": [4.0] * 8,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "llama4": TinyModel(
        "Llama4TextConfig",
        {
            "head_dim": 16,
            "attention_chunk_size": 16,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 64,
            "layer_types": ["chunked_attention", "full_attention"],
        },
    ),
    "gpt-oss": TinyModel(
        "GptOssConfig",
        {
            "head_dim": 16,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
            **_LOCAL_AND_GLOBAL,
        },
    ),
    "deepseek-v3": TinyModel(
        "DeepseekV3Config",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 16,
            "first_k_dense_replace": 2,
            "moe_intermediate_size": 16,
            "n_routed_experts": 2,
            "num_experts_per_tok": 1,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
}

# With ALiBi instead of a rotary embedding.
ALIBI_MODELS: dict[str, TinyModel] = {
    "mpt": TinyModel("MptConfig", {"max_seq_len": 64}),
    "mpt-six-heads": TinyModel("MptConfig", {"max_seq_len": 64, "num_attention_heads": 6, "hidden_size": 96}),
    "mpt-clipped": TinyModel("MptConfig", {"max_seq_len": 64, "attn_config": {"clip_qkv": 1.0}}),
    "bloom": TinyModel("BloomConfig"),
    "falcon-alibi": TinyModel("FalconConfig", {"alibi": True, "multi_query": False}),
    "falcon-alibi-multi-query": TinyModel("FalconConfig", {"alibi": True}),
}

REFUSED_MODELS: dict[str, TinyModel] = {
    "gpt2": TinyModel("GPT2Config", refused="position embeddings are learned"),
    "opt": TinyModel(
        "OPTConfig", {"word_embed_proj_dim": 64, "ffn_dim": 64}, refused="position embeddings are learned"
    ),
    "t5": TinyModel(
        "T5Config",
        {"d_model": 64, "d_kv": 16, "d_ff": 64, "decoder_start_token_id": 0},
        auto="AutoModelForSeq2SeqLM",
        refused="encoder-decoder",
    ),
    "modernbert": TinyModel(
        "ModernBertConfig",
        {"local_attention": 16, "cls_token_id": None, "sep_token_id": None},
        auto="AutoModelForMaskedLM",
        refused="causal",
    ),
    "mamba": TinyModel("MambaConfig", {"state_size": 8}, refused="no attention layer"),
}


def tiny_model(name: str, trained_window: int = 64, **changes: Any) -> PreTrainedModel:
    """A model of one of the sets above, in eval mode and float32; the same weights at every call.

    Args:
        name: its name in `TINY_MODELS`, `ALIBI_MODELS` or `REFUSED_MODELS`.
        trained_window: tokens that it says it was trained on.
        changes: further arguments of its configuration.
    """
    return {**TINY_MODELS, **ALIBI_MODELS, **REFUSED_MODELS}[name].build(trained_window, **changes)


def _fill(name: str, parameter: Tensor) -> None:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {tuple(parameter.shape)}".encode()))
    noise = torch.randn(parameter.shape, generator=generator)
    attends = any(part in name for part in ("q_proj", "k_proj", "qkv", "query_key_value", "q_b_proj", "kv_"))
    if "sinks" in name:
        parameter.copy_(noise)
    elif parameter.ndim > 1:
        parameter.copy_(noise * parameter.shape[-1] ** -0.5 * (2.0 if attends else 1.0))
    elif name.endswith("bias"):
        parameter.copy_(noise * 0.2)
    elif any(norm in name for norm in ("q_norm", "k_norm")):
        parameter.fill_(2.0)
    elif "gate" in name and parameter.numel() == 1:
        parameter.fill_(1.0)  # closed in a new model
