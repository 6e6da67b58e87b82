# SPDX-License-Identifier: Apache-2.0
"""The specification: attention under a position map as the formula says it, in float32, holding the whole matrix.

Takes every call there is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from ropewalk.maps.base import EVERYTHING, Band
from ropewalk.maps.positions import PositionFunction
from ropewalk.ops.call import LARGEST_SINK, Call, Pages, Positions


def lacks(call: Call) -> str | None:
    """Nothing."""
    return None


def attend(call: Call) -> Tensor:
    """See `ropewalk.ops.attention`. Computes in float32, or float64 for float64 queries."""
    if call.pages is not None:
        output = call.query.new_zeros((*call.query.shape[:3], call.value.shape[3]))
        for place, text in _texts(call):
            output[:, :, place] = attend(text)
        return output
    if call.head_maps is not None:
        heads = call.query.shape[1] // call.key.shape[1]
        return torch.cat([attend(_one_head(call, head, heads)) for head in range(call.key.shape[1])], dim=1)

    value = call.value.to(torch.promote_types(call.query.dtype, torch.float32))
    value = value if call.value_scale is None else value * call.value_scale.to(value.dtype)
    value = value.repeat_interleave(call.query.shape[1] // call.key.shape[1], dim=1)
    return (weights(call) @ value).to(call.query.dtype)


def weights(call: Call) -> Tensor:
    """The weights of a call without layout, pages and maps by head: float32, or float64 for float64 queries, (batch,
    heads, queries, keys)."""
    dtype = torch.promote_types(call.query.dtype, torch.float32)
    groups = call.query.shape[1] // call.key.shape[1]
    query, key = call.query.to(dtype), call.key.to(dtype)
    key = key if call.key_scale is None else key * call.key_scale.to(dtype)
    key = key.repeat_interleave(groups, dim=1)

    slots = torch.arange(key.shape[2], device=query.device)
    past_or_present = slots <= slots[call.past :, None]
    at = call.positions or Positions(slots[None, call.past :], slots[None])
    # One axis is the first of its kind.
    queries, keys = (x if x.ndim == 3 else x[..., None] for x in (at.queries, at.keys))
    axis_of_pair = at.axis_of_pair
    if axis_of_pair is None:
        axis_of_pair = torch.zeros(call.rotary.pairs, dtype=torch.int64, device=query.device)

    def scores(band: Band, axis: int) -> Tensor:
        """The part of the scores that the pairs of an axis make, at a band's positions."""

        def rotated(x: Tensor, function: PositionFunction, tokens: Tensor) -> Tensor:
            angles = call.rotary.angles(function, tokens)[:, None]
            x = call.rotary.rotate(x, angles.cos().to(x.dtype), angles.sin().to(x.dtype))
            return torch.cat([half[..., axis_of_pair == axis] for half in call.rotary.halves(x)], dim=-1)

        turned_query = rotated(query, band.query_positions, queries[..., axis])
        return turned_query @ rotated(key, band.key_positions, keys[..., axis]).mT

    first, pairs = call.rotary.offset, call.rotary.dim
    rest = [torch.cat((x[..., :first], x[..., first + pairs :]), dim=-1) for x in (query, key)]
    products = rest[0] @ rest[1].mT
    m, n = queries[:, None, :, None], keys[:, None, None]  # (batch or 1, 1, queries, 1, axes) and (..., 1, keys, axes)
    before_start = m[..., 0] < call.position_map.start
    ahead = n > m if queries.shape[2] > 1 else torch.zeros_like(n, dtype=torch.bool)
    seen = past_or_present & (before_start | ahead[..., 0])
    distance = (m - n)[..., 0].to(dtype)
    for axis in range(queries.shape[2]):
        product = scores(EVERYTHING, axis)
        for band in call.position_map.bands:
            inside = band.sees(m[..., axis], n[..., axis]) & ~ahead[..., axis] & ~before_start
            product = torch.where(inside, scores(band, axis), product)
            if axis == 0:
                seen = seen | (inside & past_or_present)
                if call.slopes is not None:
                    mapped = band.query_positions(m[..., 0]) - band.key_positions(n[..., 0])
                    distance = torch.where(inside, mapped.to(dtype), distance)
        products = products + product
    logits = products * call.scale
    if call.slopes is not None:
        logits = logits - call.slopes.to(dtype)[:, None, None] * distance
    if call.softcap is not None:
        logits = call.softcap * torch.tanh(logits / call.softcap)
    logits = logits.masked_fill(~seen, -torch.inf)
    sinks = torch.full(query.shape[1:2], -torch.inf, device=query.device) if call.sinks is None else call.sinks
    sinks = sinks.to(dtype).clamp(max=LARGEST_SINK)[:, None, None].expand(*logits.shape[:3], 1)
    return torch.softmax(torch.cat((logits, sinks), dim=-1), dim=-1)[..., :-1]


