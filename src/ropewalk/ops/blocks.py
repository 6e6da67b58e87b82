# SPDX-License-Identifier: Apache-2.0
"""Attention under a position map from plain tensor operations, a block of queries at a time.

Runs on every device and with every option (softcap, gradients, value heads of another size), and holds one block of
scores: memory grows linearly with the number of keys.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ropewalk.maps import Band
from ropewalk.maps.base import EVERYTHING
from ropewalk.maps.positions import PositionFunction
from ropewalk.ops.call import LARGEST_SINK, Call, Positions
from ropewalk.ops.rotary import band_keys, rerotated

# Scores held at a time, over all heads: 64 MiB in float32.
_SCORES_PER_BLOCK = 1 << 24
_LARGEST_BLOCK = 256


def lacks(call: Call) -> str | None:
    """What this call needs that `attend` does not have; None if it has all."""
    return call.extra("slopes", "positions")


def attend(call: Call) -> Tensor:
    """See `ropewalk.ops.attention`. Scores and softmax are float32."""
    if call.positions is not None:
        return _attend_at(call, call.positions)
    keys = call.key.shape[2]
    block = max(1, min(_LARGEST_BLOCK, _SCORES_PER_BLOCK // (call.query.shape[0] * call.query.shape[1] * keys)))
    outputs = []
    for begin, end, bands in call.position_map.bands_by_query(call.past, keys):
        for first, stop in pairwise([*range(begin, end, block), end]):
            part = replace(
                call,
                query=call.query[:, :, first - call.past : stop - call.past],
                key=call.key[:, :, :stop],
                value=call.value[:, :, :stop],
            )
            if call.needs_gradients:
                # Otherwise the backward pass would keep every block's scores.
                outputs.append(checkpoint(_attend_block, part, bands, use_reentrant=False))
            else:
                outputs.append(_attend_block(part, bands))
    return torch.cat(outputs, dim=2)


def _attend_block(call: Call, bands: tuple[Band, ...]) -> Tensor:
    query, key, value, past = call.query, call.key, call.value, call.past
    batch, heads, queries, _ = query.shape
    key_heads, keys = key.shape[1:3]
    tokens = torch.arange(keys, device=query.device)
    logits, ranges = [], []
    for band in bands:
        begin, end = band.low(past), min(band.high(keys - 1), keys)
        if end <= begin:
            continue
        rotated_query = rerotated(query, band.query_positions, past, call.rotary)
        rotated_key = band_keys(key, band, begin, end, call.rotary, call.far_keys)
        grouped = rotated_query.reshape(batch, key_heads, heads // key_heads * queries, -1).float()
        scores = (grouped @ rotated_key.float().mT * call.scale).view(batch, heads, queries, -1)
        if call.slopes is not None:
            away = band.query_positions(tokens[past:, None]) - band.key_positions(tokens[begin:end])
            scores = scores - call.slopes.float()[:, None, None] * away.float()
        if call.softcap is not None:
            scores = call.softcap * torch.tanh(scores / call.softcap)
        seen = band.sees(tokens[past:, None], tokens[begin:end])
        logits.append(scores.masked_fill(~seen, -torch.inf))
        ranges.append((begin, end))
    if call.sinks is not None:
        logits.append(call.sinks.float().clamp(max=LARGEST_SINK).view(1, -1, 1, 1).expand(batch, heads, queries, 1))
    weights = torch.softmax(torch.cat(logits, dim=-1), dim=-1)
    output: Tensor | float = 0.0
    column = 0
    for begin, end in ranges:
        part = weights[..., column : column + end - begin].reshape(batch, key_heads, -1, end - begin)
        output = output + part @ value[:, :, begin:end].float()
        column += end - begin
    assert isinstance(output, Tensor)
    return output.view(batch, heads, queries, -1).to(value.dtype)


def _attend_at(call: Call, positions: Positions) -> Tensor:
    """The same where positions are no slots: any key may then be in any band, so each band looks at all of them."""
    by_pair = positions.queries.ndim == 3
    position_map, rotary, past = call.position_map, call.rotary, call.past
    # With whether it is for the queries before the map's start.
    bands = [(band, False) for band in position_map.bands] + ([(EVERYTHING, True)] if position_map.start else [])

    def turned(x: Tensor, function: PositionFunction, tokens: Tensor) -> Tensor:
        if not rotary.moves(function):
            return x
        angles = rotary.angles(function, tokens, by_pair)[:, None]
        return rotary.rotate(x, angles.cos().float(), angles.sin().float())

    # The keys as each band sees them, once for all blocks of queries.
    views = [turned(call.key, band.key_positions, positions.keys) for band, _ in bands]
    batch, heads, queries, _ = call.query.shape
    key_heads, keys = call.key.shape[1:3]
    slots = torch.arange(keys, device=call.query.device)
    n = (positions.keys[..., 0] if by_pair else positions.keys)[:, None, None]  # (batch, 1, 1, keys)
    block = max(1, min(_LARGEST_BLOCK, _SCORES_PER_BLOCK // (batch * heads * keys)))
    outputs = []
    for first in range(0, queries, block):
        query = call.query[:, :, first : first + block]
        at = positions.queries[:, first : first + block]
        m = (at[..., 0] if by_pair else at)[:, None, :, None]  # (batch, 1, queries, 1)
        before = slots <= slots[past + first : past + first + query.shape[2], None]
        logits = torch.full((batch, heads, query.shape[2], keys), -torch.inf, device=query.device)
        for (band, early), view in zip(bands, views, strict=True):
            seen = before & band.sees(m, n) & ((m < position_map.start) == early)
            if not seen.any():
                continue
            grouped = turned(query, band.query_positions, at).reshape(batch, key_heads, -1, query.shape[3]).float()
            scores = (grouped @ view.float().mT * call.scale).view(batch, heads, -1, keys)
            if call.slopes is not None:
                away = band.query_positions(m) - band.key_positions(n)
                scores = scores - call.slopes.float()[:, None, None] * away.float()
            if call.softcap is not None:
                scores = call.softcap * torch.tanh(scores / call.softcap)
            logits = torch.where(seen, scores, logits)
        if call.sinks is not None:
            sinks = call.sinks.float().clamp(max=LARGEST_SINK).view(1, -1, 1, 1).expand(batch, heads, query.shape[2], 1)
            logits = torch.cat((logits, sinks), dim=-1)
        weights = torch.softmax(logits, dim=-1)[..., :keys].reshape(batch, key_heads, -1, keys)
        outputs.append((weights @ call.value.float()).view(batch, heads, -1, call.value.shape[3]))
    return torch.cat(outputs, dim=2).to(call.value.dtype)
