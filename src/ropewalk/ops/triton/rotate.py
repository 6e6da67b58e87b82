"""Re-rotation of tensors that a model has rotated, as one pass through memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ropewalk.ops.rotary import Rotary

# Pairs that a program turns at a time, eight for each thread: 16 bytes of float16 or bfloat16 a load.
_PAIRS_PER_TILE = 1024
_WARPS = 4
# Heads that share the tables a program has loaded. Programs of the same tokens run side by side, so the tables come
# from memory once however many programs there are.
_HEADS_PER_PROGRAM = 8


def rotate(x: Tensor, cosine: Tensor, sine: Tensor, rotary: Rotary, out: Tensor | None = None) -> Tensor:
    """x turned by the tables, as `Rotary.rotate` does it: in float32, rounded once to x's dtype.

    Args:
        x: (batch, heads, tokens, head_dim), float32, bfloat16 or float16, any strides whose last is 1.
        cosine, sine: float32, (tokens, pairs), as `Rotary.shift` returns them; last stride 1.
        rotary: says which dimensions make the pairs; those it leaves out pass through.
        out: takes the result; shape and dtype of x, any strides whose last is 1, and may be x itself.

    Returns:
        `out`, or a new contiguous tensor shaped as x.

    Raises:
        ValueError: shapes, dtypes or strides do not fit.
    """
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _check(x, cosine, sine, rotary, out)
    batch, heads, tokens, head_dim = x.shape
    if x.numel() == 0:
        return out
    pairs = rotary.dim // 2
    block_pairs = triton.next_power_of_2(max(pairs, 1))
    block_tokens = max(_PAIRS_PER_TILE // block_pairs, 1)
    head_groups = triton.cdiv(batch * heads, _HEADS_PER_PROGRAM)
    # One axis, for only the first may have more than 65535 programs.
    grid = (triton.cdiv(tokens, block_tokens) * head_groups,)
    with torch.cuda.device(x.get_device()):
        _rotate[grid](
            x,
            cosine,
            sine,
            out,
            *x.stride()[:3],
            *out.stride()[:3],
            cosine.stride(0),
            sine.stride(0),
            batch * heads,
            heads,
            tokens,
            head_groups,
            head_dim=head_dim,
            offset=rotary.offset,
            pairs=pairs,
            interleaved=rotary.interleaved,
            block_tokens=block_tokens,
            block_pairs=block_pairs,
            block_rest=triton.next_power_of_2(head_dim - 2 * pairs) if head_dim > 2 * pairs else 0,
            heads_per_program=_HEADS_PER_PROGRAM,
            num_warps=_WARPS,
        )
    return out


def _check(x: Tensor, cosine: Tensor, sine: Tensor, rotary: Rotary, out: Tensor) -> None:
    table = (x.shape[-2], rotary.dim // 2)
    for fits, problem in (
        (x.ndim == 4, f"x must be (batch, heads, tokens, head_dim), got {tuple(x.shape)}"),
        (
            x.dtype in (torch.float32, torch.bfloat16, torch.float16),
            f"x must be float32, bfloat16 or float16, got {x.dtype}",
        ),
        (
            cosine.shape == sine.shape == table and cosine.dtype == sine.dtype == torch.float32,
            f"tables must be float32 {table}, got {cosine.dtype} {tuple(cosine.shape)} and "
            f"{sine.dtype} {tuple(sine.shape)}",
        ),
        (
            rotary.offset + rotary.dim <= x.shape[-1],
            f"a rotary embedding of {rotary.dim} dimensions from {rotary.offset} on does not fit {x.shape[-1]}",
        ),
        (
            out.shape == x.shape and out.dtype == x.dtype,
            f"out must be {x.dtype} {tuple(x.shape)}, got {out.dtype} {tuple(out.shape)}",
        ),
        (
            all(y.stride(-1) == 1 or y.shape[-1] <= 1 for y in (x, out, cosine, sine)),
            "the last stride of every tensor must be 1",
        ),
    ):
        if not fits:
            raise ValueError(f"rotate: {problem}")


@triton.jit(do_not_specialize=["rows", "heads", "tokens", "head_groups"])
def _rotate(
    x: tl.tensor,
    cosine: tl.tensor,
    sine: tl.tensor,
    out: tl.tensor,
    x_batch: tl.tensor,
    x_head: tl.tensor,
    x_token: tl.tensor,
    out_batch: tl.tensor,
    out_head: tl.tensor,
    out_token: tl.tensor,
    cosine_token: tl.tensor,
    sine_token: tl.tensor,
    rows: tl.tensor,
    heads: tl.tensor,
    tokens: tl.tensor,
    head_groups: tl.tensor,
    head_dim: tl.constexpr,
    offset: tl.constexpr,
    pairs: tl.constexpr,
    interleaved: tl.constexpr,
    block_tokens: tl.constexpr,
    block_pairs: tl.constexpr,
    block_rest: tl.constexpr,
    heads_per_program: tl.constexpr,
) -> None:
    """A block of tokens of up to `heads_per_program` rows, a row being a head of the batch."""
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
            turned = tl.join(first * c - second * s, second * c + first * s)
            turned = tl.reshape(turned, (block_tokens, 2 * block_pairs))
            tl.store(target + t * out_token + offset + d, turned.to(out.dtype.element_ty), mask=whole)
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
