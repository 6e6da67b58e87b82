"""Attention to the bands between the nearest one and the one without an end, all of them in one launch, for prefill.

Such a band is a narrow diagonal: of 48 to 532 keys in SELF by distance. A tile of 128 queries would take 127 keys more
than a query sees; so the rows of a tile are all heads that share a key head at a few consecutive positions. A program
takes its rows through one band after another, with one softmax that goes on from what the other bands gave. The keys
are turned before, as each band sees them, for a chunk of queries at a time; the queries are turned in registers.
"""

# mypy: disable-error-code="no-any-return", disallow-untyped-decorators=False

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ropewalk.maps import Band
from ropewalk.ops.rotary import Rotary
from ropewalk.ops.triton.tuned import tuned
from ropewalk.ops.triton.turning import INTERPRETED, Tables, load_pairs, load_rest, make_tables, turn

_LOG2_E = tl.constexpr(math.log2(math.e))

# Turned keys held at a time, in bytes; more only where a chunk would be shorter than the least one, of so many queries.
_VIEW_BYTES = 256 << 20
_LEAST_CHUNK = 1024
# Pairs that a program turns at a time, eight for each thread.
_PAIRS_PER_TILE = 1024
_TURNING_WARPS = 4


@dataclass(frozen=True)
class BetweenConfig:
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


def default_config(head_dim: int, dtype: torch.dtype, device: torch.device) -> BetweenConfig:
    """The tiles measured best on this GPU, or sound ones that fit it."""
    return BetweenConfig(**tuned("between", head_dim, dtype.itemsize, device))


def between(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bands: Sequence[Band],
    rotary: Rotary | None,
    output: Tensor,
    lse: Tensor,
    scale: float,
    softcap: float | None = None,
    chunk: int | None = None,
    config: BetweenConfig | None = None,
) -> Tensor:
    """Adds the keys of some bands to attention over the others. The last query is beside the last key.

    Tensors may have any strides but the last, which is 1 (of `lse` any).

    Args:
        query: (batch, heads, queries, head_dim), float32, bfloat16 or float16, rotated at its true position; head_dim
            a multiple of 8 up to 256.
        key, value: (batch, key heads, keys, head_dim), same dtype; slot n holds the token at true position n, and
            heads is a multiple of key heads.
        bands: what is added, each with an end.
        rotary: of the model; None if it has none, and then bands differ in nothing but their place.
        output: shaped as query, same dtype: attention over the other bands. Written in place.
        lse: float32, (batch, heads, queries), natural logarithm of its softmax's denominator, sinks included; -inf
            where it saw nothing.
        scale: of the scores.
        softcap: `softcap * tanh(score / softcap)` instead of the score.
        chunk: queries for which keys are turned at a time; by default so many that the turned keys take 256 MiB.
        config: the tiles, `default_config` by default.

    Returns:
        `output`. The same call gives the same bits.

    Raises:
        ValueError: a band has no end, or `output` or `lse` does not fit the query.
    """
    work = prepare(query, key, value, bands, rotary, output, lse)
    if work is None:
        return output
    heads, head_dim, key_heads = query.shape[1], query.shape[3], key.shape[1]
    config = config or default_config(head_dim, query.dtype, query.device)
    groups = heads // key_heads
    together = min(int(triton.next_power_of_2(groups)), config.block_rows)
    block_positions = config.block_rows // together
    for part in turned_keys(key, work, rotary, chunk):
        here = part.rows
        grid = (
            triton.cdiv(part.end - part.begin, block_positions),
            key_heads * triton.cdiv(groups, together),
            query[here].shape[0],
        )
        with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]
            _between_kernel[grid](
                query[here],
                key[here],
                value[here],
                part.keys,
                output[here],
                lse[here],
                work.tables.bands,
                work.tables.positions,
                work.frequencies,
                work.past,
                part.begin,
                part.end,
                part.chunk,
                part.keys.shape[2],
                len(work.bands),
                work.capacity,
                groups,
                scale * _LOG2_E.value if softcap is None else 1.0,
                2 * scale / softcap * _LOG2_E.value if softcap is not None else 0.0,
                softcap * _LOG2_E.value if softcap is not None else 0.0,
                *query.stride()[:3],
                *key.stride()[:3],
                *value.stride()[:3],
                *output.stride()[:3],
                *lse.stride(),
                head_dim=head_dim,
                heads_together=together,
                block_positions=block_positions,
                block_keys=config.block_keys,
                stages=config.stages,
                has_softcap=softcap is not None,
                num_warps=config.warps,
                **_turning(rotary, query.dtype),
            )
    return output


