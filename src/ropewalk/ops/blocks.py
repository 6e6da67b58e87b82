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
from ropewalk.maps.positions import TRUE_POSITIONS, PositionFunction
from ropewalk.ops.call import LARGEST_SINK, Call, Positions
from ropewalk.ops.rotary import Rotary, band_keys, rerotated

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
    rotary, past = call.rotary, call.past
    at_queries, at_keys = (x if x.ndim == 3 else x[..., None] for x in (positions.queries, positions.keys))
    axes = at_keys.shape[2]
    of_axis = [_pairs_of(positions, axis, rotary) for axis in range(axes)]
    bands = [EVERYTHING, *call.position_map.bands]

    def turned(x: Tensor, function: PositionFunction, tokens: Tensor, axis: int) -> Tensor:
        """The pairs of an axis alone, at a function's positions, float32."""
        if rotary.moves(function):
            angles = rotary.angles(function, tokens[..., axis])[:, None]
            x = rotary.rotate(x, angles.cos().float(), angles.sin().float())
        return torch.cat([half[..., of_axis[axis]] for half in rotary.halves(x)], dim=-1).float()

    def rest(x: Tensor) -> Tensor:
        return torch.cat((x[..., : rotary.offset], x[..., rotary.offset + rotary.dim :]), dim=-1).float()

    # The keys as each band sees them, once for all blocks of queries.
    views = [[turned(call.key, band.key_positions, at_keys, axis) for band in bands] for axis in range(axes)]
    key_rest = rest(call.key)
    batch, heads, queries, _ = call.query.shape
    key_heads, keys = call.key.shape[1:3]
    slots = torch.arange(keys, device=call.query.device)
    n = at_keys[:, None, None]  # (batch, 1, 1, keys, axes)
    block = max(1, min(_LARGEST_BLOCK, _SCORES_PER_BLOCK // (batch * heads * keys)))

    def product(x: Tensor, view: Tensor) -> Tensor:
        """(batch, heads, queries, dims) with (batch, key heads, keys, dims)."""
        grouped = x.reshape(batch, key_heads, heads // key_heads * x.shape[2], x.shape[3])
        return (grouped @ view.mT).view(batch, heads, -1, keys)

    outputs = []
    for first in range(0, queries, block):
        query, at = call.query[:, :, first : first + block], at_queries[:, first : first + block]
        m = at[:, None, :, None]  # (batch, 1, queries, 1, axes)
        past_or_present = slots <= slots[past + first : past + first + query.shape[2], None]
        early = m[..., 0] < call.position_map.start
        ahead = n > m if axes > 1 else torch.zeros_like(n, dtype=torch.bool)
        seen, away = past_or_present & (early | ahead[..., 0]), (m - n)[..., 0].float()
        scores = product(rest(query), key_rest)
        for axis in range(axes):
            part = product(turned(query, TRUE_POSITIONS, at, axis), views[axis][0])
            for band, view in zip(bands[1:], views[axis][1:], strict=True):
                inside = band.sees(m[..., axis], n[..., axis]) & ~ahead[..., axis] & ~early
                if axis == 0:
                    seen = seen | (inside & past_or_present)
                    if call.slopes is not None:
                        mapped = band.query_positions(m[..., 0]) - band.key_positions(n[..., 0])
                        away = torch.where(inside, mapped.float(), away)
                if not band.is_true and inside.any():
                    part = torch.where(inside, product(turned(query, band.query_positions, at, axis), view), part)
            scores = scores + part
        scores = scores * call.scale
        if call.slopes is not None:
            scores = scores - call.slopes.float()[:, None, None] * away
        if call.softcap is not None:
            scores = call.softcap * torch.tanh(scores / call.softcap)
        scores = scores.masked_fill(~seen, -torch.inf)
        if call.sinks is not None:
            sinks = call.sinks.float().clamp(max=LARGEST_SINK).view(1, -1, 1, 1).expand(batch, heads, query.shape[2], 1)
            scores = torch.cat((scores, sinks), dim=-1)
        weights = torch.softmax(scores, dim=-1)[..., :keys].reshape(batch, key_heads, -1, keys)
        outputs.append((weights @ call.value.float()).view(batch, heads, -1, call.value.shape[3]))
    return torch.cat(outputs, dim=2).to(call.value.dtype)


def _pairs_of(positions: Positions, axis: int, rotary: Rotary) -> Tensor:
    """Which pairs of dimensions turn by an axis, bool, (pairs,)."""
    if positions.axis_of_pair is None:
        return torch.ones(rotary.pairs, dtype=torch.bool, device=positions.keys.device)
    return positions.axis_of_pair.to(positions.keys.device) == axis
