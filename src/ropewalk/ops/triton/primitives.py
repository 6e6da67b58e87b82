# SPDX-License-Identifier: Apache-2.0
"""What kernels share: edges and positions, the softmax that goes on from tile to tile, and re-rotation in registers."""

# mypy: disable-error-code="no-any-return", disallow-untyped-decorators=False

from __future__ import annotations

import math

import triton
import triton.language as tl
from triton import knobs
from triton.language.extra import libdevice

INTERPRETED = knobs.runtime.interpret

# Numbers that kernels read.
NO_END = tl.constexpr(2**31 - 1)
TURNS_A_RADIAN = tl.constexpr(1 / (2 * math.pi))
# 2 pi in three parts. The first two are short: their products with whole turns are exact even where a multiply-add
# rounds twice, as in the interpreter.
TWO_PI_HIGH = tl.constexpr(6.28125)
TWO_PI_MIDDLE = tl.constexpr(127 / 65536)
TWO_PI_LOW = tl.constexpr(2 * math.pi - 6.28125 - 127 / 65536)
# Adding and taking away 1.5 * 2^23 rounds a float32 to a whole number.
ROUNDER = tl.constexpr(12582912.0)


# Columns of a table of bands; see `tables.BandTable`.
COLUMNS = tl.constexpr(12)
LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))
# As `call.LARGEST_SINK`.
LARGEST_SINK = tl.constexpr(1e38)


