# SPDX-License-Identifier: Apache-2.0
"""Re-rotation of tensors that a model has rotated, as one pass through memory."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ropewalk.maps.positions import PositionFunction
from ropewalk.ops.rotary import Rotary
from ropewalk.ops.triton.launch import Launch, multiples_of_16

# Pairs that a program re-rotates at a time, eight for each thread: 16 bytes of float16 or bfloat16 a load.
_PAIRS_PER_TILE = 1024
_WARPS = 4
# Heads that share the tables a program has loaded. Programs of the same tokens run side by side, so the tables come
# from memory once however many programs there are.
_HEADS_PER_PROGRAM = 8


def rerotate(x: Tensor, function: PositionFunction, begin: int, rotary: Rotary, first: int = 0) -> Tensor:
    """As `ropewalk.ops.rotary.rerotated`: in float32, rounded once to x's dtype.

    Args:
        x: (batch, heads, tokens, head_dim), float32, bfloat16 or float16, any strides whose last is 1: rotated at true
            positions from `begin` on.
        function: the positions that the result is rotated at.
        first: tokens at the beginning that the result may hold anything for.

    Returns:
        x itself where nothing moves, or a new contiguous tensor shaped as x.
    """
    if not rotary.moves(function):
        return x
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    first = max(first, 0)
    source, target = x[:, :, first:], out[:, :, first:]
    batch, heads, tokens, head_dim = source.shape
    if source.numel() == 0:
        return out
    cosine, sine = rotary.table(function, begin + first, begin + x.shape[2], x.device)
    strides = (*source.stride()[:3], *target.stride()[:3], cosine.stride(0), sine.stride(0))
    kinds = tuple([y.data_ptr() % 16 == 0 for y in (source, cosine, sine, target)])
    aligned = multiples_of_16(strides)
    launch = _launch(head_dim, rotary.offset, rotary.pairs, rotary.interleaved, aligned, x.dtype, x.device, kinds)
    head_groups = -(-batch * heads // _HEADS_PER_PROGRAM)
    # One axis, for only the first may have more than 65535 programs.
    grid = (-(-tokens // _block_tokens(rotary.pairs)) * head_groups, 1, 1)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        launch[grid](
            source, cosine, sine, target, *strides, batch * heads, heads, tokens, head_groups, *launch.constants
        )
    return out


@cache
def _block_tokens(pairs: int) -> int:
    return max(_PAIRS_PER_TILE // int(triton.next_power_of_2(max(pairs, 1))), 1)


@cache
def _launch(
    head_dim: int,
    offset: int,
    pairs: int,
    interleaved: bool,
    aligned: bool,
    dtype: torch.dtype,
    device: torch.device,
    kinds: tuple[bool, ...],
) -> Launch:
    """`aligned`: strides are multiples of 16. Calls that differ in the other arguments need launches of their own."""
    constants = {
        "head_dim": head_dim,
        "offset": offset,
        "pairs": pairs,
        "interleaved": interleaved,
        "block_tokens": _block_tokens(pairs),
        "block_pairs": triton.next_power_of_2(max(pairs, 1)),
        "block_rest": triton.next_power_of_2(head_dim - 2 * pairs) if head_dim > 2 * pairs else 0,
        "heads_per_program": _HEADS_PER_PROGRAM,
        "aligned": aligned,
    }
    return Launch(_rerotate, constants, {"num_warps": _WARPS})


_NUMBERS = ["x_batch", "x_head", "x_token", "out_batch", "out_head", "out_token", "cosine_token", "sine_token",
            "rows", "heads", "tokens", "head_groups"]  # fmt: skip


@triton.jit(do_not_specialize=_NUMBERS)
def _rerotate(
    x: tl.tensor,
    cosine: tl.tensor,
    sine: tl.tensor,
    out: tl.tensor,
    x_batch: tl.int64,
    x_head: tl.int64,
    x_token: tl.int32,
    out_batch: tl.int64,
    out_head: tl.int64,
    out_token: tl.int32,
    cosine_token: tl.int32,
    sine_token: tl.int32,
    rows: tl.int32,
    heads: tl.int32,
    tokens: tl.int32,
    head_groups: tl.int32,
    head_dim: tl.constexpr,
    offset: tl.constexpr,
    pairs: tl.constexpr,
    interleaved: tl.constexpr,
    block_tokens: tl.constexpr,
    block_pairs: tl.constexpr,
    block_rest: tl.constexpr,
    heads_per_program: tl.constexpr,
    aligned: tl.constexpr,
) -> None:
    """A block of tokens of up to `heads_per_program` rows, a row being a head of the batch."""
    if aligned:
        # Says what is known of the strides, so that sixteen bytes are read at a time.
        x_batch, x_head, x_token = x_batch // 16 * 16, x_head // 16 * 16, x_token // 16 * 16
        out_batch, out_head, out_token = out_batch // 16 * 16, out_head // 16 * 16, out_token // 16 * 16
        cosine_token, sine_token = cosine_token // 16 * 16, sine_token // 16 * 16
    program = tl.program_id(0)
    first_token = (program // head_groups) * block_tokens
    first_row = (program % head_groups) * heads_per_program
    start = tl.cast(first_token, tl.int64)
    t = tl.arange(0, block_tokens)[:, None]  # (block_tokens, 1)
    p = tl.arange(0, block_pairs)[None, :]  # (1, block_pairs)
    inside = first_token + t < tokens
    seen = inside & (p < pairs)

    c = tl.load(cosine + start * cosine_token + t * cosine_token + p, mask=seen)  # (block_tokens, block_pairs)
    s = tl.load(sine + start * sine_token + t * sine_token + p, mask=seen)  # (block_tokens, block_pairs)

    for row in range(first_row, min(first_row + heads_per_program, rows)):
        batch = tl.cast(row // heads, tl.int64)
        head = tl.cast(row % heads, tl.int64)
        source = x + batch * x_batch + head * x_head + start * x_token
        target = out + batch * out_batch + head * out_head + start * out_token
        if interleaved:
            # A pair lies side by side: whole pairs are loaded, and taken apart in registers.
            d = tl.arange(0, 2 * block_pairs)[None, :]
            whole = inside & (d < 2 * pairs)
            both = tl.load(source + t * x_token + offset + d, mask=whole)  # (block_tokens, 2 * block_pairs)
            first, second = tl.split(tl.reshape(both.to(tl.float32), (block_tokens, block_pairs, 2)))
            rerotated = tl.join(first * c - second * s, second * c + first * s)
            rerotated = tl.reshape(rerotated, (block_tokens, 2 * block_pairs))
            tl.store(target + t * out_token + offset + d, rerotated.to(out.dtype.element_ty), mask=whole)
        else:
            here = source + t * x_token + offset + p
            there = target + t * out_token + offset + p
            first = tl.load(here, mask=seen).to(tl.float32)  # (block_tokens, block_pairs)
            second = tl.load(here + pairs, mask=seen).to(tl.float32)  # (block_tokens, block_pairs)
            tl.store(there, (first * c - second * s).to(out.dtype.element_ty), mask=seen)
            tl.store(there + pairs, (second * c + first * s).to(out.dtype.element_ty), mask=seen)
        if block_rest > 0:
            r = tl.arange(0, block_rest)[None, :]
            d = tl.where(r < offset, r, r + 2 * pairs)
            kept = inside & (r < head_dim - 2 * pairs)
            rest = tl.load(source + t * x_token + d, mask=kept)  # (block_tokens, block_rest)
            tl.store(target + t * out_token + d, rest, mask=kept)
