# SPDX-License-Identifier: Apache-2.0
"""Configurations of tiny models: sizes that all architectures share, as far as each knows them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

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
_WINDOWS: dict[str, int] = {
    "sliding_window": 24,
    "attention_chunk_size": 24,
    "sliding_window_size": 24,
    "window_size": 24,
}
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
# Parts of a configuration that are about text, by name. What they lie in has the same sizes.
_TEXT = ("text_config", "thinker_config", "decoder")


def small_configuration(
    kind: type[PreTrainedConfig], options: Mapping[str, Any], trained_window: int
) -> PreTrainedConfig:
    """A configuration of small sizes, and of small configurations where it is made of several.

    Args:
        kind: its class.
        options: arguments of its own, which go before the shared sizes; those of a part are a mapping under its name.
        trained_window: tokens that it says the model was trained on.
    """
    fields = _fields(kind)
    shared = {**_SIZES, "max_position_embeddings": trained_window, "max_seq_len": trained_window}
    if "kv_lora_rank" in fields:
        shared["num_key_value_heads"] = shared["num_attention_heads"]  # latent attention has a key for each query
    # Other names of fields too, where the field's own is not among ours.
    other = {name: own for name, own in kind.attribute_map.items() if own not in shared and own not in options}
    known = fields | {name: fields[own] for name, own in other.items() if own in fields}
    arguments = _fitting(shared, known)
    default = kind()
    arguments |= {name: size for name, size in _WINDOWS.items() if name in known and getattr(default, name) is not None}
    chosen = {"layer_types", "num_hidden_layers"} & options.keys()
    if "layer_types" in fields and not chosen and (kinds := _kinds_of_layers(kind)):
        arguments |= {"layer_types": kinds, "num_hidden_layers": len(kinds)}
    return kind(**{**arguments, **options, **_parts(default, options, trained_window)})


def _parts(default: PreTrainedConfig, options: Mapping[str, Any], trained_window: int) -> dict[str, PreTrainedConfig]:
    """The configurations within one."""
    parts = {}
    for name in default.sub_configs:
        own, part = options.get(name, {}), getattr(default, name, None)
        if not isinstance(part, PreTrainedConfig) or not isinstance(own, Mapping):
            continue
        if name in _TEXT:
            parts[name] = small_configuration(type(part), own, trained_window)
        else:
            sizes = _fitting(_SIDE_SIZES, _fields(type(part)))
            parts[name] = type(part)(**{**sizes, **own, **_parts(part, own, trained_window)})
    return parts


def _fields(kind: type[PreTrainedConfig]) -> dict[str, set[str]]:
    """The arguments of a configuration, with the types that each takes."""
    return {
        each.name: {getattr(each.type, "__name__", "")} | {part.strip() for part in str(each.type).split("|")}
        for each in dataclasses.fields(kind)
    }


def _fitting(sizes: Mapping[str, Any], known: Mapping[str, set[str]]) -> dict[str, Any]:
    """Sizes that a configuration knows and takes: some have a list where others have a number."""
    return {
        name: value
        for name, value in sizes.items()
        if ("None" if value is None else type(value).__name__) in known.get(name, ())
    }


def _kinds_of_layers(kind: type[PreTrainedConfig]) -> list[str]:
    """Each kind of layer that a model of a dozen layers has by default, in the order they come; at least two layers."""
    dozen: dict[str, Any] = {"num_hidden_layers": 12}
    kinds = list(dict.fromkeys(getattr(kind(**dozen), "layer_types", None) or ()))
    return kinds if len(kinds) != 1 else 2 * kinds
