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

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ropewalk.ops.triton.tuned import tuned

_LOG2_E = tl.constexpr(math.log2(math.e))
_LN_2 = tl.constexpr(math.log(2))

# Kinds of key tiles, in the order that they are taken; in the odd ones a mask decides. Every query of a tile of queries
# sees all of a far or near tile through that rotation. Of an edge tile no more is known than that some of it is not
# far, and of a diagonal one than that none of it is far or past the window.
_FAR, _EDGE, _NEAR, _DIAGONAL = (tl.constexpr(kind) for kind in range(4))

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Keys, values and far keys that programs at work at one time should share through the L2 cache, in bytes.
_SHARED_BYTES = 24 << 20
# Offsets within a tile, of up to 256 tokens, are 32 bits.
_LARGEST_STRIDE = 1 << 23


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


def banded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    far_query: Tensor | None,
    far_key: Tensor | None,
    scale: float,
    window: int | None,
    far_first: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    config: PrefillConfig | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention that sees near keys through (query, key) and far keys through (far_query, far_key).

    The last query is aligned with the last key. A query sees the keys at distance 0 .. window - 1 near and those at
    distance `far_first` or more far; one softmax covers both. Tensors need a last stride of 1 and may share memory.

    Args:
        query: (batch, heads, queries, head_dim), float32, bfloat16 or float16; head_dim a multiple of 8 up to 256.
        key, value: (batch, key heads, keys, head_dim), keys >= queries; heads is a multiple of key heads.
        far_query: shaped as query, turned to its far positions; queries without far keys may hold anything. None for a
            plain sliding window.
        far_key: (batch, key heads, far slots, head_dim), the first keys turned to their far positions; far slots is
            at least keys - far_first, and what lies past that is not read.
        scale: of the scores, above 0.
        window: near keys of a query, its own included; None for every key before it, and then nothing is far.
        far_first: smallest far distance, `window` by default and never less; keys between the two are not seen.
        softcap: `softcap * tanh(score / softcap)` instead of the score.
        sinks: (heads,), a logit a head that takes part in the softmax and adds nothing.
        return_lse: whether to return the log-sum-exp as well.
        config: the tiles, `default_config` by default.

    Returns:
        The output, shaped as query, contiguous; with `return_lse` also the natural logarithm of the softmax's
        denominator, sink included, float32, (batch, heads, queries). A query that sees no key gives zeros, and -inf
        if there is no sink. The same call gives the same bits.

    Raises:
        ValueError: shapes, dtypes, strides or numbers do not fit.
    """
    _check(query, key, value, far_query, far_key, scale, window, far_first, softcap, sinks)
    batch, heads, queries, head_dim = query.shape
    key_heads, keys = key.shape[1:3]
    config = config or default_config(head_dim, query.dtype, query.device)
    # A window that holds every key has no edge. Without one, no key is far.
    window = None if window is None or window >= keys else window
    far_first = window if far_first is None else far_first
    has_far = window is not None and far_first is not None and far_query is not None and far_first < keys
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device) if return_lse else None
    if query.numel():
        tiles = triton.cdiv(queries, config.block_queries)
        read = keys * head_dim * key.element_size() * (3 if has_far else 2)
        together = heads // key_heads * min(max(_SHARED_BYTES // read, 1), batch * key_heads)
        far = (far_query, far_key) if has_far else (None, None)
        with torch.cuda.device(query.get_device()):
            _banded[(tiles * batch * heads,)](
                query,
                key,
                value,
                *far,
                sinks,
                output,
                lse,
                *(
                    stride
                    for x in (query, key, value, *far)
                    for stride in (x.stride()[:3] if x is not None else (0,) * 3)
                ),
                scale * _LOG2_E.value if softcap is None else 1.0,
                2 * scale / softcap * _LOG2_E.value if softcap is not None else 0.0,
                softcap * _LOG2_E.value if softcap is not None else 0.0,
                batch * heads,
                heads,
                heads // key_heads,
                queries,
                keys,
                window if window is not None else 0,
                far_first if has_far else window or 0,
                together,
                first_kind=(_FAR if has_far else _NEAR if window is None else _EDGE).value,
                has_hole=has_far and far_first != window,
                has_softcap=softcap is not None,
                head_dim=head_dim,
                block_dim=_block_dim(head_dim),
                block_queries=config.block_queries,
                block_keys=config.block_keys,
                edge_keys=config.edge_keys,
                stages=config.stages,
                edge_stages=config.edge_stages,
                num_warps=config.warps,
            )
    return output if lse is None else (output, lse)


def _block_dim(head_dim: int) -> int:
    return max(int(triton.next_power_of_2(head_dim)), 16)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    far_query: Tensor | None,
    far_key: Tensor | None,
    scale: float,
    window: int | None,
    far_first: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> None:
    problem = _shape_problem(query, key, value) or _number_problem(scale, window, far_first, softcap)
    if problem is None and (far_query is None) != (far_key is None):
        problem = "far_query and far_key come together"
    if problem is None and far_query is not None and far_key is not None:
        problem = _far_problem(query, key, far_query, far_key, window, far_first)
    if problem is None and sinks is not None and sinks.shape != query.shape[1:2]:
        problem = f"sinks must be ({query.shape[1]},), got {tuple(sinks.shape)}"
    if problem is not None:
        shapes = ", ".join(
            f"{name} {tuple(x.shape)}"
            for name, x in (
                ("query", query),
                ("key", key),
                ("value", value),
                ("far_query", far_query),
                ("far_key", far_key),
            )
            if x is not None
        )
        raise ValueError(f"banded: {problem}; {shapes}")


def _shape_problem(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    if not query.ndim == key.ndim == value.ndim == 4:
        return "tensors must be (batch, heads, tokens, head_dim)"
    if query.dtype not in _DTYPES or not query.dtype == key.dtype == value.dtype:
        return f"dtypes must be float32, bfloat16 or float16 and equal: {query.dtype}, {key.dtype}, {value.dtype}"
    if key.shape != value.shape:
        return "key and value differ"
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        return "query and key differ in batch or head_dim"
    if query.shape[3] % 8 or not 8 <= query.shape[3] <= 256:
        return "head_dim must be a multiple of 8 up to 256"
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        return "query heads must be a multiple of key heads"
    if query.shape[2] > key.shape[2]:
        return "there are more queries than keys"
    if any(x.stride(3) != 1 for x in (query, key, value)):
        return "last strides must be 1"
    if any(x.stride(2) >= _LARGEST_STRIDE and x.shape[2] > 1 for x in (query, key, value)):
        return f"strides between tokens must be below {_LARGEST_STRIDE}"
    return None


def _number_problem(scale: float, window: int | None, far_first: int | None, softcap: float | None) -> str | None:
    if not scale > 0:
        return f"scale must be above 0, got {scale}"
    if window is not None and window < 0:
        return f"window must be 0 or more, got {window}"
    if far_first is not None and far_first < (window or 0):
        return f"far_first must not be less than window {window}, got {far_first}"
    if softcap is not None and not softcap > 0:
        return f"softcap must be above 0, got {softcap}"
    return None


def _far_problem(
    query: Tensor, key: Tensor, far_query: Tensor, far_key: Tensor, window: int | None, far_first: int | None
) -> str | None:
    first = far_first if far_first is not None else window
    if window is None or first is None:
        return "far tensors need a window"
    if far_query.shape != query.shape or (*far_key.shape[:2], far_key.shape[3]) != (*key.shape[:2], key.shape[3]):
        return "far tensors do not fit the near ones"
    if far_key.shape[2] < key.shape[2] - first:
        return f"far_key needs {key.shape[2] - first} slots"
    if not far_query.dtype == far_key.dtype == query.dtype:
        return f"dtypes differ: {query.dtype}, {far_query.dtype}, {far_key.dtype}"
    if any(x.stride(3) != 1 or (x.stride(2) >= _LARGEST_STRIDE and x.shape[2] > 1) for x in (far_query, far_key)):
        return f"last strides must be 1, and those between tokens below {_LARGEST_STRIDE}"
    return None


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


@triton.jit(do_not_specialize=["rows", "heads", "groups", "queries", "keys", "window", "far_first", "together"])
def _banded(
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    far_query: tl.tensor | None,
    far_key: tl.tensor | None,
    sinks: tl.tensor | None,
    output: tl.tensor,
    lse: tl.tensor | None,
    query_batch: tl.tensor,
    query_head: tl.tensor,
    query_token: tl.tensor,
    key_batch: tl.tensor,
    key_head: tl.tensor,
    key_token: tl.tensor,
    value_batch: tl.tensor,
    value_head: tl.tensor,
    value_token: tl.tensor,
    far_query_batch: tl.tensor,
    far_query_head: tl.tensor,
    far_query_token: tl.tensor,
    far_key_batch: tl.tensor,
    far_key_head: tl.tensor,
    far_key_token: tl.tensor,
    scale: float,
    cap_scale: float,
    cap: float,
    rows: tl.tensor,
    heads: tl.tensor,
    groups: tl.tensor,
    queries: tl.tensor,
    keys: tl.tensor,
    window: tl.tensor,
    far_first: tl.tensor,
    together: tl.tensor,
    first_kind: tl.constexpr,
    has_hole: tl.constexpr,
    has_softcap: tl.constexpr,
    head_dim: tl.constexpr,
    block_dim: tl.constexpr,
    block_queries: tl.constexpr,
    block_keys: tl.constexpr,
    edge_keys: tl.constexpr,
    stages: tl.constexpr,
    edge_stages: tl.constexpr,
) -> None:
    """One tile of queries of one row, a row being a head of the batch."""
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
    edge_begin = tl.maximum(first - far_first + 1, 0) // block_keys * block_keys
    edge_end = 0
    if first_kind <= _EDGE:
        edge_end = tl.cdiv(tl.maximum(last - window + 1, 0), edge_keys) * edge_keys
    near_end = edge_end + tl.maximum(first + 1 - edge_end, 0) // block_keys * block_keys
    if has_hole:
        # Between the last tile with a far key and the first with a near one, some are skipped.
        hole = tl.cdiv(tl.maximum(last - far_first + 1, 0), edge_keys) * edge_keys
        skipped = tl.maximum(first - window + 1 - hole, 0) // edge_keys * edge_keys

    if far_query is not None:
        far_query += batch * far_query_batch + head * far_query_head
        far_key += batch * far_key_batch + shared_head * far_key_head
    query += batch * query_batch + head * query_head
    key += batch * key_batch + shared_head * key_head
    value += batch * value_batch + shared_head * value_head
    present = (first_query + tl.arange(0, block_queries) < queries)[:, None]  # (block_queries, 1)
    slot = first + tl.arange(0, block_queries)[:, None]  # (block_queries, 1)

    # The softmax so far: values times exp2(score - peak), the sum of these weights, the largest score; in all of it
    # scores are multiplied by log2(e).
    sums = tl.zeros((block_queries, block_dim), tl.float32)
    total = tl.zeros((block_queries,), tl.float32)
    peak = tl.full((block_queries,), -float("inf"), tl.float32)
    if sinks is not None:
        # A sink is a score met before all others.
        total += 1
        peak = tl.zeros((block_queries,), tl.float32) + tl.load(sinks + head).to(tl.float32) * _LOG2_E

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
                end = last + 1

        for tile in tl.range(
            begin,
            end,
            edge_keys if kind % 2 else block_keys,
            num_stages=edge_stages if kind % 2 else stages,
        ):
            edge: tl.constexpr = kind == _EDGE
            masked: tl.constexpr = edge or kind == _DIAGONAL
            tile_keys: tl.constexpr = edge_keys if masked else block_keys
            both: tl.constexpr = edge and far_query is not None
            start = tile
            inside = None
            if both and has_hole:
                start = tl.where(tile < hole, tile, tile + skipped)
            if masked:
                column = start + tl.arange(0, tile_keys)[None, :]  # (1, tile_keys)
                distance = slot - column  # (block_queries, tile_keys)
                seen = distance >= 0
                column = tl.trans(column)
                inside = column <= last  # (tile_keys, 1), as the masks below: keys that some query sees
            if kind == _FAR:
                k = _load(far_key, start, far_key_token, None, head_dim, block_dim, tile_keys)
                scores = tl.dot(far_q, tl.trans(k), input_precision="ieee")  # (block_queries, tile_keys)
            else:
                k = _load(key, start, key_token, inside, head_dim, block_dim, tile_keys)
                scores = tl.dot(near_q, tl.trans(k), input_precision="ieee")  # (block_queries, tile_keys)
            if both:
                inside_far = column <= last - far_first
                k = _load(far_key, start, far_key_token, inside_far, head_dim, block_dim, tile_keys)
                far_scores = tl.dot(far_q, tl.trans(k), input_precision="ieee")  # (block_queries, tile_keys)
                scores = tl.where(distance < far_first, scores, far_scores)
                if has_hole:
                    seen &= (distance < window) | (distance >= far_first)
                    inside &= (column > first - window) | inside_far
            elif edge:
                seen &= distance < window
                inside &= column > first - window
            if has_softcap:
                # cap * tanh, in a form that neither overflows nor subtracts infinities.
                scores = cap - 2 * cap / (tl.exp2(scores * cap_scale) + 1)
            if masked:
                scores = tl.where(seen, scores, -float("inf"))
            new_peak = tl.maximum(peak, tl.max(scores, 1) * scale)
            level = new_peak
            if masked:
                # A query that has not seen a key yet must not subtract infinity from infinity.
                level = tl.where(new_peak == -float("inf"), 0.0, new_peak)
            weights = tl.exp2(scores * scale - level[:, None])  # (block_queries, tile_keys)
            fade = tl.exp2(peak - level)  # (block_queries,)
            v = _load(value, start, value_token, inside, head_dim, block_dim, tile_keys)
            total = total * fade + tl.sum(weights, 1)
            sums = tl.dot(weights.to(v.dtype), v, sums * fade[:, None], input_precision="ieee")
            peak = new_peak

    total = tl.where(total > 0, total, 1.0)  # a query that sees no key: zeros, and -inf as it is in `peak`
    sums = sums / total[:, None]
    place = tl.cast(row, tl.int64) * queries + first_query  # of the tile's first query among all
    here = tl.arange(0, block_queries)
    dim = tl.arange(0, block_dim)[None, :]
    pointers = output + place * head_dim + (here[:, None] * head_dim + dim)
    tl.store(pointers, sums.to(output.dtype.element_ty), mask=present & (dim < head_dim))
    if lse is not None:
        tl.store(lse + place + here, (peak + tl.log2(total)) * _LN_2, mask=first_query + here < queries)