@triton.jit
def edge(token: tl.tensor, back: tl.tensor, block: tl.tensor, cap: tl.tensor, diagonal: tl.constexpr) -> tl.tensor:
    """The key of an edge (`maps.edges.Edge`) for the query at position `token`; `diagonal`: of block 1, with no cap."""
    key = tl.maximum(token - back, 0)
    if not diagonal:
        key = tl.minimum(key // block * block, cap)
    return key


@triton.jit
def band_keys(
    table: tl.tensor, band: tl.tensor, exists: tl.tensor, token: tl.tensor, diagonal: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """First key and end of what the query at `token` sees through a band, or through each of a vector of bands."""
    row = table + COLUMNS * band
    low_block, low_cap, high_block, high_cap = 1, 1, 1, 1
    if not diagonal:
        low_block = tl.load(row + 1, mask=exists, other=1)
        low_cap = tl.load(row + 2, mask=exists, other=1)
        high_block = tl.load(row + 4, mask=exists, other=1)
        high_cap = tl.load(row + 5, mask=exists, other=1)
    low = edge(token, tl.load(row, mask=exists, other=0), low_block, low_cap, diagonal)
    return low, edge(token, tl.load(row + 3, mask=exists, other=0), high_block, high_cap, diagonal)


@triton.jit
def mapped(
    tokens: tl.tensor,
    inverse: tl.tensor,
    shift: tl.tensor,
    positions: tl.tensor,
    capacity: tl.tensor,
    exists: tl.tensor,
) -> tl.tensor:
    """Positions (float32) of a position function for `tokens`; its two numbers as in `tables.BandTable`."""
    if inverse > 0:
        # Of tokens below `tables.LARGEST_FORMULA` this is the whole quotient, and takes a fifth of its time.
        found = tl.floor((tokens.to(tl.float32) + 0.5) * inverse) + shift.to(tl.float32)
    else:
        found = tl.load(positions + shift.to(tl.int64) * capacity + tokens, mask=exists, other=0.0)
    return found


def in_powers_of_2(scale: float, softcap: float | None) -> tuple[float, float, float]:
    """What kernels read for a scale and a softcap: `scale`, 1 where `softcapped` scales, and that one's two others."""
    scale = scale * LOG2_E.value
    return (scale, 0.0, 0.0) if softcap is None else (1.0, 2 * scale / softcap, softcap * LOG2_E.value)


@triton.jit
def softcapped(scores: tl.tensor, cap: float, cap_scale: float) -> tl.tensor:
    """`cap * tanh(scores * scale / softcap)`, in a form that neither overflows nor subtracts infinities.

    Args:
        cap: softcap * log2(e).
        cap_scale: 2 * log2(e) * scale / softcap.
    """
    return cap - 2 * cap / (tl.exp2(scores * cap_scale) + 1)


@triton.jit
def softmax_step(
    scores: tl.tensor, scale: float, peak: tl.tensor, masked: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """A tile's weights in the softmax so far, what fades the weights before it, and the largest score with it.

    In powers of two: `scale` holds log2(e).

    Args:
        scores: (rows, keys), -inf where nothing is seen.
        peak: (rows,), the largest score so far, times scale.
        masked: whether a row may not have seen a key yet, so that infinity must not be subtracted from infinity.
    """
    new_peak = tl.maximum(peak, tl.max(scores, 1) * scale)
    level = new_peak
    if masked:
        level = tl.where(new_peak == -float("inf"), 0.0, new_peak)
    return tl.exp2(scores * scale - level[:, None]), tl.exp2(peak - level), new_peak


@triton.jit
def load_sink(sinks: tl.tensor, head: tl.tensor) -> tl.tensor:
    """A head's sink as a score in powers of two; one that is no number stays none."""
    sink = tl.load(sinks + head).to(tl.float32)
    return tl.minimum(sink, LARGEST_SINK, propagate_nan=tl.PropagateNan.ALL) * LOG2_E


@triton.jit
def load_pairs(
    pointer: tl.tensor,
    offsets: tl.tensor,
    exists: tl.tensor,
    pairs: tl.constexpr,
    offset: tl.constexpr,
    interleaved: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The two dimensions of every rotated pair, (offsets, pairs) each; zeros where there is nothing."""
    block_pairs: tl.constexpr = max(16, triton.next_power_of_2(pairs))
    pointers = pointer + offset + offsets[:, None]
    if interleaved:
        dims = tl.arange(0, 2 * block_pairs)
        both = tl.load(pointers + dims[None, :], mask=exists[:, None] & (dims < 2 * pairs)[None, :], other=0.0)
        return tl.split(tl.reshape(both, (offsets.shape[0], block_pairs, 2)))
    dims = tl.arange(0, block_pairs)
    mask = exists[:, None] & (dims < pairs)[None, :]
    first = tl.load(pointers + dims[None, :], mask=mask, other=0.0)
    return first, tl.load(pointers + (dims + pairs)[None, :], mask=mask, other=0.0)


@triton.jit
def load_rest(
    pointer: tl.tensor,
    offsets: tl.tensor,
    exists: tl.tensor,
    head_dim: tl.constexpr,
    pairs: tl.constexpr,
    offset: tl.constexpr,
) -> tl.tensor:
    """The dimensions around the rotated ones, (offsets, others); zeros where there is nothing."""
    rest: tl.constexpr = head_dim - 2 * pairs
    dims = tl.arange(0, max(16, triton.next_power_of_2(rest)))
    at = dims + 2 * pairs
    if offset > 0:
        at = tl.where(dims < offset, dims, at)
    return tl.load(pointer + offsets[:, None] + at[None, :], mask=exists[:, None] & (dims < rest)[None, :], other=0.0)


@triton.jit
def rerotate(
    first: tl.tensor,
    second: tl.tensor,
    to: tl.tensor,
    come: tl.tensor,
    frequency: tl.tensor,
    fast_sine: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Pairs, float32 (tokens, pairs), re-rotated from positions they `come` from `to` others, (tokens, 1) or scalar.

    The phases are float32, as the model's are; the angle between them is taken as if exactly.
    """
    to = to * frequency
    come = come * frequency
    angle = to - come
    # What the difference lost: exact as long as the phase it leads to is at most twice the one it comes from.
    lost = to - (angle + come)
    turns = tl.fma(angle, tl.full(angle.shape, TURNS_A_RADIAN, tl.float32), tl.full(angle.shape, ROUNDER, tl.float32))
    turns = ROUNDER - turns  # negative
    angle = tl.fma(turns, tl.full(angle.shape, TWO_PI_HIGH, tl.float32), angle)
    angle = tl.fma(turns, tl.full(angle.shape, TWO_PI_MIDDLE, tl.float32), angle)
    angle = tl.fma(turns, tl.full(angle.shape, TWO_PI_LOW, tl.float32), angle) + lost
    if fast_sine:
        cosine, sine = libdevice.fast_cosf(angle), libdevice.fast_sinf(angle)
    else:
        cosine, sine = tl.cos(angle), tl.sin(angle)
    return tl.fma(first, cosine, -(second * sine)), tl.fma(second, cosine, first * sine)
