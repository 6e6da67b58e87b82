# SPDX-License-Identifier: Apache-2.0
"""Attention under a map written down from its definition, as an attention function for transformers.

It takes from the library the matrix of relative positions and nothing else, but for frequencies that do not change with
the length: queries and keys are turned back by the model's own frequencies, as complex numbers in float64, and every
pair is turned by its relative position. Which pairs attend is transformers' own mask, without those that the map hides.
"""

from contextlib import contextmanager

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from ropewalk.integrations.transformers.adapters import adapt
from ropewalk.integrations.transformers.changes import Changes
from ropewalk.integrations.transformers.rope_scaling import fixed_frequencies

INTERLEAVED = ("cohere", "glm", "llama4", "gptj", "codegen")
# First rotated dimension of a head, where it is not 0.
FIRST_ROTATED = {"deepseek-v3": 8}


@contextmanager
def naive_attention(
    model, name, position_map, extend_sliding=False, query_factors=None, by_layer=None, on_weights=None
):
    """The model under a map, or one for each attention module, computed naively. For one text without padding, all of
    it at once."""

    def attend(module, query, key, value, mask, scaling, sliding_window=None, softcap=None, s_aux=None, **kwargs):
        query, key, value = (x.double() for x in (query, key, value))
        length, groups = query.shape[2], query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        chunked = "chunked" in str(
            getattr(model.config, "layer_types", None) and model.config.layer_types[module.layer_idx]
        )
        if (sliding_window is None or extend_sliding) and getattr(module, "use_rope", True) and not chunked:
            if query_factors is not None:
                query = query * query_factors[:, None]
            frequencies = _frequencies(model, module).double()
            turned_back = torch.polar(torch.tensor(1.0).double(), -torch.arange(length)[:, None] * frequencies)
            query_pairs, query_rest = _pairs(query, name, len(frequencies))
            key_pairs, key_rest = _pairs(key, name, len(frequencies))
            relative = (by_layer[module] if by_layer else position_map).relative_positions(length)
            mask = mask & (relative >= 0)
            turned = torch.polar(torch.tensor(1.0).double(), relative[..., None] * frequencies)
            scores = torch.einsum(
                "bhmj,bhnj,mnj->bhmn", query_pairs * turned_back, (key_pairs * turned_back).conj(), turned
            ).real
            scores = scores + query_rest @ key_rest.transpose(-1, -2)
        else:
            scores = query @ key.transpose(-1, -2)
        scores = scores * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~mask, -torch.inf)
        if s_aux is not None:
            scores = torch.cat((scores, s_aux.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)), dim=-1)
        weights = scores.softmax(dim=-1)[..., :length]
        if on_weights is not None:
            on_weights(module, weights)
        return (weights @ value).transpose(1, 2).float().contiguous(), None

    def mask(*args, **kwargs):
        return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})

    AttentionInterface.register("naive", attend)
    AttentionMaskInterface.register("naive", mask)
    previous = model.config._attn_implementation
    model.set_attn_implementation("naive")
    # Some models take no such name by themselves.
    model.config._attn_implementation_internal = "naive"
    window = getattr(model.config, "sliding_window", None)
    try:
        if extend_sliding and window is not None:
            model.config.sliding_window = 1 << 40
        adapt(model, 1000, changes := Changes())
        with fixed_frequencies(model, model.config.max_position_embeddings):
            yield
    finally:
        changes.undo()
        if extend_sliding and window is not None:
            model.config.sliding_window = window
        model.config._attn_implementation_internal = previous
        model.set_attn_implementation(previous)


def _frequencies(model, module):
    """The model's frequencies; Gemma 3 has one set for each kind of layer."""
    if hasattr(module, "embed_positions"):
        return 10_000.0 ** -(torch.arange(0, module.rotary_dim, 2) / module.rotary_dim)
    buffers = {name.rsplit(".", 1)[-1]: buffer for name, buffer in model.named_buffers()}
    if "inv_freq" in buffers:
        return buffers["inv_freq"]
    return buffers[f"{model.config.layer_types[module.layer_idx]}_inv_freq"]


def _pairs(x, name, pairs):
    """The rotated dimensions of x as complex numbers, and the others."""
    first = FIRST_ROTATED.get(name, 0)
    rotated = x[..., first : first + 2 * pairs]
    rest = torch.cat((x[..., :first], x[..., first + 2 * pairs :]), dim=-1)
    if name in INTERLEAVED:
        return torch.complex(rotated[..., 0::2].contiguous(), rotated[..., 1::2].contiguous()), rest
    return torch.complex(rotated[..., :pairs].contiguous(), rotated[..., pairs:].contiguous()), rest
