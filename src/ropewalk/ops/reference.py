"""The specification: attention under a position map as the formula says it, in float32, holding the whole matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from ropewalk.maps import PositionMap
from ropewalk.maps.positions import TRUE_POSITIONS, PositionFunction
from ropewalk.ops.rotary import Rotary


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position_map: PositionMap,
    rotary: Rotary | None,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of one span: queries are the last of the keys. Computes in float32, or float64 for float64 input."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    past = key.shape[2] - query.shape[2]
    tokens = torch.arange(key.shape[2], device=query.device)
    query_tokens = tokens[past:]
    distance = query_tokens[:, None] - tokens
    groups = query.shape[1] // key.shape[1]
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)

    def scores(query_positions: PositionFunction, key_positions: PositionFunction) -> Tensor:
        rotated_query = _rotate(query, query_positions, query_tokens, rotary)
        rotated_key = _rotate(key, key_positions, tokens, rotary)
        logits = rotated_query @ rotated_key.transpose(-1, -2) * scale
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    logits = torch.full((*query.shape[:3], key.shape[2]), -torch.inf, dtype=dtype, device=query.device)
    before_start = (query_tokens < position_map.start)[:, None]
    for band in position_map.bands:
        inside = (distance >= band.first) & ~before_start
        if band.stop is not None:
            inside &= distance < band.stop
        logits = torch.where(inside, scores(band.query_positions, band.key_positions), logits)
    if position_map.start > past:
        logits = torch.where(before_start & (distance >= 0), scores(TRUE_POSITIONS, TRUE_POSITIONS), logits)
    if sinks is not None:
        sink = sinks.to(dtype).view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        return torch.softmax(torch.cat((logits, sink), dim=-1), dim=-1)[..., :-1] @ value
    return torch.softmax(logits, dim=-1) @ value


def _rotate(x: Tensor, function: PositionFunction, tokens: Tensor, rotary: Rotary | None) -> Tensor:
    if rotary is None or function == TRUE_POSITIONS:
        return x
    angles = rotary.phases(function(tokens)) - rotary.phases(tokens)
    return rotary.rotate(x, angles.cos().to(x.dtype), angles.sin().to(x.dtype))