@dataclass(frozen=True, eq=False)
class Work:
    """What there is to do in a call.

    Args:
        bands: those that some query sees, each with an end.
        past: tokens before the first query.
        first: position of the first query that sees a key of the bands.
        tables: of the bands, for positions below `capacity`.
        frequencies: float32, (pairs,); anything without a rotary embedding.
    """

    bands: tuple[Band, ...]
    past: int
    first: int
    tables: Tables
    capacity: int
    frequencies: Tensor


@dataclass(frozen=True, eq=False)
class Part:
    """Keys as all bands see them, for the queries at positions `begin .. end - 1` of some rows.

    Args:
        rows: of the batch.
        keys: (rows, key heads, slots, 2 * pairs), the first dimension of every pair, then the second; see `_band_keys`
            for the slots, of which there are so many as a part of `chunk` queries needs.
    """

    rows: slice
    begin: int
    end: int
    chunk: int
    keys: Tensor


def prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bands: Sequence[Band],
    rotary: Rotary | None,
    output: Tensor,
    lse: Tensor,
) -> Work | None:
    """What `between` has to do; None for nothing. Raises ValueError as it does."""
    _check(query, key, value, bands, output, lse)
    keys = key.shape[2]
    past = keys - query.shape[2]
    # As in decode, so that texts that grow share their tables.
    capacity = 1 << max(12, (keys - 1).bit_length())
    bands = tuple(replace(band, stop=min(band.stop or 0, capacity)) for band in bands if band.first < keys)
    if not bands or not query.numel():
        return None
    tables = _tables(bands, capacity, query.device)
    return Work(
        bands=bands,
        past=past,
        first=max(past, min(band.first for band in bands)),
        tables=tables,
        capacity=capacity,
        frequencies=tables.positions if rotary is None else rotary.frequencies(query.device),
    )


