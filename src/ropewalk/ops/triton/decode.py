# SPDX-License-Identifier: Apache-2.0
"""Decode attention under a position map: one query a row, every key and value read once, re-rotated in registers.

Split-KV: the keys of a row are dealt out to as many programs as fill the device, and a second kernel merges what they
found. A key of band i is re-rotated by `phase(b_i(n)) - phase(n)` and the query by `phase(a_i(m)) - phase(m)`, so the
cache stays as the model wrote it. Lengths and padding are read on the device: nothing about a launch depends on them,
and a CUDA graph over a static cache replays at any length.
"""

# mypy: disable-error-code="no-any-return", disallow-untyped-decorators=False

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import count
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ropewalk.maps import PositionMap
from ropewalk.ops.call import Call
from ropewalk.ops.layout import Step
from ropewalk.ops.rotary import Rotary
from ropewalk.ops.triton.launch import Launch, multiples_of_16
from ropewalk.ops.triton.primitives import (
    COLUMNS,
    INTERPRETED,
    NO_END,
    band_keys,
    in_powers_of_2,
    load_pairs,
    load_rest,
    load_sink,
    mapped,
    rerotate,
    softcapped,
    softmax_step,
)
from ropewalk.ops.triton.tables import BandTable, make_table
from ropewalk.ops.triton.tuned import tuned


@dataclass(frozen=True)
class Config:
    """What is tuned for a device.

    Args:
        block_keys: keys a program reads at a time.
        warps: of a program.
        stages: blocks of keys in flight, the one in use included.
        programs: that a multiprocessor is to run at the same time.
        registers: of a thread, at most; None leaves it to the compiler.
    """

    block_keys: int = 64
    warps: int = 4
    stages: int = 3
    programs: int = 2
    registers: int | None = None


