# SPDX-License-Identifier: Apache-2.0
"""Tiny models with random weights, one of each kind that transformers' integration extends or refuses.

Their attention is sharp on purpose: freshly initialised models attend almost evenly to everything, so their outputs
would hardly show where a key is thought to be.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

VOCABULARY = 96

# Names differ between architectures; a configuration is given those that it knows.
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    # Mixtures of experts.
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "intermediate_size_mlp": 64,
    "n_group": 1,
    "topk_group": 1,
    # Latent attention.
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    # Layers without attention.
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "state_size": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_heads": 4,
    "linear_head_dim": 16,
    # Embeddings that each layer has of its own.
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 16,
    # Sparse attention.
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 32,
}
# Where a configuration has a window by default: one that a text of a hundred tokens is longer than.
_WINDOWS = {"sliding_window": 24, "attention_chunk_size": 24, "sliding_window_size": 24, "window_size": 24}
# Of what sees and hears beside the text, and is not asked.
_SIDE_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "depth": 1,
    "num_heads": 2,
    "embed_dim": 32,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "d_model": 32,
    "image_size": 28,
    "patch_size": 14,
    "out_hidden_size": 64,
    "text_hidden_size": 64,
    "projection_dim": 64,
    "vision_output_dim": 64,
    "projector_input_dim": 64,
    "projector_output_dim": 64,
    "base_channels": 32,
    "image_token_embed_dim": 32,
    "num_embeddings": 32,
}
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
        config = _small(getattr(transformers, self.config), options, trained_window)
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
    "diffllama": TinyModel("DiffLlamaConfig"),  # each module attends twice
    "smollm3": TinyModel("SmolLM3Config", {"num_hidden_layers": 4}),
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

REFUSED_MODELS: dict[str, TinyModel] = {
    "gpt2": TinyModel("GPT2Config", refused="no rotary embedding"),
    "opt": TinyModel("OPTConfig", {"word_embed_proj_dim": 64, "ffn_dim": 64}, refused="no rotary embedding"),
    "bloom": TinyModel("BloomConfig", refused="no rotary embedding"),
    "falcon": TinyModel("FalconConfig", {"alibi": False}, refused="AttentionInterface"),
    "falcon-alibi": TinyModel("FalconConfig", {"alibi": True}, refused="AttentionInterface"),
    "gptj": TinyModel("GPTJConfig", {"rotary_dim": 8}, refused="no rotary embedding"),
    "llama-dynamic": TinyModel(
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}},
        refused="change with the length",
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
        refused="change with the length",
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
        refused="chunk",
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
    "mamba": TinyModel("MambaConfig", {"state_size": 8}, refused="no rotary embedding"),
}


def tiny_model(name: str, trained_window: int = 64, **changes: Any) -> PreTrainedModel:
    """A model of `TINY_MODELS` or `REFUSED_MODELS`, in eval mode and float32; the same weights at every call.

    Args:
        name: its name there.
        trained_window: tokens that it says it was trained on.
        changes: further arguments of its configuration.
    """
    return {**TINY_MODELS, **REFUSED_MODELS}[name].build(trained_window, **changes)


def _small(kind: type[PreTrainedConfig], options: Mapping[str, Any], trained_window: int) -> PreTrainedConfig:
    """A configuration of small sizes, and of small configurations where it is made of several."""
    fields = _fields(kind)
    shared = {**_SIZES, "max_position_embeddings": trained_window, "max_seq_len": trained_window}
    if "kv_lora_rank" in fields:
        shared["num_key_value_heads"] = shared["num_attention_heads"]  # latent attention has a key for each query
    # Other names of fields too, where the field's own is not among ours.
    other = {name: own for name, own in kind.attribute_map.items() if own not in shared and own not in options}
    known = {name: fields[own] for name, own in ({name: name for name in fields} | other).items() if own in fields}
    arguments = {name: value for name, value in shared.items() if _typename(value) in known.get(name, ())}
    default = kind()
    arguments |= {name: size for name, size in _WINDOWS.items() if name in known and getattr(default, name) is not None}
    chosen = {"layer_types", "num_hidden_layers"} & options.keys()
    if "layer_types" in fields and not chosen and (kinds := _kinds_of_layers(kind)):
        arguments |= {"layer_types": kinds, "num_hidden_layers": len(kinds)}
    within = {
        name: _part(kind, name, options.get(name, {}), trained_window)
        for name in kind.sub_configs
        if isinstance(options.get(name, {}), Mapping)
    }
    return kind(**{**arguments, **options, **{name: part for name, part in within.items() if part is not None}})


def _part(
    kind: type[PreTrainedConfig], name: str, options: Mapping[str, Any], trained_window: int
) -> PreTrainedConfig | None:
    default = getattr(kind(), name, None)
    if not isinstance(default, PreTrainedConfig):
        return None
    if name in ("text_config", "thinker_config", "decoder"):
        return _small(type(default), options, trained_window)
    fields = _fields(type(default))
    sizes = {size: value for size, value in _SIDE_SIZES.items() if _typename(value) in fields.get(size, ())}
    return type(default)(**{**sizes, **options})


def _fields(kind: type[PreTrainedConfig]) -> dict[str, set[str]]:
    """The arguments of a configuration, with the types that each takes: some have a list where others have a number."""
    return {
        each.name: {getattr(each.type, "__name__", "")} | {part.strip() for part in str(each.type).split("|")}
        for each in dataclasses.fields(kind)
    }


def _typename(value: object) -> str:
    return "None" if value is None else type(value).__name__


def _kinds_of_layers(kind: type[PreTrainedConfig]) -> list[str]:
    """Each kind of layer that a model of a dozen layers has by default, in the order they come; at least two layers."""
    dozen: dict[str, Any] = {"num_hidden_layers": 12}
    kinds = list(dict.fromkeys(getattr(kind(**dozen), "layer_types", None) or ()))
    return kinds if len(kinds) != 1 else 2 * kinds


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
