# SPDX-License-Identifier: Apache-2.0
"""One tiny model of every architecture that transformers has for text, and of each kind of positions and attention.

Architectures come from transformers' own lists, so that one it adds is in the zoo by itself. What a configuration needs
beside the sizes that all share is in `OPTIONS`, a line each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.models.auto import configuration_auto, modeling_auto

from ropewalk.testing.models import TinyModel

_CONFIGURATIONS: Mapping[str, str] = vars(configuration_auto)["CONFIG_MAPPING_NAMES"]
_FOR_TEXT: Mapping[str, str] = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
_FOR_IMAGES: Mapping[str, str] = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

Family = Literal["causal", "vision-language", "variant", "encoder"]

LOCAL_AND_GLOBAL = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}
_LINEAR_AND_FULL = ["linear_attention", "full_attention"]
_LOCAL_TWICE = ["sliding_attention", "full_attention"] * 2


def _rope(rope_type: str = "default", **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, **{"rope_theta": 10_000.0, **more}}}


_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}


def _longrope(pairs: int, **more: Any) -> dict[str, Any]:
    """Frequencies that change where a text is longer than 64 tokens."""
    factors = {"short_factor": [1.0] * pairs, "long_factor": [4.0 + pair for pair in range(pairs)]}
    rope = _rope("longrope", **factors, original_max_position_embeddings=64, **more)
    return {"max_position_embeddings": 256, **rope}


def _three_axes(*sections: int, **more: Any) -> dict[str, Any]:
    """Positions with an axis each for time, height and width."""
    return {"text_config": _rope(mrope_section=[*sections], **more)}


_BOTH_ROPES = {
    **LOCAL_AND_GLOBAL,
    "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 10_000.0} for kind in _LOCAL_TWICE},
}
_INDEXED = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 32,
    "indexer_compress_ratio": 4,
}

_DOTS3 = {
    **{f"swa_{heads}": 4 for heads in ("num_attention_heads", "num_key_value_heads")},
    **{f"swa_{rank}": 16 for rank in ("q_lora_rank", "kv_lora_rank", "head_dim", "v_head_dim")},
    "swa_qk_nope_head_dim": 8,
}

# What architectures need beside the shared sizes.
OPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 64, "patch_in_forward": False},
    "chameleon": {"vocabulary_map": {"<image>": 90}},
    "codegen": {"rotary_dim": 8},
    "cohere2_vision": {"alignment_intermediate_size": 64},
    "cohere_compass": {"text_config": _BOTH_ROPES},
    "cohere_compass_text": _BOTH_ROPES,
    "cosmos3_edge": _three_axes(4, 2, 2),
    "dbrx": {
        "d_model": 64,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "hidden_size": 64},
    },
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": ["dense", "sparse"]},
        "vision_config": {
            "sam_config": {"downsample_channels": [32, 32], "output_channels": 32, "global_attn_indexes": [0]}
        },
    },
    "diffusion_gemma": {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}},
    "dots1": {"n_shared_experts": 1},
    "dots3_note": {
        "text_config": _DOTS3,
        "vision_config": {
            "num_hidden_layers": 42,
            "moe_intermediate_size": 32,
            "adapter_in_dim": 32,
            "adapter_out_dim": 64,
        },
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 64},
    },
    "dots3_note_text": _DOTS3,
    "emu3": {"vocabulary_map": {"<image>": 90}},
    "ernie4_5_vl_moe": _three_axes(3, 3, 2, moe_intermediate_size=[32, 32], moe_k=2),
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": {"layer_types": _LOCAL_TWICE, "num_hidden_layers": 4, "num_kv_shared_layers": 2},
    "glm46v": _three_axes(4, 2, 2),
    "glm4v": _three_axes(4, 2, 2),
    "glm4v_moe": _three_axes(2, 1, 1, partial_rotary_factor=0.5),
    "glm5_next": {"text_config": {"qk_rope_head_dim": 0}},
    "glm_ocr": _three_axes(4, 2, 2),
    "glmga": _three_axes(4, 2, 2),
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gpt_oss": _rope(),
    "gptj": {"rotary_dim": 8},
    "granite4_vision": {
        "downsample_rate": "1/2",
        "deepstack_layer_map": [],
        "spatial_target_layers": [],
        "vision_config": {"hidden_size": 64},
    },
    "granitemoehybrid": {"layer_types": _LINEAR_AND_FULL, "num_hidden_layers": 2},
    "hunyuan_vl": _three_axes(4, 2, 2),
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"mlp_layer_types": ["dense", "dense"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {
        "num_layers": 1,
        "head_dim": 8,
        "ffn_hidden_size": 64,
        "expert_ffn_hidden_size": 32,
        "moe_topk": 2,
    },
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 32},
    "mllama": {
        "text_config": {"num_hidden_layers": 4, "cross_attention_layers": [1, 3]},
        "vision_config": {"num_hidden_layers": 2, "num_global_layers": 1, "intermediate_layers_indices": [0]},
    },
    "molmo2": {"adapter_config": {"vision_feature_layer": [0]}},
    "muse_glimmer": {"out_hidden_size": 64, "projector_hidden_size": 64},
    "muse_spark": {
        "out_hidden_size": 64,
        "projector_hidden_size": 64,
        "audio_config": {"num_hidden_layers": 4, "hidden_sizes": [16] * 4, "depths": [1] * 4},
    },
    "nemotron_h": {"mamba_num_heads": 4, "mamba_head_dim": 32, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 32},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}, "projector_hidden_size": 64},
    "paddleocr_vl": _three_axes(4, 2, 2),
    "qwen2_5_omni_thinker": {**_three_axes(4, 2, 2), "vision_start_token_id": 90},
    "qwen2_5_vl": _three_axes(4, 2, 2),
    "qwen2_vl": _three_axes(4, 2, 2),
    "qwen3_5": _three_axes(2, 1, 1, partial_rotary_factor=0.5),
    "qwen3_5_moe": _three_axes(2, 1, 1, partial_rotary_factor=0.5),
    "qwen3_omni_moe_thinker": {**_three_axes(4, 2, 2), "vision_start_token_id": 90},
    "qwen3_vl": _three_axes(4, 2, 2),
    "qwen3_vl_moe": _three_axes(4, 2, 2),
    "qwen4_exp": {"text_config": _INDEXED},
    "qwen4_exp_text": _INDEXED,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "step3p7": {"text_config": {"sliding_window": 24, "num_sliding_attention_heads": 4}},
    "unlimited_ocr": {
        "vision_config": {
            "sam_config": {"downsample_channels": [32, 32], "output_channels": 32, "global_attn_indexes": [0]}
        }
    },
    "xlstm": {"num_heads": 2, "chunk_size": 8, "qk_dim_factor": 1.0},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4, "attn_layer_period": 2},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4, "use_mem_rope": True},
    "zaya": {"num_experts_per_tok": 1},
}
# Names that are left out. The halves of encoder-decoders and the encoders with a head for text: they have learned or
# relative positions, as gpt2, opt and bert have, and would fill the matrix with one and the same line.
_LEFT_OUT = """
    bart bert bert-generation big_bird bigbird_pegasus biogpt blenderbot blenderbot-small camembert cpmant ctrl
    data2vec-text electra ernie gpt-sw3 marian mbart megatron-bert musicgen musicgen_melody mvp openai-gpt pegasus
    plbart prophetnet reformer rembert roberta roberta-prelayernorm roc_bert trocr whisper xglm xlm xlm-roberta
    xlm-roberta-xl xlnet xmod
