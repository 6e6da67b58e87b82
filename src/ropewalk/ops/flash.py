# SPDX-License-Identifier: Apache-2.0
"""Attention under a position map from one pass a band, merged by log-sum-exp: costs about what plain attention does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ropewalk.maps import Band
from ropewalk.maps.edges import Edge
from ropewalk.ops import windowed
from ropewalk.ops.call import LARGEST_SINK, Call
from ropewalk.ops.rotary import band_keys, rerotated

# Keys of a single query that are turned and seen at a time, so that they pass through a processor's cache.
_KEYS_PER_PIECE = 2048


def lacks(call: Call) -> str | None:
    """What this call needs that `attend` does not have; None if it has all."""
    if call.softcap is not None:
        return "softcap"
    if call.needs_gradients:
        return "gradients (torch.inference_mode() turns them off)"
    return call.extra() or windowed.unsupported(call.query, call.key, call.value)


def attend(call: Call) -> Tensor:
    """See `ropewalk.ops.attention`."""
    dtype = torch.promote_types(call.query.dtype, torch.float32)
    output = call.query.new_empty((*call.query.shape[:3], call.value.shape[3]), dtype=dtype)
    lse = call.query.new_empty(call.query.shape[:3], dtype=dtype)
    for first, stop, bands in call.position_map.bands_by_query(call.past, call.key.shape[2]):
        for band in bands:
            for strip in _strips(band, first, stop, call):
                queries = slice(strip.first - call.past, strip.stop - call.past)
                part, part_lse = strip.attend(call, band)
                if band is bands[0] and strip.is_first:
                    # The nearest band holds every query's own key.
                    output[:, :, queries], lse[:, :, queries] = part, part_lse
                else:
                    output[:, :, queries], lse[:, :, queries] = windowed.merge(
                        output[:, :, queries], lse[:, :, queries], part, part_lse
                    )
    if call.sinks is not None:
        sinks = call.sinks.to(lse.dtype).clamp(max=LARGEST_SINK)
        output *= torch.sigmoid(lse - sinks[:, None])[..., None]
    return output.to(call.query.dtype)


@dataclass(frozen=True)
class _Strip:
    """Queries `first .. stop - 1`, all of which see some of the keys `low .. high - 1` of a band.

    Args:
        is_causal: the last query sees them all and each one before it one fewer at the end; else every query sees all.
        window: with `is_causal`, keys that a query sees at most; None for all from `low` on.
        flipped: counted from the end: the first query sees all, each one after it one fewer at the beginning.
    """

    first: int
    stop: int
    low: int
    high: int
    is_causal: bool = False
    window: int | None = None
    flipped: bool = False
    # Of the strips that hold these queries.
    is_first: bool = True

    def attend(self, call: Call, band: Band) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp of these queries over these keys."""
        queries = call.query[:, :, self.first - call.past : self.stop - call.past]
        query = rerotated(queries, band.query_positions, self.first, call.rotary)
        key = band_keys(call.key, band, self.low, self.high, call.rotary, call.far_keys)
        value = call.value[:, :, self.low : self.high]
        if self.flipped:
            flipped = windowed.causal(query.flip(2), key.flip(2), value.flip(2), call.scale, None)
            return flipped[0].flip(2), flipped[1].flip(2)
        if self.is_causal:
            return windowed.causal(query, key, value, call.scale, self.window)
        return windowed.full(query, key, value, call.scale)


def _strips(band: Band, first: int, stop: int, call: Call) -> Iterator[_Strip]:
    """The queries `first .. stop - 1` as far as they see keys of the band, each in one strip, or, where there is only
    one, in as many as there are pieces of its keys."""
    if stop - first == 1:
        low, high = band.low(first), min(band.high(first), stop)
        pieced = call.query.device.type == "cpu" and call.far_keys is None and not band.is_true
        step = _KEYS_PER_PIECE if pieced else max(high - low, 1)
        for begin in range(low, high, step):
            yield _Strip(first, stop, begin, min(begin + step, high), is_first=begin == low)
        return
    if band.distances is not None:
        first = max(first, band.first_query)
        window = None if band.low.is_beginning else band.low.back - band.high.back
        if first < stop and window != 0:
            yield _Strip(first, stop, band.low(first), band.high(stop - 1), True, window)
        return
    cuts = {first, stop, *_cuts(band.low, first, stop), *_cuts(band.high, first, stop)}
    for begin, end in pairwise(sorted(cuts)):
        # Within a strip an edge stands still, or moves on by one key a query.
        (low, last_low), (high, last_high) = ((edge(begin), edge(end - 1)) for edge in (band.low, band.high))
        if low == last_low and high == last_high:
            if low < high:
                yield _Strip(begin, end, low, high)
        elif low == last_low:
            begin += max(low + 1 - high, 0)
            if begin < end:
                yield _Strip(begin, end, low, last_high, True)
        elif high == last_high:
            end -= max(last_low + 1 - high, 0)
            if begin < end:
                yield _Strip(begin, end, low, high, flipped=True)
        elif low < high:
            yield _Strip(begin, end, low, last_high, True, high - low)


def _cuts(edge: Edge, first: int, stop: int) -> Iterator[int]:
    """Queries between `first` and `stop` at which the edge begins or ends to move by one key a query, or jumps."""
    if edge.is_beginning:
        return
    end = stop if edge.cap is None else min(stop, edge.reaches(edge.cap) + 1)
    if edge.block == 1:
        yield from (cut for cut in (edge.back, end) if first < cut < stop)
    else:
        # The first jump, from key 0, then one a block, the last one to the cap.
        jumps = max(edge.back + edge.block, first + (edge.back - first) % edge.block)
        yield from (cut for cut in range(jumps, end, edge.block) if first < cut < stop)
