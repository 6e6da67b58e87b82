# SPDX-License-Identifier: Apache-2.0
"""Keys as narrow bands see them: re-rotated before the attention to them, for a chunk of queries at a time."""

# mypy: disable-error-code="no-any-return", disallow-untyped-decorators=False

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ropewalk.maps import Band
from ropewalk.maps.edges import Edge
from ropewalk.maps.positions import Grouped
from ropewalk.ops.rotary import Rotary
from ropewalk.ops.triton.launch import Launch, multiples_of_16
from ropewalk.ops.triton.primitives import COLUMNS, INTERPRETED, load_pairs, rerotate
from ropewalk.ops.triton.tables import BandTable, make_table

# Re-rotated keys held at a time, in bytes; more only where a chunk would be shorter than the least one, of so many
# queries.
_VIEW_BYTES = 256 << 20
_LEAST_CHUNK = 1024
# Pairs that a program re-rotates at a time, eight for each thread.
_PAIRS_PER_TILE = 1024
_WARPS = 4


@dataclass(slots=True, eq=False)
class Narrow:
    """Attention to some bands that is added to attention over the others. The last query is beside the last key.

    Tensors may have any strides but the last, which is 1 (of `lse` any).

    Args:
        query: (batch, heads, queries, head_dim), float32, bfloat16 or float16, rotated at its true position; head_dim
            a multiple of 8 up to 256.
        key, value: (batch, key heads, keys, head_dim), same dtype; slot n holds the token at true position n, and
            heads is a multiple of key heads.
        bands: what is added, each such that `takes`.
        rotary: of the model.
        output: shaped as query, same dtype: attention over the other bands. Written in place.
        lse: float32, (batch, heads, queries), natural logarithm of its softmax's denominator, sinks included; -inf
            where it saw nothing.
        scale: of the scores.
        softcap: `softcap * tanh(score / softcap)` instead of the score.
        slopes: (heads,), takes `slope * (query position - key position)` away from each score (ALiBi).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    bands: Sequence[Band]
    rotary: Rotary
    output: Tensor
    lse: Tensor
    scale: float
    softcap: float | None = None
    slopes: Tensor | None = None


def takes(band: Band) -> bool:
    """Whether a band can be added so: a narrow one of groups of tokens."""
    return band.is_narrow and all(isinstance(function, Grouped) for function in band.functions)


@dataclass(frozen=True, eq=False)
class Work:
    """What there is to do in a call.

    Args:
        bands: those that some query sees.
        past: tokens before the first query.
        first: position of the first query that sees a key of the bands.
        table: of the bands.
        frequencies: float32, (pairs,); anything without a rotary embedding.
    """

    bands: tuple[Band, ...]
    past: int
    first: int
    table: BandTable
    frequencies: Tensor

    @property
    def widths(self) -> int:
        """Keys that a query sees in all bands together, at most."""
        return sum(width(band) for band in self.bands)


@dataclass(frozen=True, eq=False)
class Part:
    """Keys as all bands see them, for the queries at positions `begin .. end - 1` of some rows.

    Args:
        rows: of the batch.
        keys: (rows, key heads, slots, 2 * pairs), the first dimension of every pair, then the second; see `narrow_keys`
            for the slots, of which there are so many as a part of `chunk` queries needs.
        write_keys: launches what writes `keys`, on the current device; None where there is nothing to re-rotate.
    """

    rows: slice
    begin: int
    end: int
    chunk: int
    keys: Tensor
    write_keys: Callable[[], object] | None


def width(band: Band) -> int:
    """Keys that a query sees in a narrow band, at most."""
    return band.low.back - band.high.back


def prepare(narrow: Narrow) -> Work | None:
    """What there is to do; None for nothing."""
    keys = narrow.key.shape[2]
    device = narrow.query.device
    # As in decode, so that texts that grow share their tables.
    capacity = 1 << max(12, (keys - 1).bit_length())
    bands = tuple(
        replace(band, low=Edge(back=min(band.low.back, capacity - 1)))
        for band in narrow.bands
        if band.first_query < keys
    )
    if not bands or not narrow.query.numel():
        return None
    rotary = narrow.rotary
    table = rotary.tables.get((bands, device), lambda _: make_table(bands, capacity, device))
    past = keys - narrow.query.shape[2]
    return Work(
        bands=bands,
        past=past,
        first=max(past, min(band.first_query for band in bands)),
        table=table,
        frequencies=rotary.frequencies(device) if rotary.pairs else table.positions,
    )


def in_parts(key: Tensor, work: Work, rotary: Rotary, chunk: int | None, multiple: int = 1) -> Iterator[Part]:
    """The queries of a call in parts of `chunk`, rounded up to a multiple, each with room for the keys it sees,
    re-rotated. The next part's keys take the place of the last one's.
    """
    batch, key_heads, keys = key.shape[:3]
    pairs, widths = rotary.pairs, work.widths
    slot_bytes = key_heads * 2 * pairs * key.element_size()
    if not pairs:
        chunk = keys  # nothing is re-rotated
    elif chunk is None:
        chunk = _chunk(len(work.bands), widths, slot_bytes)
    chunk = min(-(-chunk // multiple) * multiple, keys - work.first)
    # Queries of a chunk and a band of width w see `chunk + w - 1` keys.
    slots = len(work.bands) * (chunk - 1) + widths
    rows = min(max(_VIEW_BYTES // max(slots * slot_bytes, 1), 1), batch)
    views = torch.empty((rows, key_heads, slots, 2 * pairs), dtype=key.dtype, device=key.device)
    block_tokens = max(_PAIRS_PER_TILE // int(triton.next_power_of_2(max(pairs, 16))), 16)
    nearest = min(band.first_query for band in work.bands)
    reach = max(band.low.back for band in work.bands)
    for row in range(0, batch, rows):
        here = slice(row, min(row + rows, batch))
        for begin in range(work.first, keys, chunk):
            end = min(begin + chunk, keys)
            first_key = max(begin - reach, 0)
            launch = _launch(rotary, key, views, block_tokens)
            grid = (triton.cdiv(end - nearest - first_key, block_tokens), key_heads, here.stop - here.start)
            write_keys = partial(
                launch[grid],
                key[here],
                views,
                work.table.bands,
                work.frequencies,
                first_key,
                begin,
                end,
                chunk,
                slots,
                len(work.bands),
                *key.stride()[:3],
                *launch.constants,
            )
            yield Part(here, begin, end, chunk, views, write_keys if pairs else None)


def _chunk(bands: int, widths: int, slot_bytes: int) -> int:
    """Queries whose keys, as all bands see them, take `_VIEW_BYTES`."""
    fitting = (_VIEW_BYTES // max(slot_bytes, 1) - widths) // bands
    return max(fitting // _LEAST_CHUNK * _LEAST_CHUNK, _LEAST_CHUNK)


def _launch(rotary: Rotary, key: Tensor, views: Tensor, block_tokens: int) -> Launch:
    kinds = (key.dtype, key.device, key.data_ptr() % 16 == 0, multiples_of_16(key.stride()[:3]), block_tokens)
    return rotary.tables.get(
        ("views", kinds),
        lambda _: Launch(
            _views_kernel,
            {**rotation(rotary, key.dtype), "block_tokens": block_tokens, "aligned": kinds[3]},
            {"num_warps": _WARPS, "enable_fp_fusion": False},
        ),
    )


def rotation(rotary: Rotary, dtype: torch.dtype) -> dict[str, Any]:
    """What kernels have to know of the rotary embedding. They take `enable_fp_fusion=False` as well: a phase is a
    product rounded to float32, as the model rounds it, and must not melt into the next addition."""
    return {
        "pairs": rotary.pairs,
        "offset": rotary.offset,
        "interleaved": rotary.interleaved,
        # The interpreter has no fast sine; float32 wants the exact one.
        "fast_sine": not INTERPRETED and dtype != torch.float32,
    }


@triton.jit(
    do_not_specialize=["first_key", "begin", "end", "chunk", "slots", "bands", "key_batch", "key_head", "key_token"]
)
def _views_kernel(
    key: tl.tensor,
    views: tl.tensor,
    band_table: tl.tensor,
    frequencies: tl.tensor,
    first_key: tl.int32,
    begin: tl.int32,
    end: tl.int32,
    chunk: tl.int32,
    slots: tl.int32,
    bands: tl.int32,
    key_batch: tl.int64,
    key_head: tl.int64,
    key_token: tl.int32,
    pairs: tl.constexpr,
    offset: tl.constexpr,
    interleaved: tl.constexpr,
    fast_sine: tl.constexpr,
    block_tokens: tl.constexpr,
    aligned: tl.constexpr,
) -> None:
    """One program: some keys of a key head, from `first_key` on, re-rotated as each band needs them for the queries at
    `begin .. end - 1`. They go to views (rows, key heads, slots, 2 * pairs): the first dimension of every pair, then
    the second; see `narrow_keys` for the slots."""
    if aligned:
        # Says what is known of the strides, so that sixteen bytes are read at a time.
        key_batch, key_head, key_token = key_batch // 16 * 16, key_head // 16 * 16, key_token // 16 * 16
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
        low, high, slot, band_slot = narrow_keys(band_table, band, band_slot, begin, end, begin, chunk)
        if (start < high) & (start + block_tokens > low):
            inside = (tokens >= low) & (tokens < high)
            to = tokens // tl.load(band_table + COLUMNS * band + 11) + tl.load(band_table + COLUMNS * band + 9)
            seen_first, seen_second = rerotate(
                first, second, to.to(tl.float32)[:, None], tokens.to(tl.float32)[:, None], frequency, fast_sine
            )
            pointers = target + (slot + tokens).to(tl.int64)[:, None] * (2 * pairs) + pair[None, :]
            mask = inside[:, None] & (pair < pairs)[None, :]
            tl.store(pointers, seen_first.to(views.dtype.element_ty), mask=mask)
            tl.store(pointers + pairs, seen_second.to(views.dtype.element_ty), mask=mask)


@triton.jit
def narrow_keys(
    band_table: tl.tensor,
    band: tl.tensor,
    band_slot: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    chunk_begin: tl.tensor,
    chunk: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The first key that the queries at `begin .. end - 1` see in a band, and the end of those keys; what leads from a
    key to its slot among the re-rotated ones; the first slot of the next band.

    A band's slots, from `band_slot` on, are for the keys that a whole chunk sees, from before the text's beginning on.
    """
    first = tl.load(band_table + COLUMNS * band + 3) + 1
    stop = tl.load(band_table + COLUMNS * band) + 1
    slot = band_slot - (chunk_begin - stop + 1)
    return tl.maximum(begin - stop + 1, 0), end - first, slot, band_slot + chunk - 1 + stop - first
