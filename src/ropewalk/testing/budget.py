# SPDX-License-Identifier: Apache-2.0
"""Error budgets: how far an implementation may be from the truth, derived and not guessed.

The truth is the specification computed in float64 on the inputs as they are (already rounded to their dtype). The
yardstick is a plain computation that stays in the input's dtype, as a user would write it. An implementation may err
twice as much, plus the rounding of the result itself and of float32 scores: a score s is known to `eps * |s|`, and an
error d in a score moves the result by up to `d * |value|`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ropewalk.maps import PositionMap
from ropewalk.ops import Rotary, attention


def truth(query: Tensor, key: Tensor, value: Tensor, position_map: PositionMap, rotary: Rotary | None) -> Tensor:
    """The specification in float64, for queries that are the last of the keys."""
    return attention(query.double(), key.double(), value.double(), position_map, rotary, impl="reference")


def same_dtype(query: Tensor, key: Tensor, value: Tensor, position_map: PositionMap, rotary: Rotary | None) -> Tensor:
    """Attention as plain PyTorch code computes it in the input's dtype: products, rotation and result are rounded."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    keys = key.shape[2]
    tokens = torch.arange(keys, device=query.device)
    query_tokens = tokens[keys - query.shape[2] :]
    scores = torch.full((query.shape[2], keys), -torch.inf, dtype=query.dtype, device=query.device)
    for band in position_map.bands:
        rotated = []
        for x, function, at in ((query, band.query_positions, query_tokens), (key, band.key_positions, tokens)):
            if rotary is not None:
                angles = rotary.angles(function, at)
                x = rotary.rotate(x, angles.cos().to(x.dtype), angles.sin().to(x.dtype))
            rotated.append(x)
        inside = band.sees(query_tokens[:, None], tokens)
        scores = torch.where(inside, rotated[0] @ rotated[1].transpose(-1, -2) * query.shape[-1] ** -0.5, scores)
    return torch.softmax(scores.float(), dim=-1).to(value.dtype) @ value


def within_budget(
    output: Tensor, query: Tensor, key: Tensor, value: Tensor, position_map: PositionMap, rotary: Rotary | None
) -> str | None:
    """None if the output meets the budget, largest and mean error both; otherwise what is over it.

    For maps with `start` = 0, whose queries all have the same bands.
    """
    exact = truth(query, key, value, position_map, rotary)
    allowed = (same_dtype(query, key, value, position_map, rotary).double() - exact).abs()
    error = (output.double() - exact).abs()
    largest_score = query.double().norm(dim=-1).max() * key.double().norm(dim=-1).max() * query.shape[-1] ** -0.5
    rounding = torch.finfo(query.dtype).eps * exact.abs().max()
    rounding += torch.finfo(torch.float32).eps * largest_score * value.abs().max().double()
    for name, measured, yardstick in (
        ("largest", error.max(), allowed.max()),
        ("mean", error.mean(), allowed.mean()),
    ):
        budget = 2 * (yardstick + rounding)
        if not measured <= budget:  # also catches NaN
            return f"{name} error {measured:.3g} is over the budget of {budget:.3g}"
    return None
