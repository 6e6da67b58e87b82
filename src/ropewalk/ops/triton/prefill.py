# SPDX-License-Identifier: Apache-2.0
"""Causal attention whose near and far keys are seen through two rotations, in one pass: for prefill, on any CUDA GPU.

A tile of scores is wholly far, wholly near, or on an edge. Each program takes a tile of queries through its key tiles
in that order, with one softmax and one sum, so only the tiles where near meets far cost a second product of query and
key. With tiles a, b, c, ... of queries, the key tiles that each takes (f: far, e: edge, n: near, d: diagonal):

    a  d
    b  n d
    c  e n d
    d  f e n d
    e  f f e n d
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ropewalk.ops.triton.banded import Banded
from ropewalk.ops.triton.launch import Launch, multiples_of_16
from ropewalk.ops.triton.primitives import (
    LN_2,
    edge,
    in_powers_of_2,
    load_sink,
    softcapped,
    softmax_step,
)
from ropewalk.ops.triton.tables import edge_numbers
from ropewalk.ops.triton.tuned import tuned

# Kinds of key tiles, in the order that they are taken; in the odd ones a mask decides. Every query of a tile of queries
# sees all of a far or near tile through that rotation. Of an edge tile no more is known than that some of it is not
# far, and of a diagonal one than that none of it is far or past the window.
_FAR, _EDGE, _NEAR, _DIAGONAL = (tl.constexpr(kind) for kind in range(4))

# Keys, values and far keys that programs at work at one time should share through the L2 cache, in bytes.
_SHARED_BYTES = 24 << 20


@dataclass(frozen=True)
class PrefillConfig:
    """How the work is cut. The result depends on it only by rounding.

    Args:
        block_queries, block_keys: tile of scores; powers of two, 16 or more.
        edge_keys: width of a tile in which a mask decides, where two products may be held at a time; a power of two
            between 16 and block_keys.
        warps: of a program.
        stages: key tiles in flight where nothing is masked.
        edge_stages: the same where a mask decides.

    Raises:
        ValueError: edge_keys does not divide block_keys.
    """

    block_queries: int
    block_keys: int
    edge_keys: int
    warps: int
    stages: int
    edge_stages: int

    def __post_init__(self) -> None:
        if self.block_keys % self.edge_keys:
            raise ValueError(f"PrefillConfig: edge_keys must divide block_keys, got {self}")


def default_config(head_dim: int, dtype: torch.dtype, device: torch.device) -> PrefillConfig:
    """The tiles measured best on this GPU, or sound ones that fit it."""
    return PrefillConfig(**tuned("prefill", head_dim, dtype.itemsize, device))


def attend(banded: Banded, config: PrefillConfig | None = None) -> tuple[Tensor, Tensor | None]:
    """The output of one pass, shaped as query, contiguous, and its log-sum-exp if that is wanted.

    For float32, bfloat16 and float16 with head_dim a multiple of 8 up to 256. The same call gives the same bits.

    Args:
        config: the tiles, `default_config` by default.
    """
    query, key, value, sinks = banded.query, banded.key, banded.value, banded.sinks
    batch, heads, queries, head_dim = query.shape
    key_heads, keys = key.shape[1:3]
    config = config or default_config(head_dim, query.dtype, query.device)
    has_far = banded.has_far
    far_query, far_key = (banded.far_query, banded.far_key) if has_far else (None, None)
    far_high = banded.far_high if has_far else banded.near_low
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device) if banded.return_lse else None
    if not query.numel():
        return output, lse
    tensors = (query, key, value, far_query, far_key)
    slopes = (None,) * 5 if banded.slopes is None else (banded.slopes, *banded.near_positions, *banded.far_positions)
    strides = [stride for x in tensors for stride in (x.stride()[:3] if x is not None else (0, 0, 0))]
    launch = _launch(
        config,
        head_dim,
        # A window that holds every key has no edge. Without one, no key is far.
        (_FAR if has_far else _NEAR if banded.near_low(keys - 1) == 0 else _EDGE).value,
        has_far and far_high != banded.near_low,
        banded.is_diagonal,
        banded.softcap is not None,
        multiples_of_16(strides),
        query.dtype,
        query.device,
        tuple(None if x is None else (x.dtype, x.data_ptr() % 16 == 0) for x in (*tensors, sinks, *slopes, lse)),
    )
    tiles = -(-queries // config.block_queries)
    read = keys * head_dim * key.element_size() * (3 if has_far else 2)
    with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]
        launch[tiles * batch * heads, 1, 1](
            *tensors,
            sinks,
            *slopes,
            output,
            lse,
            *strides,
            *in_powers_of_2(banded.scale, banded.softcap),
            1 / banded.scale,
            batch * heads,
            heads,
            heads // key_heads,
            queries,
            keys,
            *edge_numbers(banded.near_low),
            *edge_numbers(banded.near_high),
            *edge_numbers(far_high),
            heads // key_heads * min(max(_SHARED_BYTES // max(read, 1), 1), batch * key_heads),
            *launch.constants,
        )
    return output, lse


@lru_cache(maxsize=256)
def _launch(
    config: PrefillConfig,
    head_dim: int,
    first_kind: int,
    has_hole: bool,
    diagonal: bool,
    has_softcap: bool,
    aligned: bool,
    dtype: torch.dtype,
    device: torch.device,
    kinds: tuple[tuple[torch.dtype, bool] | None, ...],
) -> Launch:
    """Calls that differ in these arguments need launches of their own. `kinds`: of the tensors that there are."""
    constants = {
        "first_kind": first_kind,
        "has_hole": has_hole,
        "diagonal": diagonal,
        "has_softcap": has_softcap,
        "aligned": aligned,
        "head_dim": head_dim,
        "block_dim": max(int(triton.next_power_of_2(head_dim)), 16),
        "block_queries": config.block_queries,
        "block_keys": config.block_keys,
        "edge_keys": config.edge_keys,
        "stages": config.stages,
        "edge_stages": config.edge_stages,
    }
    return Launch(_banded, constants, {"num_warps": config.warps})


@triton.jit
def _load(
    base: tl.tensor,
    start: tl.tensor,
    stride: tl.tensor,
    inside: tl.tensor | None,
    head_dim: tl.constexpr,
    block_dim: tl.constexpr,
    block_tokens: tl.constexpr,
) -> tl.tensor:
    """Tokens `start`, `start + 1`, ... of a head as (block_tokens, block_dim), zeros where not `inside`.

    Zeros keep what no query sees out of products, where a weight of 0 would still let NaN through.
    """
    token = tl.arange(0, block_tokens)[:, None]
    dim = tl.arange(0, block_dim)[None, :]
    # A long text's offsets in a view of (batch, tokens, heads, head_dim) pass 2^31; those inside a tile do not.
    pointers = base + tl.cast(start, tl.int64) * stride + (token * stride + dim)
    if inside is not None:
        tile = tl.load(pointers, mask=inside & (dim < head_dim), other=0.0)
    elif head_dim < block_dim:
        tile = tl.load(pointers, mask=dim < head_dim, other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def _positions(positions: tl.tensor | None, tokens: tl.tensor, exists: tl.tensor) -> tl.tensor:
    """Where tokens are, float32; without a table at their slots."""
    if positions is None:  # noqa: SIM108 -- Triton compiles one of them
        found = tokens.to(tl.float32)
    else:
        found = tl.load(positions + tokens, mask=exists, other=0.0)
    return found


_STRIDES = [f"{x}_{of}" for x in ("query", "key", "value", "far_query", "far_key") for of in ("batch", "head", "token")]
_EDGES = [f"{edge}_{of}" for edge in ("near_low", "near_high", "far_high") for of in ("back", "block", "cap")]


@triton.jit(do_not_specialize=[*_STRIDES, *_EDGES, "rows", "heads", "groups", "queries", "keys", "together"])
def _banded(
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    far_query: tl.tensor | None,
    far_key: tl.tensor | None,
    sinks: tl.tensor | None,
    slopes: tl.tensor | None,
    near_query_positions: tl.tensor | None,
    near_key_positions: tl.tensor | None,
    far_query_positions: tl.tensor | None,
    far_key_positions: tl.tensor | None,
    output: tl.tensor,
    lse: tl.tensor | None,
    query_batch: tl.int64,
    query_head: tl.int64,
    query_token: tl.int32,
    key_batch: tl.int64,
    key_head: tl.int64,
    key_token: tl.int32,
    value_batch: tl.int64,
    value_head: tl.int64,
    value_token: tl.int32,
    far_query_batch: tl.int64,
    far_query_head: tl.int64,
    far_query_token: tl.int32,
    far_key_batch: tl.int64,
    far_key_head: tl.int64,
    far_key_token: tl.int32,
    scale: float,
    cap_scale: float,
    cap: float,
    slope_scale: float,
    rows: tl.int32,
    heads: tl.int32,
    groups: tl.int32,
    queries: tl.int32,
    keys: tl.int32,
    near_low_back: tl.int32,
    near_low_block: tl.int32,
    near_low_cap: tl.int32,
    near_high_back: tl.int32,
    near_high_block: tl.int32,
    near_high_cap: tl.int32,
    far_high_back: tl.int32,
    far_high_block: tl.int32,
    far_high_cap: tl.int32,
    together: tl.int32,
    first_kind: tl.constexpr,
    has_hole: tl.constexpr,
    diagonal: tl.constexpr,
    has_softcap: tl.constexpr,
    aligned: tl.constexpr,
    head_dim: tl.constexpr,
    block_dim: tl.constexpr,
    block_queries: tl.constexpr,
    block_keys: tl.constexpr,
    edge_keys: tl.constexpr,
    stages: tl.constexpr,
    edge_stages: tl.constexpr,
) -> None:
    """One tile of queries of one row, a row being a head of the batch."""
    if aligned:
        # Says what is known of the strides, so that sixteen bytes are read at a time.
        query_batch, query_head, query_token = query_batch // 16 * 16, query_head // 16 * 16, query_token // 16 * 16
        key_batch, key_head, key_token = key_batch // 16 * 16, key_head // 16 * 16, key_token // 16 * 16
        value_batch, value_head, value_token = value_batch // 16 * 16, value_head // 16 * 16, value_token // 16 * 16
        far_query_batch, far_query_head = far_query_batch // 16 * 16, far_query_head // 16 * 16
        far_query_token, far_key_token = far_query_token // 16 * 16, far_key_token // 16 * 16
        far_key_batch, far_key_head = far_key_batch // 16 * 16, far_key_head // 16 * 16
    # `together` rows are worked on side by side, heads of the same keys next to each other, so that their keys stay in
    # L2; among those the tiles with the most keys go first, which leaves short ones for the end.
    tiles = tl.cdiv(queries, block_queries)
    program = tl.program_id(0)
    first_row = program // (tiles * together) * together
    place = program - first_row * tiles
    abreast = tl.minimum(together, rows - first_row)
    first_query = (tiles - 1 - place // abreast) * block_queries
    row = first_row + place % abreast
    batch = tl.cast(row // heads, tl.int64)
    head = tl.cast(row % heads, tl.int64)
    shared_head = head // groups

    # Slots of the tile's queries among the keys, and where one kind of key tile ends and the next begins.
    first = keys - queries + first_query
    last = tl.minimum(first + block_queries, keys) - 1
    first_far_high = edge(first, far_high_back, far_high_block, far_high_cap, diagonal)
    last_far_high = edge(last, far_high_back, far_high_block, far_high_cap, diagonal)
    first_near_low = edge(first, near_low_back, near_low_block, near_low_cap, diagonal)
    last_near_low = edge(last, near_low_back, near_low_block, near_low_cap, diagonal)
    first_near_high = edge(first, near_high_back, near_high_block, near_high_cap, diagonal)
    last_near_high = edge(last, near_high_back, near_high_block, near_high_cap, diagonal)
    edge_begin = first_far_high // block_keys * block_keys
    edge_end = 0
    if first_kind <= _EDGE:
        edge_end = tl.cdiv(last_near_low, edge_keys) * edge_keys
    near_end = edge_end + tl.maximum(first_near_high - edge_end, 0) // block_keys * block_keys
    if has_hole:
        # Between the last tile with a far key and the first with a near one, some are skipped.
        hole = tl.cdiv(last_far_high, edge_keys) * edge_keys
        skipped = tl.maximum(first_near_low - hole, 0) // edge_keys * edge_keys

    if far_query is not None:
        far_query += batch * far_query_batch + head * far_query_head
        far_key += batch * far_key_batch + shared_head * far_key_head
    query += batch * query_batch + head * query_head
    key += batch * key_batch + shared_head * key_head
    value += batch * value_batch + shared_head * value_head
    present = (first_query + tl.arange(0, block_queries) < queries)[:, None]  # (block_queries, 1)
    slot = first + tl.arange(0, block_queries)[:, None]
    near_low = edge(slot, near_low_back, near_low_block, near_low_cap, diagonal)  # (block_queries, 1)
    near_high = edge(slot, near_high_back, near_high_block, near_high_cap, diagonal)
    far_high = edge(slot, far_high_back, far_high_block, far_high_cap, diagonal)

    if slopes is not None:
        slope = tl.load(slopes + head).to(tl.float32) * slope_scale
        near_at = _positions(near_query_positions, slot, slot < keys)  # (block_queries, 1)
        far_at = _positions(far_query_positions, slot, slot < keys)

    # The softmax so far: values times exp2(score - peak), the sum of these weights, the largest score; in all of it
    # scores are multiplied by log2(e).
    sums = tl.zeros((block_queries, block_dim), tl.float32)
    total = tl.zeros((block_queries,), tl.float32)
    peak = tl.full((block_queries,), -float("inf"), tl.float32)
    if sinks is not None:
        # A sink is a score met before all others.
        total += 1
        peak = tl.zeros((block_queries,), tl.float32) + load_sink(sinks, head)

    for kind in tl.static_range(first_kind, 4):
        if kind == _FAR:
            far_q = _load(far_query, first_query, far_query_token, present, head_dim, block_dim, block_queries)
            begin = 0
            end = edge_begin
        else:
            if kind == _EDGE or kind == first_kind:  # noqa: SIM109 -- Triton has no "in"
                near_q = _load(query, first_query, query_token, present, head_dim, block_dim, block_queries)
            if kind == _EDGE:
                begin = edge_begin
                end = edge_end
                if has_hole:
                    end -= skipped
            elif kind == _NEAR:
                begin = edge_end
                end = near_end
            else:
                begin = near_end
                end = last_near_high

        for tile in tl.range(
            begin,
            end,
            edge_keys if kind % 2 else block_keys,
            num_stages=edge_stages if kind % 2 else stages,
        ):
            is_edge: tl.constexpr = kind == _EDGE
            masked: tl.constexpr = is_edge or kind == _DIAGONAL
            tile_keys: tl.constexpr = edge_keys if masked else block_keys
            both: tl.constexpr = is_edge and far_query is not None
            start = tile
            inside = None
            if both and has_hole:
                start = tl.where(tile < hole, tile, tile + skipped)
            if masked or slopes is not None:
                column = start + tl.arange(0, tile_keys)[None, :]  # (1, tile_keys)
            if masked:
                seen = column < near_high  # (block_queries, tile_keys)
                token = tl.trans(column)
                inside = token < last_near_high  # (tile_keys, 1), as the masks below: keys that some query sees
            if kind == _FAR:
                k = _load(far_key, start, far_key_token, None, head_dim, block_dim, tile_keys)
                scores = tl.dot(far_q, tl.trans(k), input_precision="ieee")  # (block_queries, tile_keys)
                if slopes is not None:
                    scores += slope * (_positions(far_key_positions, column, column < keys) - far_at)
            else:
                k = _load(key, start, key_token, inside, head_dim, block_dim, tile_keys)
                scores = tl.dot(near_q, tl.trans(k), input_precision="ieee")  # (block_queries, tile_keys)
                if slopes is not None:
                    scores += slope * (_positions(near_key_positions, column, column < keys) - near_at)
            if both:
                inside_far = token < last_far_high
                k = _load(far_key, start, far_key_token, inside_far, head_dim, block_dim, tile_keys)
                far_scores = tl.dot(far_q, tl.trans(k), input_precision="ieee")  # (block_queries, tile_keys)
                if slopes is not None:
                    far_scores += slope * (_positions(far_key_positions, column, column < keys) - far_at)
                scores = tl.where(column < far_high, far_scores, scores)
                if has_hole:
                    seen = (seen & (column >= near_low)) | (column < far_high)
                    inside = (inside & (token >= first_near_low)) | inside_far
            elif is_edge:
                seen &= column >= near_low
                inside &= token >= first_near_low
            if has_softcap:
                scores = softcapped(scores, cap, cap_scale)
            if masked:
                scores = tl.where(seen, scores, -float("inf"))
            weights, fade, peak = softmax_step(scores, scale, peak, masked)  # (block_queries, tile_keys) and rows twice
            v = _load(value, start, value_token, inside, head_dim, block_dim, tile_keys)
            total = total * fade + tl.sum(weights, 1)
            sums = tl.dot(weights.to(v.dtype), v, sums * fade[:, None], input_precision="ieee")

    total = tl.where(total > 0, total, 1.0)  # a query that sees no key: zeros, and -inf as it is in `peak`
    sums = sums / total[:, None]
    place = tl.cast(row, tl.int64) * queries + first_query  # of the tile's first query among all
    here = tl.arange(0, block_queries)
    dim = tl.arange(0, block_dim)[None, :]
    pointers = output + place * head_dim + (here[:, None] * head_dim + dim)
    tl.store(pointers, sums.to(output.dtype.element_ty), mask=present & (dim < head_dim))
    if lse is not None:
        tl.store(lse + place + here, (peak + tl.log2(total)) * LN_2, mask=first_query + here < queries)