def attend(call: Call, step: Step, config: Config | None = None) -> Tensor:
    """Attention of one query a row to the tokens before it and itself.

    Args:
        call: query (batch, heads, 1, head_dim), bfloat16, float16 or float32; key and value (batch, key heads, slots,
            head_dim), same dtype; any strides but the last, which is 1. Its layout and query scaling are not looked at.
        step: the slots that each row's query sees; others are never read. A row without slots gives zeros.
        config: tuning; by default what is known to be good.

    Returns:
        (batch, heads, 1, head_dim), in the query's dtype. The same call gives the same bits.

    Raises:
        RuntimeError: a CUDA graph is being captured and the map's table for so many slots is not yet made; a call
            before the capture makes it.
    """
    query, key, value, sinks = call.query, call.key, call.value, call.sinks
    batch, heads, _, head_dim = query.shape
    key_heads, slots = key.shape[1:3]
    strides = (*query.stride()[:2], *key.stride()[:3], *value.stride()[:3])
    kind = (
        call.position_map,
        1 << max(12, (slots - 1).bit_length()),
        (batch, key_heads, heads // key_heads, head_dim),
        query.dtype,
        query.device,
        config,
        multiples_of_16(strides),
        call.softcap is not None,
        # What else needs launches of its own.
        *[x.data_ptr() % 16 == 0 for x in (query, key, value)],
        *[None if x is None else x.dtype for x in (step.lengths, step.first_slots, sinks, call.slopes)],
    )
    plan = call.rotary.tables.get(kind, _make_plan, call.rotary)
    splits = min(plan.splits, -(-slots // plan.block_keys))
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    partials = torch.empty(batch * heads * splits * (head_dim + 1), dtype=torch.float32, device=query.device)
    with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]
        plan.attend[splits, key_heads, batch](
            query,
            key,
            value,
            partials,
            *plan.tensors,
            step.lengths,
            step.first_slots,
            call.slopes,
            slots,
            *plan.numbers,
            *in_powers_of_2(call.scale, call.softcap),
            1 / call.scale,
            *strides,
            *plan.attend.constants,
        )
        plan.merge[heads, batch, 1](partials, sinks, output, splits, *plan.merge.constants)
    return output


@dataclass(frozen=True, eq=False)
class _Plan:
    """What all steps of one kind have in common: a step has microseconds to spare on the host."""

    splits: int
    block_keys: int
    tensors: tuple[Tensor, ...]
    numbers: tuple[int, ...]
    attend: Launch
    merge: Launch


def _make_plan(kind: tuple[Any, ...], rotary: Rotary) -> _Plan:
    position_map, capacity, shape, dtype, device, config, aligned, has_softcap, *_ = kind
    batch, key_heads, groups, head_dim = shape
    config = config or default_config(head_dim, dtype, device)
    table = rotary.tables.get((position_map, capacity, device), _make_table)
    bands = table.bands.shape[0]
    splits = _splits(batch * key_heads, config.programs * _multiprocessors(device))
    overlap = _overlaps(device)
    # Programmatic dependent launch: a kernel is put on the device while the one before it ends, and waits where it
    # first needs what others write.
    early = {"launch_pdl": True} if overlap else {}
    return _Plan(
        splits=splits,
        block_keys=config.block_keys,
        tensors=(table.bands, table.positions, rotary.frequencies(device) if rotary.pairs else table.positions),
        numbers=(bands, table.capacity, min(position_map.start, NO_END.value)),
        attend=Launch(
            _partials_kernel,
            {
                "head_dim": head_dim,
                "pairs": rotary.pairs,
                "offset": rotary.offset,
                "interleaved": rotary.interleaved,
                "groups": groups,
                "block_keys": config.block_keys,
                "block_bands": 1 << (bands - 1).bit_length(),
                "diagonal": table.is_diagonal,
                "has_softcap": has_softcap,
                # The interpreter has no fast sine; float32 wants the exact one.
                "fast_sine": not INTERPRETED and dtype != torch.float32,
                "aligned": aligned,
                "overlap": overlap,
            },
            {
                **early,
                "num_warps": config.warps,
                "num_stages": config.stages,
                "maxnreg": config.registers,
                # A phase is a product rounded to float32, as the model rounds it: it must not melt into the next
                # addition.
                "enable_fp_fusion": False,
            },
        ),
        merge=Launch(
            _merge_kernel,
            {"head_dim": head_dim, "block_splits": min(64, 1 << (splits - 1).bit_length()), "overlap": overlap},
            early,
        ),
    )


@cache
def default_config(head_dim: int, dtype: torch.dtype, device: torch.device) -> Config:
    """What was measured best on this GPU, or what is sound and fits it."""
    return Config(**tuned("decode", head_dim, dtype.itemsize, device))


def _make_table(kind: tuple[PositionMap, int, torch.device]) -> BandTable:
    """A map's table that no graph takes the memory back from. Capacities are powers of two, so all of a map's together
    hold less than twice what the largest does."""
    position_map, capacity, device = kind
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"decode: a CUDA graph is being captured, but the tables of {position_map} for {capacity} slots are not "
            "yet made; call decode once with these tensors before the capture"
        )
    # In a thread of its own, for memory of its own: what this one allocates while torch.compile warms a CUDA graph up
    # belongs to the graph, which reuses it.
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(make_table, position_map.bands, capacity, device).result()


@cache
def _overlaps(device: torch.device) -> bool:
    """Whether the device has programmatic dependent launch."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # the interpreter's, enough to split what tests give it
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _splits(rows: int, programs: int) -> int:
    """Programs a row of keys is dealt out to: as many as run at once or, where rows alone do not go into that evenly,
    so many that the last round of programs is not much emptier than the others."""

    def fullness(splits: int) -> float:
        return rows * splits / (math.ceil(rows * splits / programs) * programs)

    return next(splits for splits in count(max(1, programs // rows)) if fullness(splits) >= 0.9)


_NUMBERS = ["slots", "bands", "capacity", "start", "query_batch", "query_head", "key_batch", "key_head", "key_slot",
            "value_batch", "value_head", "value_slot"]  # fmt: skip


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=["lengths", "first_slots", "slopes"])
def _partials_kernel(
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    partials: tl.tensor,
    band_table: tl.tensor,
    positions: tl.tensor,
    frequencies: tl.tensor,
    lengths: tl.tensor,
    first_slots: tl.tensor,
    slopes: tl.tensor | None,
    slots: tl.int32,
    bands: tl.int32,
    capacity: tl.int32,
    start: tl.int32,
    scale: float,
    cap_scale: float,
    cap: float,
    slope_scale: float,
    query_batch: tl.int64,
    query_head: tl.int64,
    key_batch: tl.int64,
    key_head: tl.int64,
    key_slot: tl.int32,
    value_batch: tl.int64,
    value_head: tl.int64,
    value_slot: tl.int32,
    head_dim: tl.constexpr,
    pairs: tl.constexpr,
    offset: tl.constexpr,
    interleaved: tl.constexpr,
    groups: tl.constexpr,
    block_keys: tl.constexpr,
    block_bands: tl.constexpr,
    diagonal: tl.constexpr,
    has_softcap: tl.constexpr,
    fast_sine: tl.constexpr,
    aligned: tl.constexpr,
    overlap: tl.constexpr,
) -> None:
    """One program: a share of the keys of one key head, for the queries that share them.

    Writes to partials (batch, heads, splits, head_dim) the softmax-weighted mean of its values, and behind them (batch,
    heads, splits) the base-2 logarithm of the weights' sum; zeros and -inf where its share is empty.
    """
    if aligned:
        # Says what is known of the strides, so that sixteen bytes are read at a time.
        query_batch, query_head = query_batch // 16 * 16, query_head // 16 * 16
        key_batch, key_head, key_slot = key_batch // 16 * 16, key_head // 16 * 16, key_slot // 16 * 16
        value_batch, value_head, value_slot = value_batch // 16 * 16, value_head // 16 * 16, value_slot // 16 * 16
    # A product of matrices takes 16 rows and 16 terms at least.
    block_rows: tl.constexpr = max(16, triton.next_power_of_2(groups))
    block_dim: tl.constexpr = max(16, triton.next_power_of_2(head_dim))
    split, splits = tl.program_id(0), tl.num_programs(0)
    kv_head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)

    if overlap and (lengths is not None or first_slots is not None):
        gdc_wait()
    length = slots
    if lengths is not None:
        length = tl.minimum(tl.load(lengths + row).to(tl.int32), slots)
    first_slot = 0
    if first_slots is not None:
        first_slot = tl.load(first_slots + row).to(tl.int32)
    token = tl.maximum(length - 1 - first_slot, 0)  # the query's true position
    unmapped = token < start

    # Tiles are counted from the beginning of each band's slots, so that each lies in one band, and dealt out evenly.
    every_begin, every_end = _band_slots(
        band_table, tl.arange(0, block_bands), bands, length, first_slot, unmapped, diagonal
    )  # (block_bands,)
    tiles = tl.sum(tl.cdiv(tl.maximum(every_end - every_begin, 0), block_keys))
    share = tl.cdiv(tiles, splits)
    share_begin = split * share
    share_end = tl.minimum(share_begin + share, tiles)

    if overlap:
        # Until here only the map's tables were read, which no kernel writes.
        gdc_wait()
    # The queries that share the key head, (block_rows, pairs) twice and (block_rows, other dimensions).
    rows = tl.arange(0, block_rows)
    heads = kv_head * groups + rows
    is_query = rows < groups
    queries = query + row * query_batch
    if pairs > 0:
        pair = tl.arange(0, max(16, triton.next_power_of_2(pairs)))
        frequency = tl.load(frequencies + pair, mask=pair < pairs, other=0.0)[None, :]  # (1, pairs)
        query_first, query_second = load_pairs(queries, heads * query_head, is_query, pairs, offset, interleaved)
        query_first, query_second = query_first.to(tl.float32), query_second.to(tl.float32)
    if head_dim > 2 * pairs:
        query_rest = load_rest(queries, heads * query_head, is_query, head_dim, pairs, offset)

    if slopes is not None:
        slope = tl.load(slopes + heads, mask=is_query, other=0.0).to(tl.float32) * slope_scale  # (block_rows,)

    offsets = tl.arange(0, block_keys)
    dims = tl.arange(0, block_dim)
    keys = key + row * key_batch + kv_head * key_head
    values = value + row * value_batch + kv_head * value_head
    accumulated = tl.zeros([block_rows, block_dim], tl.float32)
    # Summed over the keys at the end alone: threads then need not meet in every tile.
    weights = tl.zeros([block_rows, block_keys], tl.float32)
    largest = tl.full([block_rows], float("-inf"), tl.float32)
    tiles_before = 0
    for band in range(bands):
        band_begin, band_end = _band_slots(band_table, band, bands, length, first_slot, unmapped, diagonal)
        band_tiles = tl.cdiv(tl.maximum(band_end - band_begin, 0), block_keys)
        begin = tl.maximum(share_begin - tiles_before, 0)
        end = tl.minimum(share_end - tiles_before, band_tiles)
        tiles_before += band_tiles
        if begin < end:
            if pairs > 0 or slopes is not None:
                numbers = band_table + COLUMNS * band
                key_inverse = tl.where(unmapped, 1.0, tl.load(numbers + 8).to(tl.float32, bitcast=True))
                key_shift = tl.where(unmapped, 0, tl.load(numbers + 9))
                query_inverse = tl.where(unmapped, 1.0, tl.load(numbers + 6).to(tl.float32, bitcast=True))
                query_shift = tl.where(unmapped, 0, tl.load(numbers + 7))
                at = mapped(token, query_inverse, query_shift, positions, capacity, token >= 0)
            if pairs > 0:
                rerotated_first, rerotated_second = rerotate(
                    query_first,
                    query_second,
                    at,
                    token.to(tl.float32),
                    frequency,
                    fast_sine,
                )
                rerotated_first = rerotated_first.to(query.dtype.element_ty)
                rerotated_second = rerotated_second.to(query.dtype.element_ty)
            for tile in range(begin, end):
                slot = band_begin + tile * block_keys
                inside = slot + offsets < band_end  # (block_keys,)
                tile_keys = keys + slot.to(tl.int64) * key_slot
                scores = tl.zeros([block_rows, block_keys], tl.float32)
                if pairs > 0 or slopes is not None:
                    tokens = slot - first_slot + offsets  # (block_keys,), true positions
                    to = mapped(tokens, key_inverse, key_shift, positions, capacity, inside)  # (block_keys,)
                if pairs > 0:
                    first, second = load_pairs(
                        tile_keys, offsets * key_slot, inside, pairs, offset, interleaved
                    )  # (block_keys, pairs) each
                    first, second = rerotate(
                        first.to(tl.float32),
                        second.to(tl.float32),
                        to[:, None],
                        tokens.to(tl.float32)[:, None],
                        frequency,
                        fast_sine,
                    )
                    first, second = first.to(key.dtype.element_ty), second.to(key.dtype.element_ty)
                    scores = tl.dot(rerotated_first, tl.trans(first), scores, input_precision="ieee")
                    scores = tl.dot(rerotated_second, tl.trans(second), scores, input_precision="ieee")
                if head_dim > 2 * pairs:
                    rest = load_rest(
                        tile_keys, offsets * key_slot, inside, head_dim, pairs, offset
                    )  # (block_keys, others)
                    scores = tl.dot(query_rest, tl.trans(rest), scores, input_precision="ieee")
                if slopes is not None:
                    scores += slope[:, None] * (to[None, :] - at)
                if has_softcap:
                    scores = softcapped(scores, cap, cap_scale)
                scores = tl.where(inside[None, :], scores, float("-inf"))
                # Every tile holds a key that is seen: after the first one the largest score is finite.
                probabilities, fade, largest = softmax_step(scores, scale, largest, False)
                fade = fade[:, None]
                weights = tl.fma(weights, tl.broadcast_to(fade, weights.shape), probabilities)
                # Unseen values may be anything, NaN included, which a probability of zero would not silence.
                tile_values = tl.load(
                    values + slot.to(tl.int64) * value_slot + offsets[:, None] * value_slot + dims[None, :],
                    mask=inside[:, None] & (dims < head_dim)[None, :],
                    other=0.0,
                )  # (block_keys, block_dim)
                probabilities = probabilities.to(value.dtype.element_ty)
                accumulated = tl.dot(probabilities, tile_values, accumulated * fade, input_precision="ieee")

    if overlap:
        gdc_launch_dependents()
    total = tl.sum(weights, 1)
    total = tl.where(total > 0, total, 1.0)
    at = (row * tl.num_programs(1) * groups + heads) * splits + split  # (block_rows,)
    lse = partials + tl.num_programs(2).to(tl.int64) * tl.num_programs(1) * groups * splits * head_dim
    tl.store(lse + at, largest + tl.log2(total), mask=is_query)
    tl.store(
        partials + at[:, None] * head_dim + dims[None, :],
        accumulated / total[:, None],
        mask=is_query[:, None] & (dims < head_dim)[None, :],
    )


@triton.jit(do_not_specialize=["splits"], do_not_specialize_on_alignment=["sinks"])
def _merge_kernel(
    partials: tl.tensor,
    sinks: tl.tensor,
    output: tl.tensor,
    splits: tl.int32,
    head_dim: tl.constexpr,
    block_splits: tl.constexpr,
    overlap: tl.constexpr,
) -> None:
    """One program: one head's output (batch, heads, 1, head_dim) from what the splits found, always in their order."""
    if overlap:
        gdc_launch_dependents()
        gdc_wait()
    lse = partials + tl.num_programs(1).to(tl.int64) * tl.num_programs(0) * splits * head_dim
    head = tl.program_id(0)
    at = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + head
    dims = tl.arange(0, triton.next_power_of_2(head_dim))
    merged = tl.zeros([triton.next_power_of_2(head_dim)], tl.float32)
    largest = float("-inf")
    total = 0.0
    if sinks is not None:
        largest = load_sink(sinks, head)
        total = 1.0
    for begin in range(0, splits, block_splits):
        split = begin + tl.arange(0, block_splits)
        exists = split < splits
        sizes = tl.load(lse + at * splits + split, mask=exists, other=float("-inf"))  # (block_splits,)
        parts = tl.load(
            partials + (at * splits + split)[:, None] * head_dim + dims[None, :],
            mask=exists[:, None] & (dims < head_dim)[None, :],
            other=0.0,
        )  # (block_splits, block_dim)
        new_largest = tl.maximum(largest, tl.max(sizes, 0))
        # Where nothing is seen, all is -inf, and so would be its difference from itself.
        reference = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        fade = tl.exp2(largest - reference)
        weights = tl.exp2(sizes - reference)
        total = total * fade + tl.sum(weights, 0)
        merged = merged * fade + tl.sum(weights[:, None] * parts, 0)
        largest = new_largest
    merged = merged / tl.where(total > 0, total, 1.0)
    tl.store(output + at * head_dim + dims, merged.to(output.dtype.element_ty), mask=dims < head_dim)


@triton.jit
def _band_slots(
    band_table: tl.tensor,
    band: tl.tensor,
    bands: tl.tensor,
    length: tl.tensor,
    first_slot: tl.tensor,
    unmapped: tl.tensor,
    diagonal: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """First slot and end of what the last of a row's tokens sees through a band, or through each of a vector of bands.

    A query before the map's start sees all there is through the first one.
    """
    token = tl.maximum(length - 1 - first_slot, 0)
    low, high = band_keys(band_table, band, band < bands, token, diagonal)
    low = tl.where(unmapped, 0, low)
    high = tl.where(unmapped, tl.where(band == 0, token + 1, 0), high)
    return first_slot + low, tl.minimum(first_slot + high, length)
