"""Attention under a position map from plain tensor operations, a block of queries at a time.

Runs on every device and with every option (softcap, gradients, value heads of another size), and holds one block of
scores: memory grows linearly with the number of keys.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ropewalk.maps import Band, PositionMap
from ropewalk.ops.rotary import Rotary, band_keys, moved

# Scores held at a time, over all heads: 64 MiB in float32.
_SCORES_PER_BLOCK = 1 << 24
_LARGEST_BLOCK = 256


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position_map: PositionMap,
    rotary: Rotary | None,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    far_keys: Tensor | None = None,
) -> Tensor:
    """Attention of one span: queries are the last of the keys. Scores and softmax are float32."""
    keys, queries = key.shape[2], query.shape[2]
    past = keys - queries
    block = max(1, min(_LARGEST_BLOCK, _SCORES_PER_BLOCK // (query.shape[0] * query.shape[1] * keys)))
    start = min(max(position_map.start - past, 0), queries)
    edges = sorted({*range(0, start, block), *range(start, queries, block), queries})
    outputs = []
    for first, stop in pairwise(edges):
        bands = position_map.bands if first >= start else (Band(0, None),)
        seen = past + stop
        arguments = (
            query[:, :, first:stop],
            key[:, :, :seen],
            value[:, :, :seen],
            bands,
            rotary,
            scale,
            softcap,
            sinks,
            far_keys,
        )
        if torch.is_grad_enabled() and query.requires_grad:
            # Otherwise the backward pass would keep every block's scores.
            outputs.append(checkpoint(_attend_block, *arguments, use_reentrant=False))
        else:
            outputs.append(_attend_block(*arguments))
    return torch.cat(outputs, dim=2)


def _attend_block(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bands: tuple[Band, ...],
    rotary: Rotary | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    far_keys: Tensor | None,
) -> Tensor:
    batch, heads, queries, _ = query.shape
    key_heads, keys = key.shape[1:3]
    past = keys - queries
    tokens = torch.arange(keys, device=query.device)
    logits, ranges = [], []
    for band in bands:
        begin = 0 if band.stop is None else max(past - band.stop + 1, 0)
        end = keys - band.first
        if end <= begin:
            continue
        rotated_query = moved(query, band.query_positions, past, rotary)
        rotated_key = band_keys(key, band, begin, end, rotary, far_keys)
        grouped = rotated_query.reshape(batch, key_heads, heads // key_heads * queries, -1).float()
        scores = (grouped @ rotated_key.float().transpose(-1, -2) * scale).view(batch, heads, queries, -1)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        distance = tokens[past:, None] - tokens[begin:end]
        outside = distance < band.first
        if band.stop is not None:
            outside |= distance >= band.stop
        logits.append(scores.masked_fill(outside, -torch.inf))
        ranges.append((begin, end))
    if sinks is not None:
        logits.append(sinks.float().view(1, -1, 1, 1).expand(batch, heads, queries, 1))
    weights = torch.softmax(torch.cat(logits, dim=-1), dim=-1)
    output: Tensor | float = 0.0
    column = 0
    for begin, end in ranges:
        part = weights[..., column : column + end - begin].reshape(batch, key_heads, -1, end - begin)
        output = output + part @ value[:, :, begin:end].float()
        column += end - begin
    assert isinstance(output, Tensor)
    return output.view(batch, heads, queries, -1).to(value.dtype)
