"""What kernels that re-rotate share: a map's bands as they read them, and the turning of pairs in registers."""

# mypy: disable-error-code="no-any-return", disallow-untyped-decorators=False

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.language.extra import libdevice

from ropewalk.maps import Band
from ropewalk.maps.positions import TRUE_POSITIONS, PositionFunction

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


@dataclass(frozen=True, eq=False)
class Tables:
    """Bands as kernels read them.

    Args:
        bands: int32, (bands, 4): first and stop distance, rows of `positions` for the query and for the keys.
        positions: float32, (functions, capacity): by true position. Row 0 holds the true positions themselves.
    """

    bands: Tensor
    positions: Tensor


def make_tables(bands: Iterable[Band], capacity: int, device: torch.device) -> Tables:
    """The tables of those bands that begin before `capacity` tokens."""
    bands = [band for band in bands if band.first < capacity]
    functions: dict[PositionFunction, int] = {TRUE_POSITIONS: 0}
    rows = []
    for band in bands:
        stop = NO_END.value if band.stop is None else min(band.stop, NO_END.value)
        first_row = functions.setdefault(band.query_positions, len(functions))
        rows.append((band.first, stop, first_row, functions.setdefault(band.key_positions, len(functions))))
    with torch.inference_mode(False), torch.no_grad():
        tokens = torch.arange(capacity, device=device)
        positions = torch.stack([function(tokens).float() for function in functions])
        tables = Tables(torch.tensor(rows, dtype=torch.int32, device=device), positions)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return tables


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
def turn(
    first: tl.tensor,
    second: tl.tensor,
    mapped: tl.tensor,
    true: tl.tensor,
    frequency: tl.tensor,
    fast_sine: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Pairs, float32 (tokens, pairs), turned from their `true` positions to their `mapped` ones, (tokens, 1) or scalar.

    The phases are float32, as the model's are; the angle between them is taken as if exactly.
    """
    to = mapped * frequency
    come = true * frequency
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