def turned_keys(key: Tensor, work: Work, rotary: Rotary | None, chunk: int | None, multiple: int = 1) -> Iterator[Part]:
    """The queries of a call in parts of `chunk`, rounded up to a multiple, each with the keys it sees, turned.

    The next part's keys take the place of the last one's.
    """
    batch, key_heads, keys = key.shape[:3]
    pairs = 0 if rotary is None else rotary.dim // 2
    widths = sum((band.stop or 0) - band.first for band in work.bands)
    slot_bytes = key_heads * 2 * pairs * key.element_size()
    if rotary is None:
        chunk = keys  # nothing is turned
    elif chunk is None:
        chunk = _chunk(len(work.bands), widths, slot_bytes)
    chunk = min(-(-chunk // multiple) * multiple, keys - work.first)
    # Queries of a chunk and a band of width w see `chunk + w - 1` keys.
    slots = len(work.bands) * (chunk - 1) + widths
    rows = min(max(_VIEW_BYTES // max(slots * slot_bytes, 1), 1), batch)
    views = torch.empty((rows, key_heads, slots, 2 * pairs), dtype=key.dtype, device=key.device)
    block_tokens = max(_PAIRS_PER_TILE // int(triton.next_power_of_2(max(pairs, 16))), 16)
    nearest = min(band.first for band in work.bands)
    reach = max(band.stop or 0 for band in work.bands)
    for row in range(0, batch, rows):
        here = slice(row, min(row + rows, batch))
        for begin in range(work.first, keys, chunk):
            end = min(begin + chunk, keys)
            first_key = max(begin - reach + 1, 0)
            if pairs:
                grid = (triton.cdiv(end - nearest - first_key, block_tokens), key_heads, here.stop - here.start)
                with torch.cuda.device_of(key):  # type: ignore[no-untyped-call]
                    _views_kernel[grid](
                        key[here],
                        views,
                        work.tables.bands,
                        work.tables.positions,
                        work.frequencies,
                        first_key,
                        begin,
                        end,
                        chunk,
                        slots,
                        len(work.bands),
                        work.capacity,
                        *key.stride()[:3],
                        block_tokens=block_tokens,
                        num_warps=_TURNING_WARPS,
                        **_turning(rotary, key.dtype),
                    )
            yield Part(here, begin, end, chunk, views)


def _turning(rotary: Rotary | None, dtype: torch.dtype) -> dict[str, Any]:
    """What both kernels have to know of the rotary embedding."""
    return {
        "pairs": 0 if rotary is None else rotary.dim // 2,
        "offset": 0 if rotary is None else rotary.offset,
        "interleaved": rotary is not None and rotary.interleaved,
        # The interpreter has no fast sine; float32 wants the exact one.
        "fast_sine": not INTERPRETED and dtype != torch.float32,
        # A phase is a product rounded to float32, as the model rounds it: it must not melt into the next addition.
        "enable_fp_fusion": False,
    }


def _check(query: Tensor, key: Tensor, value: Tensor, bands: Sequence[Band], output: Tensor, lse: Tensor) -> None:
    for fits, problem in (
        (all(band.stop is not None for band in bands), "every band must have an end"),
        (output.shape == query.shape and output.dtype == query.dtype, "output does not fit the query"),
        (lse.shape == query.shape[:3] and lse.dtype == torch.float32, "lse does not fit the query"),
        (all(x.stride(-1) == 1 for x in (query, key, value, output)), "last strides must be 1"),
    ):
        if not fits:
            raise ValueError(f"between: {problem}")


def _chunk(bands: int, widths: int, slot_bytes: int) -> int:
    """Queries whose keys, as all bands see them, take `_VIEW_BYTES`."""
    fitting = (_VIEW_BYTES // max(slot_bytes, 1) - widths) // bands
    return max(fitting // _LEAST_CHUNK * _LEAST_CHUNK, _LEAST_CHUNK)


@lru_cache(maxsize=16)
def _tables(bands: tuple[Band, ...], capacity: int, device: torch.device) -> Tables:
    return make_tables(bands, capacity, device)


@triton.jit(do_not_specialize=["first_key", "begin", "end", "chunk", "slots", "bands", "capacity"])
def _views_kernel(
    key: tl.tensor,
    views: tl.tensor,
    band_table: tl.tensor,
    positions: tl.tensor,
    frequencies: tl.tensor,
    first_key: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    chunk: tl.tensor,
    slots: tl.tensor,
    bands: tl.tensor,
    capacity: tl.tensor,
    key_batch: tl.tensor,
    key_head: tl.tensor,
    key_token: tl.tensor,
    pairs: tl.constexpr,
    offset: tl.constexpr,
    interleaved: tl.constexpr,
    fast_sine: tl.constexpr,
    block_tokens: tl.constexpr,
) -> None:
    """One program: some keys of a key head, from `first_key` on, turned as each band needs them for the queries at
    `begin .. end - 1`. They go to views (rows, key heads, slots, 2 * pairs): the first dimension of every pair, then
    the second; see `_band_keys` for the slots."""
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    start = first_key + tl.program_id(0) * block_tokens
    offsets = tl.arange(0, block_tokens)
    tokens = start + offsets
    pair = tl.arange(0, max(16, triton.next_power_of_2(pairs)))
    frequency = tl.load(frequencies + pair, mask=pair < pairs, other=0.0)[None, :]  # (1, pairs)
    keys = key + row * key_batch + head * key_head + start.to(tl.int64) * key_token
    first, second = load_pairs(keys, offsets * key_token, tokens < end, pairs, offset, interleaved)
    first, second = first.to(tl.float32), second.to(tl.float32)  # (block_tokens, pairs) each
    target = views + (row * tl.num_programs(1) + head) * slots * (2 * pairs)
    band_slot = 0
    for band in range(bands):
        low, high, slot, band_slot = _band_keys(band_table, band, band_slot, begin, end, begin, chunk)
        if (start < high) & (start + block_tokens > low):
            key_row = tl.load(band_table + 4 * band + 3).to(tl.int64)
            inside = (tokens >= low) & (tokens < high)
            mapped = tl.load(positions + key_row * capacity + tokens, mask=inside, other=0.0)  # (block_tokens,)
            turned_first, turned_second = turn(
                first, second, mapped[:, None], tokens.to(tl.float32)[:, None], frequency, fast_sine
            )
            pointers = target + (slot + tokens).to(tl.int64)[:, None] * (2 * pairs) + pair[None, :]
            mask = inside[:, None] & (pair < pairs)[None, :]
            tl.store(pointers, turned_first.to(views.dtype.element_ty), mask=mask)
            tl.store(pointers + pairs, turned_second.to(views.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["past", "begin", "end", "chunk", "slots", "bands", "capacity", "groups"])
def _between_kernel(
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    views: tl.tensor,
    output: tl.tensor,
    lse: tl.tensor,
    band_table: tl.tensor,
    positions: tl.tensor,
    frequencies: tl.tensor,
    past: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    chunk: tl.tensor,
    slots: tl.tensor,
    bands: tl.tensor,
    capacity: tl.tensor,
    groups: tl.tensor,
    scale: float,
    cap_scale: float,
    cap: float,
    query_batch: tl.tensor,
    query_head: tl.tensor,
    query_token: tl.tensor,
    key_batch: tl.tensor,
    key_head: tl.tensor,
    key_token: tl.tensor,
    value_batch: tl.tensor,
    value_head: tl.tensor,
    value_token: tl.tensor,
    output_batch: tl.tensor,
    output_head: tl.tensor,
    output_token: tl.tensor,
    lse_batch: tl.tensor,
    lse_head: tl.tensor,
    lse_token: tl.tensor,
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
) -> None:
    """One program: a few of the positions `begin .. end - 1`, all heads that share a key head (or `heads_together` of
    them), through all bands."""
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
    peak = tl.load(sizes, mask=present, other=0.0) * _LOG2_E  # (block_rows,)
    total = tl.where(peak == float("-inf"), 0.0, 1.0)

    band_slot = 0
    for band in range(bands):
        first = tl.load(band_table + 4 * band)
        stop = tl.load(band_table + 4 * band + 1)
        low, high, slot, band_slot = _band_keys(band_table, band, band_slot, tile_begin, tile_end, begin, chunk)
        if low < high:
            if pairs > 0:
                # Read anew for every band: next to the keys that is little, and it keeps registers free.
                turned_first, turned_second = load_pairs(queries, query_offsets, present, pairs, offset, interleaved)
                query_row = tl.load(band_table + 4 * band + 2).to(tl.int64)
                mapped = tl.load(positions + query_row * capacity + tokens, mask=present, other=0.0)  # (block_rows,)
                turned_first, turned_second = turn(
                    turned_first.to(tl.float32),
                    turned_second.to(tl.float32),
                    mapped[:, None],
                    tokens.to(tl.float32)[:, None],
                    frequency,
                    fast_sine,
                )
                turned_first = turned_first.to(query.dtype.element_ty)  # (block_rows, pairs)
                turned_second = turned_second.to(query.dtype.element_ty)
            for tile in tl.range(low, high, block_keys, num_stages=stages):
                inside = tile + offsets < high  # (block_keys,)
                start = tl.cast(tile, tl.int64)
                scores = tl.zeros([block_rows, block_keys], tl.float32)
                if pairs > 0:
                    key_first, key_second = load_pairs(
                        views + (start + slot) * (2 * pairs), offsets * (2 * pairs), inside, pairs, 0, False
                    )  # (block_keys, pairs) each
                    scores = tl.dot(turned_first, tl.trans(key_first), scores, input_precision="ieee")
                    scores = tl.dot(turned_second, tl.trans(key_second), scores, input_precision="ieee")
                if head_dim > 2 * pairs:
                    key_rest = load_rest(
                        keys + start * key_token, offsets * key_token, inside, head_dim, pairs, offset
                    )  # (block_keys, others)
                    scores = tl.dot(query_rest, tl.trans(key_rest), scores, input_precision="ieee")
                if has_softcap:
                    # cap * tanh, in a form that neither overflows nor subtracts infinities.
                    scores = cap - 2 * cap / (tl.exp2(scores * cap_scale) + 1)
                # How far into the band a key is; before its beginning that is a very large unsigned number.
                depth = (tokens - first - tile)[:, None] - offsets[None, :]  # (block_rows, block_keys)
                seen = depth.to(tl.uint32, bitcast=True) < (stop - first).to(tl.uint32, bitcast=True)
                scores = tl.where(seen, scores, float("-inf"))
                new_peak = tl.maximum(peak, tl.max(scores, 1) * scale)
                # A query that has not seen a key yet must not subtract infinity from infinity.
                level = tl.where(new_peak == float("-inf"), 0.0, new_peak)
                weights = tl.exp2(scores * scale - level[:, None])  # (block_rows, block_keys)
                fade = tl.exp2(peak - level)  # (block_rows,)
                # Zeros keep what no query sees out of the product, where a weight of 0 would still let NaN through.
                tile_values = tl.load(
                    values + start * value_token + offsets[:, None] * value_token + dims[None, :],
                    mask=inside[:, None] & (dims < head_dim)[None, :],
                    other=0.0,
                )  # (block_keys, block_dim)
                total = total * fade + tl.sum(weights, 1)
                weights = weights.to(value.dtype.element_ty)
                sums = tl.dot(weights, tile_values, sums * fade[:, None], input_precision="ieee")
                peak = new_peak

    sums = sums / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(pointers, sums.to(output.dtype.element_ty), mask=mask)


@triton.jit
def _band_keys(
    band_table: tl.tensor,
    band: tl.tensor,
    band_slot: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    chunk_begin: tl.tensor,
    chunk: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The first key that the queries at `begin .. end - 1` see in a band, and the end of those keys; what leads from a
    key to its slot among the turned ones; the first slot of the next band.

    A band's slots, from `band_slot` on, are for the keys that a whole chunk sees, from before the text's beginning on.
    """
    first = tl.load(band_table + 4 * band)
    stop = tl.load(band_table + 4 * band + 1)
    slot = band_slot - (chunk_begin - stop + 1)
    return tl.maximum(begin - stop + 1, 0), end - first, slot, band_slot + chunk - 1 + stop - first
