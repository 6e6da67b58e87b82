# SPDX-License-Identifier: Apache-2.0
"""Attention to narrow bands, all of them in one launch, added to attention over the others; for prefill.

Such a band is a diagonal strip: of 48 to 532 keys in SELF by distance. A tile of 128 queries would take 127 keys more
than a query sees; so the rows of a tile are all heads that share a key head at a few consecutive positions. A program
takes its rows through one band after another, with one softmax that goes on from what the other bands gave. The keys
are re-rotated before, as each band sees them; the queries are re-rotated in registers.
"""

# mypy: disable-error-code="no-any-return", disallow-untyped-decorators=False

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ropewalk.ops.triton.launch import Launch, multiples_of_16
from ropewalk.ops.triton.narrow_keys import Narrow, in_parts, narrow_keys, prepare, rotation
from ropewalk.ops.triton.primitives import (
    COLUMNS,
    LOG2_E,
    in_powers_of_2,
    load_pairs,
    load_rest,
    rerotate,
    softcapped,
    softmax_step,
)
from ropewalk.ops.triton.tuned import tuned


@dataclass(frozen=True)
class NarrowConfig:
    """How the work is cut. The result depends on it only by rounding.

    Args:
        block_rows: heads times positions of a tile; a power of two, 16 or more.
        block_keys: keys of a tile; a power of two, 16 or more.
        warps: of a program.
        stages: key tiles in flight.
    """

    block_rows: int
    block_keys: int
    warps: int
    stages: int


def default_config(head_dim: int, dtype: torch.dtype, device: torch.device) -> NarrowConfig:
    """The tiles measured best on this GPU, or sound ones that fit it."""
    return NarrowConfig(**tuned("narrow", head_dim, dtype.itemsize, device))


def attend(narrow: Narrow, chunk: int | None = None, config: NarrowConfig | None = None) -> Tensor:
    """`narrow.output`, with the keys of the bands added to it. The same call gives the same bits.

    Args:
        chunk: queries for which keys are re-rotated at a time; by default so many that those keys take 256 MiB.
        config: the tiles, `default_config` by default.
    """
    work = prepare(narrow)
    if work is None:
        return narrow.output
    query, key, value, output, lse = narrow.query, narrow.key, narrow.value, narrow.output, narrow.lse
    head_dim, key_heads, device = query.shape[3], key.shape[1], query.device
    config = config or default_config(head_dim, query.dtype, device)
    groups = query.shape[1] // key_heads
    together = min(int(triton.next_power_of_2(groups)), config.block_rows)
    positions, head_blocks = config.block_rows // together, key_heads * triton.cdiv(groups, together)
    strides = [stride for x in (query, key, value, output) for stride in x.stride()[:3]]
    for part in in_parts(key, work, narrow.rotary, chunk):
        tensors = [x[part.rows] for x in (query, key, value)]
        written = [x[part.rows] for x in (output, lse)]
        launch = _launch(narrow, config, together, positions, multiples_of_16(strides), (*tensors, *written))
        grid = (triton.cdiv(part.end - part.begin, positions), head_blocks, tensors[0].shape[0])
        with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]
            if part.write_keys is not None:
                part.write_keys()
            launch[grid](
                *tensors,
                part.keys,
                *written,
                narrow.slopes,
                work.table.bands,
                work.frequencies,
                work.past,
                part.begin,
                part.end,
                part.chunk,
                part.keys.shape[2],
                len(work.bands),
                groups,
                *in_powers_of_2(narrow.scale, narrow.softcap),
                1 / narrow.scale,
                *strides,
                *lse.stride(),
                *launch.constants,
            )
    return output


def _launch(
    narrow: Narrow, config: NarrowConfig, together: int, positions: int, aligned: bool, tensors: tuple[Tensor, ...]
) -> Launch:
    """Calls that differ in what is looked up here need launches of their own."""
    query, slopes = narrow.query, narrow.slopes
    constants = {
        "head_dim": query.shape[3],
        **rotation(narrow.rotary, query.dtype),
        "heads_together": together,
        "block_positions": positions,
        "block_keys": config.block_keys,
        "stages": config.stages,
        "has_softcap": narrow.softcap is not None,
        "aligned": aligned,
    }
    kinds = (None if slopes is None else slopes.dtype, *(x.data_ptr() % 16 == 0 for x in tensors))
    options = {"num_warps": config.warps, "enable_fp_fusion": False}
    return narrow.rotary.tables.get(
        ("narrow", kinds, tuple(constants.values()), query.dtype, query.device, config.warps),
        lambda _: Launch(_narrow_kernel, constants, options),
    )