"""
# Drafts of another model, whose keys they read.
_LEFT_OUT += " gemma4_assistant gemma4_unified_assistant "
# What answers about an image, and to nothing without one.
_LEFT_OUT += """
    blip blip-2 evolla florence2 git idefics instructblip instructblipvideo kosmos-2 kosmos-2.5 pi0 pix2struct
    pp_chart2table pp_formulanet t5gemma2 udop vision-encoder-decoder
"""

# What one architecture may be in several ways: name, configuration, options.
_VARIANTS: dict[str, TinyModel] = {
    # Frequencies.
    "llama, linear": TinyModel("LlamaConfig", _rope("linear", factor=4.0)),
    "llama, dynamic": TinyModel("LlamaConfig", _rope("dynamic", factor=4.0)),
    "llama, yarn": TinyModel("LlamaConfig", _rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    "llama, yarn without its scale": TinyModel("LlamaConfig", _rope("yarn", factor=4.0, attention_factor=1.0)),
    "llama, llama3": TinyModel("LlamaConfig", _rope("llama3", **_LLAMA3)),
    "llama, longrope": TinyModel("LlamaConfig", _longrope(8)),
    "llama, theta 500000": TinyModel("LlamaConfig", _rope(rope_theta=500_000.0)),
    "llama, theta 100": TinyModel("LlamaConfig", _rope(rope_theta=100.0)),
    "mistral, yarn": TinyModel("MistralConfig", {"sliding_window": None, **_rope("yarn", factor=4.0)}),
    "qwen2, yarn": TinyModel("Qwen2Config", _rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    "qwen2, dynamic": TinyModel("Qwen2Config", _rope("dynamic", factor=4.0)),
    "qwen3, yarn": TinyModel("Qwen3Config", _rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    "qwen3, linear": TinyModel("Qwen3Config", _rope("linear", factor=2.0)),
    "phi3, longrope": TinyModel("Phi3Config", {"original_max_position_embeddings": 64, **_longrope(8)}),
    "phi3, longrope of a part": TinyModel(
        "Phi3Config", {"original_max_position_embeddings": 64, **_longrope(6, partial_rotary_factor=0.75)}
    ),
    "phimoe, longrope": TinyModel("PhimoeConfig", _longrope(8, short_mscale=1.1, long_mscale=1.2)),
    "minicpm3, longrope": TinyModel("MiniCPM3Config", _longrope(4)),
    "internlm3, dynamic": TinyModel("InternLM3Config", _rope("dynamic", factor=4.0)),
    "gpt-neox, linear": TinyModel("GPTNeoXConfig", _rope("linear", factor=2.0, partial_rotary_factor=0.25)),
    "gpt-neox, dynamic": TinyModel("GPTNeoXConfig", _rope("dynamic", factor=2.0, partial_rotary_factor=0.25)),
    "gpt-oss, yarn": TinyModel("GptOssConfig", _rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    "deepseek-v3, yarn": TinyModel(
        "DeepseekV3Config",
        _rope("yarn", factor=4.0, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=1.0),
    ),
    "gemma3, linear in global layers": TinyModel(
        "Gemma3TextConfig",
        {
            **LOCAL_AND_GLOBAL,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 8.0},
            },
        },
    ),
    # How much of a head turns.
    "phi, a quarter": TinyModel("PhiConfig", _rope(partial_rotary_factor=0.25)),
    "phi, normed": TinyModel("PhiConfig", {"qk_layernorm": True}),
    "stablelm, normed": TinyModel("StableLmConfig", {"qk_layernorm": True, "use_qkv_bias": True}),
    "gpt-neox, all": TinyModel("GPTNeoXConfig", _rope(partial_rotary_factor=1.0)),
    "gpt-neox, sequential": TinyModel("GPTNeoXConfig", {"use_parallel_residual": False}),
    "glm, all": TinyModel("GlmConfig", _rope(partial_rotary_factor=1.0)),
    "llama, heads of 32": TinyModel("LlamaConfig", {"head_dim": 32}),
    "qwen3, heads of 8": TinyModel("Qwen3Config", {"head_dim": 8}),
    "persimmon, half": TinyModel("PersimmonConfig", _rope(partial_rotary_factor=0.5)),
    "nemotron, all": TinyModel("NemotronConfig", _rope(partial_rotary_factor=1.0)),
    # Heads.
    "llama, one key head": TinyModel("LlamaConfig", {"num_key_value_heads": 1}),
    "llama, a key head for each": TinyModel("LlamaConfig", {"num_key_value_heads": 4}),
    "llama, biases": TinyModel("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "gemma, one key head": TinyModel("GemmaConfig", {"num_key_value_heads": 1}),
    "cohere, normed": TinyModel("CohereConfig", {"use_qk_norm": True, "logit_scale": 1.0}),
    "olmo, clipped": TinyModel("OlmoConfig", {"clip_qkv": 1.0}),
    "olmoe, clipped": TinyModel("OlmoeConfig", {"clip_qkv": 1.0}),
    "deepseek-v2, no low rank of queries": TinyModel("DeepseekV2Config", {"q_lora_rank": None}),
    "deepseek-v3, interleaved": TinyModel("DeepseekV3Config", {"rope_interleave": True}),
    "deepseek-v3, halves": TinyModel("DeepseekV3Config", {"rope_interleave": False}),
    # Windows, and layers without positions.
    "mistral, full": TinyModel("MistralConfig", {"sliding_window": None}),
    "mistral, sliding": TinyModel("MistralConfig", {"sliding_window": 24}),
    "mistral, a window longer than the text": TinyModel("MistralConfig", {"sliding_window": 4096}),
    "mixtral, sliding": TinyModel("MixtralConfig", {"sliding_window": 24}),
    "phi3, sliding": TinyModel("Phi3Config", {"sliding_window": 24}),
    "starcoder2, full": TinyModel("Starcoder2Config", {"sliding_window": None}),
    "starcoder2, sliding": TinyModel("Starcoder2Config", {"sliding_window": 24}),
    "qwen2, sliding": TinyModel("Qwen2Config", {"use_sliding_window": True, **LOCAL_AND_GLOBAL}),
    "qwen2, only sliding": TinyModel(
        "Qwen2Config", {"use_sliding_window": True, "sliding_window": 24, "layer_types": ["sliding_attention"] * 2}
    ),
    "qwen3, sliding": TinyModel("Qwen3Config", {"use_sliding_window": True, **LOCAL_AND_GLOBAL}),
    "gemma2, full": TinyModel("Gemma2Config", {"layer_types": ["full_attention"] * 2}),
    "gemma2, without softcap": TinyModel("Gemma2Config", {"attn_logit_softcapping": None}),
    "gemma2, a low softcap": TinyModel("Gemma2Config", {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16}),
    "gemma3, full": TinyModel("Gemma3TextConfig", {"layer_types": ["full_attention"] * 2}),
    "gemma3, only sliding": TinyModel("Gemma3TextConfig", {"layer_types": ["sliding_attention"] * 2}),
    "gpt-oss, full": TinyModel("GptOssConfig", {"layer_types": ["full_attention"] * 2, **_rope()}),
    "cohere2, no rotation in global layers": TinyModel("Cohere2Config", LOCAL_AND_GLOBAL),
    "exaone4, full": TinyModel("Exaone4Config", {"sliding_window": None, "layer_types": ["full_attention"] * 2}),
    "smollm3, all turn": TinyModel("SmolLM3Config", {"no_rope_layers": [1, 1]}),
    "smollm3, none turns": TinyModel("SmolLM3Config", {"no_rope_layers": [0, 0]}),
    "smollm3, some turn": TinyModel("SmolLM3Config", {"no_rope_layers": [1, 0, 1, 0], "num_hidden_layers": 4}),
    "llama4, without its temperature": TinyModel("Llama4TextConfig", {"attn_temperature_tuning": False}),
    "llama4, full": TinyModel("Llama4TextConfig", {"layer_types": ["full_attention"] * 2, "no_rope_layers": [1, 1]}),
    "modernbert-decoder, full": TinyModel("ModernBertDecoderConfig", {"layer_types": ["full_attention"] * 2}),
    # Layers that read others' keys.
    "gemma4, shared keys": TinyModel(
        "Gemma4TextConfig", {"layer_types": _LOCAL_TWICE, "num_hidden_layers": 4, "num_kv_shared_layers": 2}
    ),
    "gemma4, keys as values": TinyModel("Gemma4TextConfig", {"attention_k_eq_v": True}),
    "gemma4, experts": TinyModel(
        "Gemma4TextConfig",
        {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    ),
    "gemma3n, no shared keys": TinyModel("Gemma3nTextConfig", {**LOCAL_AND_GLOBAL, "num_kv_shared_layers": 0}),
    # Biases by distance, and other positions.
    "falcon, rotary": TinyModel("FalconConfig", {"alibi": False, "multi_query": True}),
    "falcon, new decoder": TinyModel(
        "FalconConfig", {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2}
    ),
    "falcon, ALiBi": TinyModel("FalconConfig", {"alibi": True, "multi_query": False}),
    "mpt, without ALiBi": TinyModel("MptConfig", {"attn_config": {"alibi": False}}),
    "granitemoehybrid, rotary": TinyModel(
        "GraniteMoeHybridConfig",
        {"layer_types": _LINEAR_AND_FULL, "num_hidden_layers": 2, "position_embedding_type": "rope"},
    ),
    "zamba2, no rotation": TinyModel("Zamba2Config", {**OPTIONS["zamba2"], "use_mem_rope": False}),
    "gptj, all": TinyModel("GPTJConfig", {"rotary_dim": 16}),
    # Without a head for text.
    "llama, without a head": TinyModel("LlamaConfig", auto="AutoModel"),
    "qwen2, without a head": TinyModel("Qwen2Config", auto="AutoModel"),
    "gemma3, without a head": TinyModel("Gemma3TextConfig", LOCAL_AND_GLOBAL, auto="AutoModel"),
    "qwen3, a class a token": TinyModel("Qwen3Config", auto="AutoModelForTokenClassification"),
}
# Encoders, which see what comes after a token.
_ENCODERS: dict[str, TinyModel] = {
    "bert": TinyModel("BertConfig", auto="AutoModelForMaskedLM"),
    "esm": TinyModel("EsmConfig", {"position_embedding_type": "rotary", "mask_token_id": 1}, "AutoModelForMaskedLM"),
    "eurobert": TinyModel("EuroBertConfig", auto="AutoModelForMaskedLM"),
    "modernbert": TinyModel("ModernBertConfig", {"local_attention": 16}, "AutoModelForMaskedLM"),
    "nomic_bert": TinyModel("NomicBertConfig", auto="AutoModelForMaskedLM"),
    "jina_embeddings_v3": TinyModel("JinaEmbeddingsV3Config", auto="AutoModel"),
    "gte": TinyModel("GteConfig", auto="AutoModel"),
    "gemma3, bidirectional": TinyModel("Gemma3TextConfig", {"use_bidirectional_attention": True}, "AutoModel"),
    "t5": TinyModel("T5Config", {"d_kv": 16, "d_ff": 64, "decoder_start_token_id": 0}, "AutoModelForSeq2SeqLM"),
    "t5gemma": TinyModel("T5GemmaConfig", auto="AutoModelForSeq2SeqLM"),
}


@dataclass(frozen=True)
class Entry:
    """A model of the zoo.

    Attributes:
        tiny: how to make it.
        model_type: transformers' name of its architecture.
        family: what it stands for.
        grid: sizes of a picture or a video in its text, in tokens: time, height, width; None for text alone.
        beside: what it is given beside a text of so many tokens: an image that layers of their own attend to.
    """

    tiny: TinyModel
    model_type: str
    family: Family
    grid: tuple[int, int, int] | None = None
    beside: Callable[[int], dict[str, Tensor]] | None = None


def _entries() -> Iterator[tuple[str, Entry]]:
    # What reads images is asked as a whole, once.
    text = [model_type for model_type in _FOR_TEXT if model_type not in _FOR_IMAGES]
    yield from _of_each(text, "AutoModelForCausalLM", "causal")
    yield from _of_each(_FOR_IMAGES, "AutoModelForImageTextToText", "vision-language")
    types = {config: model_type for model_type, config in _CONFIGURATIONS.items()}
    kinds: tuple[tuple[Mapping[str, TinyModel], Family], ...] = ((_VARIANTS, "variant"), (_ENCODERS, "encoder"))
    for tinies, family in kinds:
        for name, tiny in tinies.items():
            if tiny.config in types:  # older versions of transformers have fewer
                yield name, Entry(tiny, types[tiny.config], family)


def _of_each(model_types: Iterable[str], auto: str, family: Family) -> Iterator[tuple[str, Entry]]:
    for model_type in model_types:
        if model_type in _LEFT_OUT.split():
            continue
        tiny = TinyModel(_CONFIGURATIONS[model_type], OPTIONS.get(model_type, {}), auto)
        yield model_type, Entry(tiny, model_type, family)
        if "mrope_section" in str(tiny.options):
            yield f"{model_type}, an image", Entry(tiny, model_type, family, grid=(1, 6, 8))
            yield f"{model_type}, a video", Entry(tiny, model_type, family, grid=(4, 3, 4))
        if model_type in _BESIDE:
            yield f"{model_type}, an image", Entry(tiny, model_type, family, beside=_BESIDE[model_type])


def _mllama_image(tokens: int) -> dict[str, Tensor]:
    """An image of three tiles, the last of four being empty, in place of the text's sixth token: those before it do
    not see it."""
    seen = torch.zeros(1, tokens, 1, 4, dtype=torch.long)
    seen[:, 5:, :, :3] = 1
    return {
        "pixel_values": torch.randn(1, 1, 4, 3, 28, 28, generator=torch.Generator().manual_seed(0)),
        "aspect_ratio_ids": torch.tensor([[3]]),
        "aspect_ratio_mask": torch.tensor([[[1, 1, 1, 0]]]),
        "cross_attention_mask": seen,
    }


_BESIDE = {"mllama": _mllama_image}


ZOO: dict[str, Entry] = dict(_entries())
