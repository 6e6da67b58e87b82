# SPDX-License-Identifier: Apache-2.0
"""Random tensors, and attention written as loops and complex numbers: what tests of the operator share."""

from __future__ import annotations

import importlib.util
import math

import torch

from ropewalk.maps.base import EVERYTHING
from ropewalk.ops import Rotary

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FAST = ["blocks", "flash"]
try:
    # The folder `triton` beside this file is found where Triton is not installed.
    if importlib.util.find_spec("triton.language") is not None:
        import triton_interpreter  # noqa: F401

        FAST.append("fused")
except ModuleNotFoundError:
    pass
IMPLEMENTATIONS = ["reference", *FAST]


def device_of(impl):
    """Where an implementation runs in tests: the kernels on a GPU if there is one, otherwise interpreted."""
    return DEVICE if impl == "fused" else torch.device("cpu")


def random_rotary(dim: int, base: float = 100.0, device="cpu", **kind: object) -> Rotary:
    return Rotary((base ** -(torch.arange(0, dim, 2) / dim)).to(device), **kind)


def random_tensors(batch, heads, key_heads, queries, keys, head_dim, dtype=torch.float32, device="cpu"):
    """Query, key, value; values and keys large enough for a peaked softmax, which flat ones would not test."""
    query = 2 * torch.randn(batch, heads, queries, head_dim, device=device)
    key = torch.randn(batch, key_heads, keys, head_dim, device=device)
    value = torch.randn(batch, key_heads, keys, head_dim, device=device)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def rotated(x, rotary, positions):
    """x (batch, heads, tokens, head_dim) as a model rotates it at `positions`, (tokens,) or (tokens, pairs)."""
    angles = positions.view(len(positions), -1) * rotary.inverse_frequencies.double()
    return rotary.rotate(x, angles.cos(), angles.sin())


def relative(position_map, length):
    """Relative position of every query and key as loops over a map's bands give it; NaN where a key is not seen."""

    def edge(edge, query):
        key = max(0, math.floor((query - edge.back) / edge.block) * edge.block)
        return key if edge.cap is None else min(key, edge.cap)

    table = torch.full((length, length), torch.nan, dtype=torch.float64)
    tokens = torch.arange(length)
    for bands, queries in (
        ((EVERYTHING,), range(min(position_map.start, length))),
        (position_map.bands, range(position_map.start, length)),
    ):
        for band in bands:
            of_queries, of_keys = (function(tokens).tolist() for function in band.functions)
            for m in queries:
                for n in range(edge(band.low, m), edge(band.high, m)):
                    assert n <= m
                    assert table[m, n].isnan()  # in one band only
                    table[m, n] = of_queries[m] - of_keys[n]
    return table


def explicit(query, key, value, relative, rotary, bias=0.0):
    """Attention from un-rotated float64 query and key, and nothing but relative positions (queries, keys), or (queries,
    keys, pairs); NaN where a key is not seen."""
    groups, pairs = query.shape[1] // key.shape[1], rotary.pairs
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    q, k = (torch.complex(x[..., :pairs], x[..., pairs : 2 * pairs]) for x in (query, key))
    relative = relative[..., None] if relative.ndim == 2 else relative
    turn = torch.exp(1j * relative.nan_to_num() * rotary.inverse_frequencies.double())
    scores = torch.einsum("bhqd,bhkd,qkd->bhqk", q, k.conj(), turn).real
    scores = scores + query[..., 2 * pairs :] @ key[..., 2 * pairs :].mT
    scores = scores / math.sqrt(query.shape[-1]) + bias
    return torch.softmax(scores.masked_fill(relative[..., 0].isnan(), -torch.inf), dim=-1) @ value
