"""Attention under a position map from one pass a band, merged by log-sum-exp: costs about what plain attention does."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from ropewalk.maps import Band, PositionMap
from ropewalk.ops.rotary import Rotary, band_keys, moved
from ropewalk.ops.windowed import causal, merge

_KEYS_PER_PIECE = 2048


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position_map: PositionMap,
    rotary: Rotary | None,
    scale: float,
    sinks: Tensor | None = None,
    far_keys: Tensor | None = None,
) -> Tensor:
    """Attention of one span: queries are the last of the keys."""
    past = key.shape[2] - query.shape[2]
    parts = []
    for first, stop, bands in position_map.bands_by_query(past, key.shape[2]):
        run = (query[:, :, first - past : stop - past], key[:, :, :stop], value[:, :, :stop])
        parts.append(_attend_bands(*run, bands, rotary, scale, sinks, far_keys))
    return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]


def _attend_bands(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bands: tuple[Band, ...],
    rotary: Rotary | None,
    scale: float,
    sinks: Tensor | None,
    far_keys: Tensor | None = None,
) -> Tensor:
    """One pass a band. The nearest band holds every query's own key, so the first pass covers every query."""
    past = key.shape[2] - query.shape[2]
    if far_keys is None and query.shape[2] == 1 and query.device.type == "cpu":
        bands = tuple(piece for band in bands for piece in _pieces(band, key.shape[2]))
    output = lse = None
    for band in bands:
        # A band is a causal problem between the queries from `first` on and the keys up to `first` before the last.
        skipped = max(band.first - past, 0)
        end = key.shape[2] - band.first
        if skipped >= query.shape[2]:
            break
        window = None if band.stop is None else band.stop - band.first
        begin = 0 if window is None else max(end - (query.shape[2] - skipped) - window + 1, 0)
        part, part_lse = causal(
            moved(query[:, :, skipped:], band.query_positions, past + skipped, rotary),
            band_keys(key, band, begin, end, rotary, far_keys),
            value[:, :, begin:end],
            scale,
            window,
        )
        if output is None or lse is None:
            output, lse = part, part_lse
        elif not skipped:
            output, lse = merge(output, lse, part, part_lse)
        else:
            output = output.float()
            output[:, :, skipped:], lse[:, :, skipped:] = merge(
                output[:, :, skipped:], lse[:, :, skipped:], part, part_lse
            )
    assert output is not None
    assert lse is not None
    if sinks is not None:
        output = output * torch.sigmoid(lse - sinks.to(lse.dtype)[:, None])[..., None]
    return output.to(query.dtype)


def _pieces(band: Band, keys: int) -> list[Band]:
    """The band of a single query, cut into pieces whose re-rotated keys fit a processor's cache."""
    if band.is_true:
        return [band]
    stop = keys if band.stop is None else min(band.stop, keys)
    edges = [*range(band.first, stop, _KEYS_PER_PIECE), stop]
    return [replace(band, first=first, stop=last) for first, last in pairwise(edges)]
