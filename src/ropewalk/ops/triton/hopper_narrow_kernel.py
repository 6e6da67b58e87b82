# SPDX-License-Identifier: Apache-2.0
"""The kernel of `hopper_narrow`: one warp loads tiles, a warp group re-rotates queries, two more multiply.

Written in Gluon, as `hopper_prefill_kernel`. A program has the heads that share a key head at a few consecutive
positions. The two groups that multiply go through the tiles of all bands in one online softmax, each tile the
re-rotated keys of one band, while the third re-rotates the queries for the next band.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ropewalk.ops.triton.hopper_prefill_kernel import (
    TURN,
    acquire,
    maximum,
    named_barrier,
    release,
    thread_sums,
    weights,
)
from ropewalk.ops.triton.primitives import (
    COLUMNS,
    LOG2_E,
    ROUNDER,
    TURNS_A_RADIAN,
    TWO_PI_HIGH,
    TWO_PI_LOW,
    TWO_PI_MIDDLE,
)

# Columns of the table of tiles, int32: 0 where a tile's keys begin, counted from the program's first position; 1, 2
# first and stop distance of its band; 3 the band's number; 4 the largest of column 0 from this tile on; 5 what leads
# from a key to its slot among the re-rotated ones, but for what depends on the chunk; and two more, so that rows align.
TILE_COLUMNS = gl.constexpr(8)
# Heads times positions of a warp group, and warp groups that multiply.
ROWS = gl.constexpr(64)
CONSUMERS = gl.constexpr(2)
# Re-rotated queries of a consumer in shared memory: those of one band, and those of the next one.
_SLOTS = gl.constexpr(2)
# Named barriers beside those of `hopper_prefill_kernel` for two stages, one for each of these slots: it may be
# overwritten.
_QUERIES_FREE = gl.constexpr(9)
# Of a thread of a consumer, of the warp group that re-rotates queries, and of the producer. The first consumer gets
# what the others leave of 512, which is as much as the second one has.
_CONSUMER_REGISTERS = gl.constexpr(200)
_ROTATING_REGISTERS = gl.constexpr(88)
_PRODUCER_REGISTERS = gl.constexpr(24)


@gluon.constexpr_function
def _rotating_layout(HEADS, POSITIONS, D, both):
    """The layout in which a thread holds the same pairs, eight, of several heads: (heads, positions, pairs), or with
    `both` all dimensions as (rows, D)."""

    def row(r):
        if both:
            return [r, 0]
        return [0, r, 0] if r < POSITIONS else [r // POSITIONS, 0, 0]

    def column(d):
        return [0, d] if both else [0, 0, d]

    registers = [column(d) for d in (1, 2, 4)] + ([column(D // 2)] if both else [])
    lanes, d = [], 8
    while d < D // 2:
        lanes.append(column(d))
        d *= 2
    r = 1
    while len(lanes) < 5:
        lanes.append(row(r))
        r *= 2
    warps = [row(r), row(2 * r)]
    r *= 4
    while r < HEADS * POSITIONS:
        registers.append(row(r))
        r *= 2
    shape = [HEADS * POSITIONS, D] if both else [HEADS, POSITIONS, D // 2]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], shape)


@gluon.jit
def _product(a, b):
    """A product rounded to float32: it must not melt into the next addition."""
    return gl.inline_asm_elementwise("mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _fast(name: gl.constexpr, angle):
    return gl.inline_asm_elementwise(name, "=f,f", [angle], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _to_float32(x):
    """x as float32. Triton takes one instruction more for every second bfloat16."""
    if x.dtype == gl.bfloat16:
        x = gl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=f,=f,r", [x], dtype=gl.float32, is_pure=True, pack=2
        )
    return x.to(gl.float32)


@gluon.jit
def _angle(to, come, frequency):
    """As in `primitives.rerotate`."""
    to = _product(to, frequency)
    come = _product(come, frequency)
    angle = to - come
    lost = to - (angle + come)
    turns = gl.fma(angle, gl.full_like(angle, TURNS_A_RADIAN), gl.full_like(angle, ROUNDER))
    turns = ROUNDER - turns
    angle = gl.fma(turns, gl.full_like(angle, TWO_PI_HIGH), angle)
    angle = gl.fma(turns, gl.full_like(angle, TWO_PI_MIDDLE), angle)
    return gl.fma(turns, gl.full_like(angle, TWO_PI_LOW), angle) + lost


@gluon.jit
def _rerotate_queries(
    buffers, barriers, problem, band_table, frequencies, bands,
    HEADS: gl.constexpr, POSITIONS: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """The part of the warp group that re-rotates queries: for every band those of both consumers."""
    raw_buffer, q_buffer, _, _ = buffers
    raw_full, _, q_full, _, _ = barriers
    _, begin = problem
    ROWS: gl.constexpr = HEADS * POSITIONS
    LAYOUT: gl.constexpr = _rotating_layout(HEADS, POSITIONS, D, False)
    ROW_LAYOUT: gl.constexpr = _rotating_layout(HEADS, POSITIONS, D, True)
    PLACES: gl.constexpr = gl.SliceLayout(0, LAYOUT)
    frequency = gl.load(frequencies + gl.arange(0, D // 2, gl.SliceLayout(0, PLACES)))[None, :]
    place = begin + gl.arange(0, POSITIONS, gl.SliceLayout(1, PLACES))
    # Numbers from memory are asked for one round before they are needed.
    size, shift = gl.load(band_table + 10), gl.load(band_table + 7)
    mbarrier.wait(raw_full, 0)
    for i in range(CONSUMERS * bands):
        band = i // CONSUMERS
        c = i % CONSUMERS
        slot = _SLOTS * c + band % _SLOTS
        tokens = place + c * POSITIONS
        mapped = (tokens // size + shift).to(gl.float32)
        next_numbers = band_table + COLUMNS * gl.minimum((i + 1) // CONSUMERS, bands - 1)
        size, shift = gl.load(next_numbers + 10), gl.load(next_numbers + 7)
        angle = _angle(mapped[:, None], tokens.to(gl.float32)[:, None], frequency)
        cosine = _fast("cos.approx.ftz.f32 $0, $1;", angle)[None, :, :]
        sine = _fast("sin.approx.ftz.f32 $0, $1;", angle)[None, :, :]
        x = raw_buffer.index(c).reshape([ROWS, D]).load(ROW_LAYOUT)
        first, second = x.reshape([HEADS, POSITIONS, 2, D // 2]).permute([0, 1, 3, 2]).split()
        first = _to_float32(gl.convert_layout(first, LAYOUT, assert_trivial=True))
        second = _to_float32(gl.convert_layout(second, LAYOUT, assert_trivial=True))
        first, cosine = gl.broadcast(first, cosine)
        first_seen = gl.fma(first, cosine, -(second * sine))
        second_seen = gl.fma(second, cosine, first * sine)
        x = gl.join(first_seen.to(x.dtype), second_seen.to(x.dtype)).permute([0, 1, 3, 2]).reshape([ROWS, D])
        # The second slots first hold what the consumers begin with.
        if band > 0:
            named_barrier("sync", _QUERIES_FREE + slot, 256, 4)
        q_buffer.index(slot).reshape([ROWS, D]).store(gl.convert_layout(x, ROW_LAYOUT, assert_trivial=True))
        fence_async_shared()
        gl.thread_barrier()
        mbarrier.arrive(q_full.index(slot), count=1)


@gluon.jit
def _produce(
    descriptors, buffers, barriers, place, problem, tiles, last, chunk,
    POSITIONS: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The producer's part: one warp that keeps the buffers full."""
    q_desc, k_desc, v_desc, out_desc = descriptors
    raw_buffer, q_buffer, k_buffer, v_buffer = buffers
    raw_full, out_full, _, k_full, v_full = barriers
    b, key_head, group = place
    query, begin = problem
    mbarrier.expect(raw_full, CONSUMERS * q_desc.block_type.nbytes)
    for c in gl.static_range(CONSUMERS):
        at = [b, key_head, group, query + c * POSITIONS, 0]
        tma.async_copy_global_to_shared(q_desc, at, raw_full, raw_buffer.index(c))
    mbarrier.expect(out_full, CONSUMERS * out_desc.block_type.nbytes)
    for c in gl.static_range(CONSUMERS):
        at = [b, key_head, group, query + c * POSITIONS, 0]
        tma.async_copy_global_to_shared(out_desc, at, out_full, q_buffer.index(_SLOTS * c + 1))
    chunk_begin = begin - gl.program_id(0) * (CONSUMERS * POSITIONS)
    # Values are one tile behind: they are needed after the scores of the next one.
    before = 0
    for i in range(last + 2):
        start = begin + gl.load(tiles + TILE_COLUMNS * i)
        slot = start - chunk_begin + gl.load(tiles + TILE_COLUMNS * i + 5)
        slot += gl.load(tiles + TILE_COLUMNS * i + 3) * (chunk - 1)
        if i <= last:
            if i >= STAGES:
                acquire(i % STAGES, CONSUMERS)
            full = k_full.index(i % STAGES)
            mbarrier.expect(full, k_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(k_desc, [b, key_head, slot, 0], full, k_buffer.index(i % STAGES))
        if i > 0:
            j = i - 1
            if j >= STAGES:
                acquire(STAGES + j % STAGES, CONSUMERS)
            full = v_full.index(j % STAGES)
            mbarrier.expect(full, v_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(v_desc, [b, key_head, before, 0], full, v_buffer.index(j % STAGES))
        before = start


@gluon.jit
def _tile(tiles, i):
    """Where the i-th tile begins, its band's first and stop distance, and its band."""
    row = tiles + TILE_COLUMNS * i
    return gl.load(row), gl.load(row + 1), gl.load(row + 2), gl.load(row + 3)


@gluon.jit
def _scores(query, key, ROWS: gl.constexpr, KEYS: gl.constexpr, D: gl.constexpr, LAYOUT: gl.constexpr):
    """Starts the product of queries and keys."""
    zero = gl.zeros([ROWS, KEYS], gl.float32, LAYOUT)
    key = key.reshape([KEYS, D]).permute([1, 0])
    return warpgroup_mma(query.reshape([ROWS, D]), key, zero, use_acc=False, is_async=True)


@gluon.jit
def _mask(s, row, tile, begin, NEAR: gl.constexpr, LAYOUT: gl.constexpr):
    """The scores of keys that are in the tile's band and in the text. `row`: positions, counted from `begin`. The first
    `NEAR` keys are far enough from every row: tiles are laid from a band's near end on."""
    start, first, stop, _ = tile
    column = gl.arange(0, s.shape[1], gl.SliceLayout(0, LAYOUT))
    # A thread's columns differ by constants, to which the rest is compared.
    lane = (column & 6)[None, :]
    column = (column & ~6)[None, :]
    here = row - start
    newest = (here - first)[:, None] - lane
    oldest = gl.maximum(here - stop + 1, -(begin + start))[:, None] - lane
    seen = ((column < NEAR - 6) | (column <= newest)) & (column >= oldest)
    return gl.where(seen, s, float("-inf"))


@gluon.jit
def _consume(
    c: gl.constexpr, out_desc, lse, buffers, barriers, place, problem, tiles, last, bands, groups, scale,
    HEADS: gl.constexpr, POSITIONS: gl.constexpr, KEYS: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A consumer's part: one warp group, with some heads at some positions."""
    _, q_buffer, k_buffer, v_buffer = buffers
    _, out_full, q_full, k_full, v_full = barriers
    b, key_head, group = place
    query, begin = problem
    sizes, queries, lse_head, lse_token = lse
    ROWS: gl.constexpr = HEADS * POSITIONS
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    # Keys that are far enough from a tile's first row, for a band begins no nearer than the program's last position.
    NEAR: gl.constexpr = KEYS - (CONSUMERS - c) * POSITIONS + 1
    r = gl.arange(0, ROWS, gl.SliceLayout(1, S_LAYOUT))
    row = c * POSITIONS + r % POSITIONS

    # The softmax goes on where the main pass stopped: as if one key with the value `output` had had the score `lse`.
    own_group = group + r // POSITIONS
    pointers = sizes + (key_head * groups + own_group).to(gl.int64) * lse_head + (query + row).to(gl.int64) * lse_token
    m = gl.load(pointers, mask=(own_group < groups) & (query + row < queries), other=0.0) * LOG2_E
    l = thread_sums(gl.zeros([ROWS, KEYS], gl.float32, S_LAYOUT))
    # Four threads share a row; one of them counts the key.
    known = gl.convert_layout(gl.where(m == float("-inf"), 0.0, 1.0), gl.SliceLayout(1, l.type.layout))[:, None]
    l = gl.where((gl.arange(0, 4, gl.SliceLayout(0, l.type.layout)) == 0)[None, :], known, l)
    mbarrier.wait(out_full, 0)
    o = q_buffer.index(_SLOTS * c + 1).reshape([ROWS, D]).load(O_LAYOUT).to(gl.float32)
    gl.thread_barrier()
    if bands > 1:
        named_barrier("arrive", _QUERIES_FREE + _SLOTS * c + 1, 256, 4)

    tile = _tile(tiles, 0)
    mbarrier.wait(q_full.index(_SLOTS * c), 0)
    mbarrier.wait(k_full.index(0), 0)
    s = _scores(q_buffer.index(_SLOTS * c), k_buffer.index(0), ROWS, KEYS, D, S_LAYOUT)
    next_tile = _tile(tiles, 1)
    s = warpgroup_mma_wait(0, deps=[s])
    if last >= STAGES:
        release(0, CONSUMERS)
    band = next_tile[3]
    if (band > 0) & (bands > _SLOTS):
        named_barrier("arrive", _QUERIES_FREE + _SLOTS * c, 256, 4)
    s = _mask(s, row, tile, begin, NEAR, S_LAYOUT)
    m_new = maximum(s, m, scale)
    x, l, alpha = weights(s, m, m_new, l, scale, True)
    m = m_new
    p = gl.convert_layout(x.to(v_buffer.dtype), P_LAYOUT)
    mbarrier.wait(k_full.index(1 % STAGES), (1 // STAGES) & 1, pred=last > 0)
    mbarrier.wait(q_full.index(_SLOTS * c + band % _SLOTS), (band // _SLOTS) & 1, pred=last > 0)
    if c == CONSUMERS - 1:
        named_barrier("arrive", TURN, 256, 4)
    for i in range(1, last + 1):
        before = i - 1
        tile = next_tile
        slot = _SLOTS * c + tile[3] % _SLOTS
        # Consumers start their products in turn: while one computes weights, another's products run.
        named_barrier("sync", TURN + c, 256, 4)
        s = _scores(q_buffer.index(slot), k_buffer.index(i % STAGES), ROWS, KEYS, D, S_LAYOUT)
        next_tile = _tile(tiles, i + 1)
        # The output is scaled here, while the scores are computed, and not right after its own product.
        o = o * gl.convert_layout(alpha, gl.SliceLayout(1, o.type.layout))[:, None]
        mbarrier.wait(v_full.index(before % STAGES), (before // STAGES) & 1)
        o = warpgroup_mma(p, v_buffer.index(before % STAGES).reshape([KEYS, D]), o, is_async=True)
        named_barrier("arrive", TURN + (c + 1) % CONSUMERS, 256, 4)
        mbarrier.wait(k_full.index((i + 1) % STAGES), ((i + 1) // STAGES) & 1, pred=i < last)
        band = next_tile[3]
        mbarrier.wait(q_full.index(_SLOTS * c + band % _SLOTS), (band // _SLOTS) & 1, pred=i < last)
        s = warpgroup_mma_wait(1, deps=[s])
        if i + STAGES <= last:
            release(i % STAGES, CONSUMERS)
        if (band != tile[3]) & (tile[3] + _SLOTS < bands):
            named_barrier("arrive", _QUERIES_FREE + slot, 256, 4)
        s = _mask(s, row, tile, begin, NEAR, S_LAYOUT)
        m_new = maximum(s, m, scale)
        # The product reads the old weights until here: then the new ones can take their registers.
        o, p = warpgroup_mma_wait(0, deps=[o, p])
        if before + STAGES <= last:
            release(STAGES + before % STAGES, CONSUMERS)
        x, l, alpha = weights(s, m, m_new, l, scale, True)
        m = m_new
        p = gl.convert_layout(x.to(v_buffer.dtype), P_LAYOUT)
        # Nothing is under way: this only keeps the compiler from carrying the weights one by one.
        p = warpgroup_mma_wait(0, deps=[p])
    o = o * gl.convert_layout(alpha, gl.SliceLayout(1, O_LAYOUT))[:, None]
    mbarrier.wait(v_full.index(last % STAGES), (last // STAGES) & 1)
    o = warpgroup_mma(p, v_buffer.index(last % STAGES).reshape([KEYS, D]), o, is_async=True)
    if c == 0:
        named_barrier("sync", TURN, 256, 4)
    total = gl.convert_layout(gl.sum(l, 1), gl.SliceLayout(1, S_LAYOUT))
    o, p = warpgroup_mma_wait(0, deps=[o, p])
    total = gl.where(total > 0, total, 1.0)
    o = o * gl.convert_layout(1.0 / total, gl.SliceLayout(1, O_LAYOUT))[:, None]
    # No one reads or re-rotates this consumer's queries any more.
    staged = q_buffer.index(_SLOTS * c)
    staged.reshape([ROWS, D]).store(o.to(v_buffer.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(out_desc, [b, key_head, group, query + c * POSITIONS, 0], staged)
    tma.store_wait(0)


_NUMBERS = ["past", "begin", "queries", "chunk", "all_tiles", "groups", "lse_batch", "lse_head", "lse_token"]


@gluon.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=["lse"])
def narrow(
    q_desc, k_desc, v_desc, out_desc, lse, tiles, band_table, frequencies,
    past, begin, queries, chunk, all_tiles, groups, scale, lse_batch, lse_head, lse_token,
    HEADS: gl.constexpr, POSITIONS: gl.constexpr, KEYS: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    MOST_TILES: gl.constexpr,
):  # fmt: skip
    gl.static_assert(STAGES <= 2, "there are no more named barriers")
    head_blocks = (groups + HEADS - 1) // HEADS
    key_head = gl.program_id(1) // head_blocks
    group = gl.program_id(1) % head_blocks * HEADS
    b = gl.program_id(2)
    begin += gl.program_id(0) * (CONSUMERS * POSITIONS)
    # Tiles that hold keys of the text: farther ones come later.
    i = gl.arange(0, MOST_TILES, gl.BlockedLayout([MOST_TILES // 32], [32], [4], [0]))
    reach = gl.load(tiles + TILE_COLUMNS * i + 4, mask=i < all_tiles, other=-(1 << 30))
    last = gl.sum((begin + reach + KEYS > 0).to(gl.int32), 0) - 1
    bands = gl.load(tiles + TILE_COLUMNS * last + 3) + 1

    raw_buffer = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS, 1, 1, HEADS, POSITIONS, D], q_desc.layout)
    q_buffer = gl.allocate_shared_memory(q_desc.dtype, [_SLOTS * CONSUMERS, 1, 1, HEADS, POSITIONS, D], q_desc.layout)
    k_buffer = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, 1, KEYS, D], k_desc.layout)
    v_buffer = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, 1, KEYS, D], v_desc.layout)
    raw_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    out_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [_SLOTS * CONSUMERS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(raw_full, count=1)
    mbarrier.init(out_full, count=1)
    for s in gl.static_range(_SLOTS * CONSUMERS):
        mbarrier.init(q_full.index(s), count=1)
    for s in gl.static_range(STAGES):
        mbarrier.init(k_full.index(s), count=1)
        mbarrier.init(v_full.index(s), count=1)
    fence_async_shared()
    descriptors = (q_desc, k_desc, v_desc, out_desc)
    buffers = (raw_buffer, q_buffer, k_buffer, v_buffer)
    barriers = (raw_full, out_full, q_full, k_full, v_full)
    place = (b, key_head, group)
    problem = (begin - past, begin)
    sizes = (lse + b.to(gl.int64) * lse_batch, queries, lse_head, lse_token)
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    0, out_desc, sizes, buffers, barriers, place, problem, tiles, last, bands, groups, scale,
                    HEADS, POSITIONS, KEYS, D, STAGES,
                ),
            ),
            (
                _consume,
                (
                    1, out_desc, sizes, buffers, barriers, place, problem, tiles, last, bands, groups, scale,
                    HEADS, POSITIONS, KEYS, D, STAGES,
                ),
            ),
            (
                _rerotate_queries,
                (
                    buffers, barriers, problem, band_table, frequencies, bands,
                    HEADS, POSITIONS, D,
                ),
            ),
            (
                _produce,
                (descriptors, buffers, barriers, place, problem, tiles, last, chunk, POSITIONS, KEYS, STAGES),
            ),
        ],
        [4, 4, 1],
        [_CONSUMER_REGISTERS, _ROTATING_REGISTERS, _PRODUCER_REGISTERS],
    )  # fmt: skip