_STRIDES = [f"{x}_{of}" for x in ("query", "key", "value", "output", "lse") for of in ("batch", "head", "token")]


@triton.jit(
    do_not_specialize=[*_STRIDES, "past", "begin", "end", "chunk", "slots", "bands", "groups"],
    do_not_specialize_on_alignment=["slopes"],
)
def _narrow_kernel(
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    views: tl.tensor,
    output: tl.tensor,
    lse: tl.tensor,
    slopes: tl.tensor | None,
    band_table: tl.tensor,
    frequencies: tl.tensor,
    past: tl.int32,
    begin: tl.int32,
    end: tl.int32,
    chunk: tl.int32,
    slots: tl.int32,
    bands: tl.int32,
    groups: tl.int32,
    scale: float,
    cap_scale: float,
    cap: float,
    slope_scale: float,
    query_batch: tl.int64,
    query_head: tl.int64,
    query_token: tl.int32,
    key_batch: tl.int64,
    key_head: tl.int64,
    key_token: tl.int32,
    value_batch: tl.int64,
    value_head: tl.int64,
    value_token: tl.int32,
    output_batch: tl.int64,
    output_head: tl.int64,
    output_token: tl.int32,
    lse_batch: tl.int64,
    lse_head: tl.int64,
    lse_token: tl.int32,
    head_dim: tl.constexpr,
    pairs: tl.constexpr,
    offset: tl.constexpr,
    interleaved: tl.constexpr,
    fast_sine: tl.constexpr,
    heads_together: tl.constexpr,
    block_positions: tl.constexpr,
    block_keys: tl.constexpr,
    stages: tl.constexpr,
    has_softcap: tl.constexpr,
    aligned: tl.constexpr,
) -> None:
    """One program: a few of the positions `begin .. end - 1`, all heads that share a key head (or `heads_together` of
    them), through all bands."""
    if aligned:
        # Says what is known of the strides, so that sixteen bytes are read at a time.
        query_batch, query_head, query_token = query_batch // 16 * 16, query_head // 16 * 16, query_token // 16 * 16
        key_batch, key_head, key_token = key_batch // 16 * 16, key_head // 16 * 16, key_token // 16 * 16
        value_batch, value_head, value_token = value_batch // 16 * 16, value_head // 16 * 16, value_token // 16 * 16
        output_batch, output_head = output_batch // 16 * 16, output_head // 16 * 16
        output_token = output_token // 16 * 16
    block_rows: tl.constexpr = heads_together * block_positions
    block_dim: tl.constexpr = max(16, triton.next_power_of_2(head_dim))
    head_blocks = tl.cdiv(groups, heads_together)
    kv_head = (tl.program_id(1) // head_blocks).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    tile_begin = begin + tl.program_id(0) * block_positions
    tile_end = tl.minimum(tile_begin + block_positions, end)

    rows = tl.arange(0, block_rows)
    place = rows % block_positions
    group = tl.program_id(1) % head_blocks * heads_together + rows // block_positions
    heads = kv_head * groups + group
    tokens = tile_begin + place  # (block_rows,), true positions
    present = (group < groups) & (tokens < tile_end)
    tile_query = (tile_begin - past).to(tl.int64)

    queries = query + row * query_batch + tile_query * query_token
    query_offsets = heads * query_head + place * query_token
    if pairs > 0:
        pair = tl.arange(0, max(16, triton.next_power_of_2(pairs)))
        frequency = tl.load(frequencies + pair, mask=pair < pairs, other=0.0)[None, :]  # (1, pairs)
        view_heads = tl.num_programs(1) // head_blocks
        views += (row * view_heads + kv_head) * slots * (2 * pairs)
    if head_dim > 2 * pairs:
        query_rest = load_rest(queries, query_offsets, present, head_dim, pairs, offset)  # (block_rows, others)
    if slopes is not None:
        slope = tl.load(slopes + heads, mask=present, other=0.0).to(tl.float32) * slope_scale  # (block_rows,)
    keys = key + row * key_batch + kv_head * key_head
    values = value + row * value_batch + kv_head * value_head
    offsets = tl.arange(0, block_keys)
    dims = tl.arange(0, block_dim)

    # The softmax goes on where the main pass stopped: as if one key with the value `output` had had the score `lse`.
    # In all of it scores are multiplied by log2(e).
    pointers = output + row * output_batch + tile_query * output_token
    pointers += (heads * output_head + place * output_token)[:, None] + dims[None, :]
    mask = present[:, None] & (dims < head_dim)[None, :]
    sums = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)  # (block_rows, block_dim)
    sizes = lse + row * lse_batch + tile_query * lse_token + heads * lse_head + place * lse_token
    peak = tl.load(sizes, mask=present, other=0.0) * LOG2_E  # (block_rows,)
    total = tl.where(peak == float("-inf"), 0.0, 1.0)

    band_slot = 0
    for band in range(bands):
        numbers = band_table + COLUMNS * band
        first = tl.load(numbers + 3) + 1
        stop = tl.load(numbers) + 1
        low, high, slot, band_slot = narrow_keys(band_table, band, band_slot, tile_begin, tile_end, begin, chunk)
        if low < high:
            if pairs > 0:
                # Read anew for every band: next to the keys that is little, and it keeps registers free.
                seen_first, seen_second = load_pairs(queries, query_offsets, present, pairs, offset, interleaved)
                place = tokens // tl.load(numbers + 10) + tl.load(numbers + 7)  # (block_rows,)
                seen_first, seen_second = rerotate(
                    seen_first.to(tl.float32),
                    seen_second.to(tl.float32),
                    place.to(tl.float32)[:, None],
                    tokens.to(tl.float32)[:, None],
                    frequency,
                    fast_sine,
                )
                seen_first = seen_first.to(query.dtype.element_ty)  # (block_rows, pairs)
                seen_second = seen_second.to(query.dtype.element_ty)
            for tile in tl.range(low, high, block_keys, num_stages=stages):
                inside = tile + offsets < high  # (block_keys,)
                start = tl.cast(tile, tl.int64)
                scores = tl.zeros([block_rows, block_keys], tl.float32)
                if pairs > 0:
                    key_first, key_second = load_pairs(
                        views + (start + slot) * (2 * pairs), offsets * (2 * pairs), inside, pairs, 0, False
                    )  # (block_keys, pairs) each
                    scores = tl.dot(seen_first, tl.trans(key_first), scores, input_precision="ieee")
                    scores = tl.dot(seen_second, tl.trans(key_second), scores, input_precision="ieee")
                if head_dim > 2 * pairs:
                    key_rest = load_rest(
                        keys + start * key_token, offsets * key_token, inside, head_dim, pairs, offset
                    )  # (block_keys, others)
                    scores = tl.dot(query_rest, tl.trans(key_rest), scores, input_precision="ieee")
                if slopes is not None:
                    at = (tokens // tl.load(numbers + 10) + tl.load(numbers + 7)).to(tl.float32)  # (block_rows,)
                    to = ((tile + offsets) // tl.load(numbers + 11) + tl.load(numbers + 9)).to(tl.float32)
                    scores += slope[:, None] * (to[None, :] - at[:, None])
                if has_softcap:
                    scores = softcapped(scores, cap, cap_scale)
                # How far into the band a key is; before its beginning that is a very large unsigned number.
                depth = (tokens - first - tile)[:, None] - offsets[None, :]  # (block_rows, block_keys)
                seen = depth.to(tl.uint32, bitcast=True) < (stop - first).to(tl.uint32, bitcast=True)
                scores = tl.where(seen, scores, float("-inf"))
                weights, fade, peak = softmax_step(scores, scale, peak, True)  # (block_rows, block_keys), rows twice
                # Zeros keep what no query sees out of the product, where a weight of 0 would still let NaN through.
                tile_values = tl.load(
                    values + start * value_token + offsets[:, None] * value_token + dims[None, :],
                    mask=inside[:, None] & (dims < head_dim)[None, :],
                    other=0.0,
                )  # (block_keys, block_dim)
                total = total * fade + tl.sum(weights, 1)
                weights = weights.to(value.dtype.element_ty)
                sums = tl.dot(weights, tile_values, sums * fade[:, None], input_precision="ieee")

    sums = sums / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(pointers, sums.to(output.dtype.element_ty), mask=mask)