def _texts(call: Call) -> Iterator[tuple[slice, Call]]:
    """The texts of a call with pages, each as a call of its own, and its queries among all."""
    assert call.pages is not None
    starts, lengths, page = call.pages.query_starts.tolist(), call.pages.lengths.tolist(), call.key.shape[2]
    _check_pages(call.pages, starts, lengths, call)

    def gathered(x: Tensor, pages: Tensor, tokens: int) -> Tensor:
        return x[pages].transpose(0, 1).flatten(1, 2)[None, :, :tokens]

    for text, tokens in enumerate(lengths):
        queries = slice(starts[text], starts[text + 1])
        if queries.start == queries.stop:
            continue
        pages = call.pages.table[text, : -(-tokens // page)].long()
        scales = [
            None if scale is None else gathered(scale.expand(x.shape), pages, tokens)
            for scale, x in ((call.key_scale, call.key), (call.value_scale, call.value))
        ]
        dense = replace(
            call,
            query=call.query[:, :, queries],
            key=gathered(call.key, pages, tokens),
            value=gathered(call.value, pages, tokens),
            pages=None,
            key_scale=scales[0],
            value_scale=scales[1],
        )
        [(_, part)] = dense.parts()
        yield queries, part


def _check_pages(pages: Pages, starts: list[int], lengths: list[int], call: Call) -> None:
    """Raises ValueError: the numbers of pages do not fit, which kernels cannot look at."""
    (stored, _, page), queries = call.key.shape[:3], call.query.shape[2]
    if starts[0] != 0 or starts[-1] != queries or any(before > after for before, after in pairwise(starts)):
        raise ValueError(f"attention: query_starts must go from 0 to the {queries} queries, got {starts}")
    for text, (first, end) in enumerate(pairwise(starts)):
        table = pages.table[text, : -(-lengths[text] // page)]
        if not end - first <= lengths[text] <= pages.table.shape[1] * page:
            raise ValueError(
                f"attention: text {text} has {lengths[text]} tokens, which must hold its {end - first} queries and lie "
                f"in its {pages.table.shape[1]} pages of {page}"
            )
        if end > first and not ((table >= 0) & (table < stored)).all():
            raise ValueError(f"attention: text {text} has pages {table.tolist()}, and there are {stored}")


def _one_head(call: Call, head: int, heads: int) -> Call:
    """The heads that share one key head."""
    assert call.head_maps is not None
    queries, keys = slice(head * heads, (head + 1) * heads), slice(head, head + 1)
    return replace(
        call,
        query=call.query[:, queries],
        key=call.key[:, keys],
        value=call.value[:, keys],
        position_map=call.head_maps[head],
        head_maps=None,
        sinks=None if call.sinks is None else call.sinks[queries],
        slopes=None if call.slopes is None else call.slopes[queries],
        key_scale=None if call.key_scale is None else call.key_scale.expand(call.key.shape)[:, keys],
        value_scale=None if call.value_scale is None else call.value_scale.expand(call.value.shape)[:, keys],
    )
