# SPDX-License-Identifier: Apache-2.0
"""The kernel of `hopper_prefill`: one warp loads tiles, two or three warp groups multiply them.

Written in Gluon, which lets a kernel place its warps, barriers and asynchronous copies by hand. What a tile of queries
sees, oldest key left (n: near, f: far, full tiles; d: the diagonal, e: the edge between the bands):

    f f f f e n n n d

All go through one online softmax, masked tiles first. The band changes from key to key only in e, which is taken twice,
once as a masked near and once as a masked far tile: that is what two bands cost beyond one.
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

from ropewalk.ops.triton.primitives import LN_2, NO_END

# Named barriers of the hardware, of which there are 16. Triton takes the first ones, one for each part of the kernel.
_FREE = gl.constexpr(5)  # and the following: one a slot of keys, then one a slot of values
TURN = gl.constexpr(13)  # and the following: one a consumer


@gluon.constexpr_function
def _barrier_instruction(kind, threads):
    return f"bar.{kind} $1, {threads}; mov.u32 $0, $1;"


@gluon.jit
def named_barrier(kind: gl.constexpr, index, THREADS: gl.constexpr, WARPS: gl.constexpr):
    """Arrive at one of the hardware's named barriers without waiting, or wait there. Costs less than an mbarrier, at
    which Triton lets all warps meet before one arrives."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    threads = gl.full([32 * WARPS], index, gl.int32, layout)
    gl.inline_asm_elementwise(
        _barrier_instruction(kind, THREADS), "=r,r", [threads], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def release(slot, CONSUMERS: gl.constexpr):
    """A consumer has read the slot. Slots of keys come first, then those of values."""
    named_barrier("arrive", _FREE + slot, 128 * CONSUMERS + 32, 4)


@gluon.jit
def acquire(slot, CONSUMERS: gl.constexpr):
    """The producer waits until all consumers have read the slot."""
    named_barrier("sync", _FREE + slot, 128 * CONSUMERS + 32, 1)


@gluon.jit
def _edge(token, numbers, DIAGONAL: gl.constexpr):
    """The key of an edge (`maps.edges.Edge`), whose back, block and cap `numbers` are, for the query at `token`."""
    back, block, cap = numbers
    key = gl.maximum(token - back, 0)
    if not DIAGONAL:
        key = gl.minimum(key // block * block, cap)
    return key


@gluon.jit
def _limits(row, is_far, near_low, near_high, far_high, DIAGONAL: gl.constexpr):
    """First key and end of what rows see through one band."""
    if DIAGONAL:
        low = _edge(row, (gl.where(is_far, NO_END, near_low[0]), 1, 1), True)
        high = _edge(row, (gl.where(is_far, far_high[0], near_high[0]), 1, 1), True)
    else:
        low = gl.where(is_far, 0, _edge(row, near_low, False))
        high = gl.where(is_far, _edge(row, far_high, False), _edge(row, near_high, False))
    return low, high


@gluon.jit
def _tiles(first, problem, ROWS: gl.constexpr, KEYS: gl.constexpr, DIAGONAL: gl.constexpr):
    """Tiles of keys that the queries `first .. first + ROWS - 1` see. Of near ones there is always one.

    Returns:
        near_top, near_bottom: the last and the first tile with near keys. full_top, full_bottom: of those, the ones
        without a mask (full_top = full_bottom - 1 for none). far: tiles with far keys. far_full: those without a mask.
    """
    queries, past, near_low, near_high, far_high = problem
    oldest = past + first
    newest = past + gl.minimum(first + ROWS, queries) - 1
    # Rows past the last query are masked like the others, so that a tile is full for them too.
    last_row = oldest + ROWS - 1
    near_bottom = _edge(oldest, near_low, DIAGONAL) // KEYS
    full_bottom = (_edge(last_row, near_low, DIAGONAL) + KEYS - 1) // KEYS
    if DIAGONAL:
        near_top = newest // KEYS
        full_top = gl.maximum((oldest + 1) // KEYS, full_bottom) - 1
    else:
        near_top = (gl.maximum(_edge(newest, near_high, DIAGONAL), 1) - 1) // KEYS
        near_bottom = gl.minimum(near_bottom, near_top)
        # The first tile that is taken, the top one, is always masked.
        full_bottom = gl.minimum(full_bottom, near_top)
        full_top = gl.maximum(gl.minimum(_edge(oldest, near_high, DIAGONAL) // KEYS, near_top), full_bottom) - 1
    far = (_edge(newest, far_high, DIAGONAL) + KEYS - 1) // KEYS
    far_full = _edge(oldest, far_high, DIAGONAL) // KEYS
    return near_top, near_bottom, full_top, full_bottom, far, far_full


@gluon.jit
def _masked_tile(i, near_top, near_bottom, full_top, full_bottom, far):
    """The i-th of the masked tiles, which are taken first: the near ones from the top, then the far ones."""
    full = full_top - full_bottom + 1
    near = near_top - near_bottom + 1 - full
    j = gl.where(i < near_top - full_top, near_top - i, near_top - full - i)
    return gl.where(i < near, j, far - 1 - (i - near)), i >= near


@gluon.jit
def _full_tile(i, full_top, full_bottom, far_full):
    """The i-th of the tiles without a mask: the near ones from the top, then the far ones."""
    near = full_top - full_bottom + 1
    return gl.where(i < near, full_top - i, far_full - 1 - (i - near)), i >= near


@gluon.jit
def _copy(desc, slot, buffer, full, b, h, j, wanted, KEYS: gl.constexpr):
    tma.async_copy_global_to_shared(desc, [b, h, j * KEYS, 0], full.index(slot), buffer.index(slot), pred=wanted)


@gluon.jit
def _load(desc, slot, buffer, full, b, h, j, KEYS: gl.constexpr):
    mbarrier.expect(full.index(slot), desc.block_type.nbytes)
    _copy(desc, slot, buffer, full, b, h, j, True, KEYS)


@gluon.jit
def _load_value(i, desc, v_buffer, v_full, b, h, j, KEYS: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr):
    if i >= STAGES:
        acquire(STAGES + i % STAGES, CONSUMERS)
    _load(desc, i % STAGES, v_buffer, v_full, b, h, j, KEYS)


@gluon.jit
def _produce(
    descriptors, work, ROWS: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr,
    DIAGONAL: gl.constexpr,
):  # fmt: skip
    """The producer's part: one warp that keeps the buffers full."""
    q_desc, far_q_desc, k_desc, far_k_desc, v_desc = descriptors
    buffers, barriers, place, problem = work
    q_buffer, k_buffer, v_buffer = buffers
    q_full, far_q_full, k_full, v_full = barriers
    b, h, key_head, first = place
    near_top, near_bottom, full_top, full_bottom, far, far_full = _tiles(
        first, problem, ROWS * CONSUMERS, KEYS, DIAGONAL
    )
    mbarrier.expect(q_full, CONSUMERS * q_desc.block_type.nbytes)
    for c in gl.static_range(CONSUMERS):
        tma.async_copy_global_to_shared(q_desc, [b, h, first + c * ROWS, 0], q_full, q_buffer.index(c))
    _load(k_desc, 0, k_buffer, k_full, b, key_head, near_top, KEYS)
    if far > 0:
        mbarrier.expect(far_q_full, CONSUMERS * far_q_desc.block_type.nbytes)
        for c in gl.static_range(CONSUMERS):
            tma.async_copy_global_to_shared(
                far_q_desc, [b, h, first + c * ROWS, 0], far_q_full, q_buffer.index(CONSUMERS + c)
            )
    masked = near_top - near_bottom + 1 - (full_top - full_bottom + 1) + far - far_full
    last = near_top - near_bottom + far
    # Values are one tile behind: they are needed after the scores of the next one.
    before = near_top
    for i in range(1, last + 1):
        masked_j, masked_is_far = _masked_tile(i, near_top, near_bottom, full_top, full_bottom, far)
        full_j, full_is_far = _full_tile(i - masked, full_top, full_bottom, far_full)
        j = gl.where(i < masked, masked_j, full_j)
        is_far = gl.where(i < masked, masked_is_far, full_is_far)
        if i >= STAGES:
            acquire(i % STAGES, CONSUMERS)
        mbarrier.expect(k_full.index(i % STAGES), k_desc.block_type.nbytes)
        _copy(k_desc, i % STAGES, k_buffer, k_full, b, key_head, j, is_far == 0, KEYS)
        _copy(far_k_desc, i % STAGES, k_buffer, k_full, b, key_head, j, is_far, KEYS)
        _load_value(i - 1, v_desc, v_buffer, v_full, b, key_head, before, KEYS, STAGES, CONSUMERS)
        before = j
    _load_value(last, v_desc, v_buffer, v_full, b, key_head, before, KEYS, STAGES, CONSUMERS)


@gluon.jit
def _scores(
    q_buffer,
    slot,
    k_buffer,
    k,
    ROWS: gl.constexpr,
    KEYS: gl.constexpr,
    D: gl.constexpr,
    LAYOUT: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Starts the product of queries and keys."""
    query = q_buffer.index(slot).reshape([ROWS, D])
    key = k_buffer.index(k % STAGES).reshape([KEYS, D]).permute([1, 0])
    zero = gl.zeros([ROWS, KEYS], gl.float32, LAYOUT)
    return warpgroup_mma(query, key, zero, use_acc=False, is_async=True)


@gluon.jit
def _mask(s, low, high, j, KEYS: gl.constexpr, LAYOUT: gl.constexpr):
    """The scores of keys from `low` (None: any) to `high - 1` of each row; the others are no longer seen."""
    column = gl.arange(0, KEYS, gl.SliceLayout(0, LAYOUT))
    s = gl.where(column[None, :] < (high - j * KEYS)[:, None], s, float("-inf"))
    if low is not None:
        s = gl.where(column[None, :] >= (low - j * KEYS)[:, None], s, float("-inf"))
    return s


@gluon.jit
def thread_sums(p):
    """Sums of the columns that one thread holds, shape (rows, 4): four threads share a row."""
    return gl.sum(gl.sum(p.reshape([p.shape[0], p.shape[1] // 8, 4, 2]), 3), 1)


@gluon.jit
def maximum(s, m, scale):
    """Row maximum of the scores so far, in powers of two."""
    return gl.maximum(m, gl.max(s, 1) * scale)


@gluon.jit
def weights(s, m, m_new, l, scale, MASKED: gl.constexpr):
    """The rest of a step of the online softmax: weights, row sums by thread, and the factor of what came before."""
    shift = m_new
    if MASKED:
        shift = gl.where(m_new == float("-inf"), 0.0, m_new)
    p = gl.exp2(s * scale - shift[:, None])
    alpha = gl.exp2(m - shift)
    sums = thread_sums(p)
    l = l * gl.convert_layout(alpha, gl.SliceLayout(1, sums.type.layout))[:, None] + sums
    return p, l, alpha


@gluon.jit
def _step(
    i, last, j, buffers, barriers, p, m, l, alpha, o, low, high, scale, slot, c: gl.constexpr,
    MASKED: gl.constexpr, S_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr,
    ROWS: gl.constexpr, KEYS: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr,
):  # fmt: skip
    """Scores and weights of tile i, and beside them the product of tile i - 1 with its values."""
    q_buffer, k_buffer, v_buffer = buffers
    _, _, k_full, v_full = barriers
    before = i - 1
    # Consumers start their products in turn: while one computes weights, another's products run.
    named_barrier("sync", TURN + c, 256, 4)
    s = _scores(q_buffer, slot, k_buffer, i, ROWS, KEYS, D, S_LAYOUT, STAGES)
    # The output is scaled here, while the scores are computed, and not right after its own product.
    o = o * gl.convert_layout(alpha, gl.SliceLayout(1, o.type.layout))[:, None]
    mbarrier.wait(v_full.index(before % STAGES), (before // STAGES) & 1)
    o = warpgroup_mma(p, v_buffer.index(before % STAGES).reshape([KEYS, D]), o, is_async=True)
    named_barrier("arrive", TURN + (c + 1) % CONSUMERS, 256, 4)
    mbarrier.wait(k_full.index((i + 1) % STAGES), ((i + 1) // STAGES) & 1, pred=i < last)
    s = warpgroup_mma_wait(1, deps=[s])
    if i + STAGES <= last:
        release(i % STAGES, CONSUMERS)
    if MASKED:
        s = _mask(s, low, high, j, KEYS, S_LAYOUT)
    m_new = maximum(s, m, scale)
    # The product reads the old weights until here: then the new ones can take their registers.
    o, p = warpgroup_mma_wait(0, deps=[o, p])
    if before + STAGES <= last:
        release(STAGES + before % STAGES, CONSUMERS)
    x, l, alpha = weights(s, m, m_new, l, scale, MASKED)
    x = gl.convert_layout(x.to(v_buffer.dtype), P_LAYOUT)
    # Nothing is under way: this only keeps the compiler from carrying the weights one by one.
    x = warpgroup_mma_wait(0, deps=[x])
    return x, m_new, l, alpha, o


@gluon.jit
def _consume(
    c: gl.constexpr, out_desc, lse, heads, scale, work,
    ROWS: gl.constexpr, KEYS: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr,
    DIAGONAL: gl.constexpr,
):  # fmt: skip
    """A consumer's part: one warp group with `ROWS` queries."""
    buffers, barriers, place, problem = work
    q_buffer, k_buffer, v_buffer = buffers
    q_full, far_q_full, k_full, v_full = barriers
    b, h, _, first = place
    queries, past, near_low, near_high, far_high = problem
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    near_top, near_bottom, full_top, full_bottom, far, far_full = _tiles(
        first, problem, ROWS * CONSUMERS, KEYS, DIAGONAL
    )
    masked = near_top - near_bottom + 1 - (full_top - full_bottom + 1) + far - far_full
    last = near_top - near_bottom + far
    own = first + c * ROWS
    row = past + own + gl.arange(0, ROWS, gl.SliceLayout(1, S_LAYOUT))

    m = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, S_LAYOUT))
    l = thread_sums(gl.zeros([ROWS, KEYS], gl.float32, S_LAYOUT))
    o = gl.zeros([ROWS, D], gl.float32, O_LAYOUT)
    mbarrier.wait(q_full, 0)
    mbarrier.wait(k_full.index(0), 0)
    s = _scores(q_buffer, c, k_buffer, 0, ROWS, KEYS, D, S_LAYOUT, STAGES)
    s = warpgroup_mma_wait(0, deps=[s])
    if last >= STAGES:
        release(0, CONSUMERS)
    if DIAGONAL:
        # The window is no smaller than a tile: it hides nothing of the newest one.
        s = _mask(s, None, row + 1, near_top, KEYS, S_LAYOUT)
    else:
        high = _edge(row, near_high, DIAGONAL)
        s = _mask(s, _edge(row, near_low, DIAGONAL), high, near_top, KEYS, S_LAYOUT)
    m_new = maximum(s, m, scale)
    x, l, alpha = weights(s, m, m_new, l, scale, True)
    m = m_new
    p = gl.convert_layout(x.to(v_buffer.dtype), P_LAYOUT)
    mbarrier.wait(k_full.index(1 % STAGES), (1 // STAGES) & 1, pred=last > 0)
    if far > 0:
        mbarrier.wait(far_q_full, 0)
    # Two loops, not one a band and a kind of tile: what the warp groups run must fit the instruction cache.
    if c == CONSUMERS - 1:
        named_barrier("arrive", TURN, 256, 4)
    for i in range(1, masked):
        j, is_far = _masked_tile(i, near_top, near_bottom, full_top, full_bottom, far)
        low, high = _limits(row, is_far, near_low, near_high, far_high, DIAGONAL)
        p, m, l, alpha, o = _step(
            i, last, j, buffers, barriers, p, m, l, alpha, o, low, high, scale,
            c + CONSUMERS * is_far.to(gl.int32), c,
            True, S_LAYOUT, P_LAYOUT, ROWS, KEYS, D, STAGES, CONSUMERS,
        )  # fmt: skip
    for i in range(masked, last + 1):
        _, is_far = _full_tile(i - masked, full_top, full_bottom, far_full)
        p, m, l, alpha, o = _step(
            i, last, 0, buffers, barriers, p, m, l, alpha, o, None, 0, scale,
            c + CONSUMERS * is_far.to(gl.int32), c,
            False, S_LAYOUT, P_LAYOUT, ROWS, KEYS, D, STAGES, CONSUMERS,
        )  # fmt: skip
    o = o * gl.convert_layout(alpha, gl.SliceLayout(1, O_LAYOUT))[:, None]
    mbarrier.wait(v_full.index(last % STAGES), (last // STAGES) & 1)
    o = warpgroup_mma(p, v_buffer.index(last % STAGES).reshape([KEYS, D]), o, is_async=True)
    if c == 0:
        named_barrier("sync", TURN, 256, 4)
    total = gl.convert_layout(gl.sum(l, 1), gl.SliceLayout(1, S_LAYOUT))
    o, p = warpgroup_mma_wait(0, deps=[o, p])
    if not DIAGONAL:
        total = gl.where(total > 0, total, 1.0)  # a query that sees no key: zeros, and -inf as it is in m
    o = o * gl.convert_layout(1.0 / total, gl.SliceLayout(1, O_LAYOUT))[:, None]
    # No one reads this consumer's near queries any more.
    staged = q_buffer.index(c)
    staged.reshape([ROWS, D]).store(o.to(v_buffer.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(out_desc, [b, h, own, 0], staged)
    if lse is not None:
        r = own + gl.arange(0, ROWS, gl.SliceLayout(1, S_LAYOUT))
        gl.store(lse + (b * heads + h).to(gl.int64) * queries + r, (m + gl.log2(total)) * LN_2, mask=r < queries)
    tma.store_wait(0)


_EDGES = [f"{edge}_{of}" for edge in ("near_low", "near_high", "far_high") for of in ("back", "block", "cap")]


@gluon.jit(do_not_specialize=["heads", "groups", "queries", "past", *_EDGES])
def banded(
    q_desc, far_q_desc, k_desc, far_k_desc, v_desc, out_desc, lse,
    heads, groups, queries, past,
    near_low_back, near_low_block, near_low_cap, near_high_back, near_high_block, near_high_cap,
    far_high_back, far_high_block, far_high_cap, scale,
    ROWS: gl.constexpr, KEYS: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr,
    DIAGONAL: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    # The heads that share keys are next to each other, and the queries with most keys come first.
    tiles = gl.num_programs(0) // groups
    tile = tiles - 1 - gl.program_id(0) // groups
    key_head = gl.program_id(1)
    h = key_head * groups + gl.program_id(0) % groups
    b = gl.program_id(2)
    first = tile * (ROWS * CONSUMERS)
    q_buffer = gl.allocate_shared_memory(q_desc.dtype, [2 * CONSUMERS, 1, 1, ROWS, D], q_desc.layout)
    k_buffer = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, 1, KEYS, D], k_desc.layout)
    v_buffer = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, 1, KEYS, D], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    far_q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    mbarrier.init(far_q_full, count=1)
    for s in gl.static_range(STAGES):
        mbarrier.init(k_full.index(s), count=1)
        mbarrier.init(v_full.index(s), count=1)
    fence_async_shared()
    descriptors = (q_desc, far_q_desc, k_desc, far_k_desc, v_desc)
    buffers = (q_buffer, k_buffer, v_buffer)
    barriers = (q_full, far_q_full, k_full, v_full)
    near_low = (near_low_back, near_low_block, near_low_cap)
    near_high = (near_high_back, near_high_block, near_high_cap)
    far_high = (far_high_back, far_high_block, far_high_cap)
    work = (buffers, barriers, (b, h, key_head, first), (queries, past, near_low, near_high, far_high))
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (0, out_desc, lse, heads, scale, work, ROWS, KEYS, D, STAGES, CONSUMERS, DIAGONAL)),
                (_consume, (1, out_desc, lse, heads, scale, work, ROWS, KEYS, D, STAGES, CONSUMERS, DIAGONAL)),
                (_produce, (descriptors, work, ROWS, KEYS, STAGES, CONSUMERS, DIAGONAL)),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )
    else:
        gl.static_assert(CONSUMERS == 3)
        gl.warp_specialize(
            [
                (_consume, (0, out_desc, lse, heads, scale, work, ROWS, KEYS, D, STAGES, CONSUMERS, DIAGONAL)),
                (_consume, (1, out_desc, lse, heads, scale, work, ROWS, KEYS, D, STAGES, CONSUMERS, DIAGONAL)),
                (_consume, (2, out_desc, lse, heads, scale, work, ROWS, KEYS, D, STAGES, CONSUMERS, DIAGONAL)),
                (_produce, (descriptors, work, ROWS, KEYS, STAGES, CONSUMERS, DIAGONAL)),
            ],
            [4, 4, 1],
            [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )
