# SPDX-License-Identifier: Apache-2.0
"""Causal attention, with or without a sliding window, that also returns its log-sum-exp: what every band is made of.

Both devices' kernels come with torch. torch has no public call that returns the log-sum-exp on both, so the two names
are looked up here and nowhere else.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Queries of a windowed block on the CPU: as measured, smaller wastes less at the edges and larger runs faster.
_CPU_BLOCK = 256

# Keys of a piece, at least: to merge one costs as much as to see some.
_LEAST_PIECE = 2048

_HALF = (torch.bfloat16, torch.float16)


def unsupported(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Why `causal` cannot take these tensors; None if it can."""
    if value.shape[-1] != key.shape[-1]:
        return f"value heads of {value.shape[-1]} dimensions beside key heads of {key.shape[-1]}"
    if query.device.type == "cpu":
        return None
    if query.device.type == "cuda":
        if torch.version.hip:  # its kernel behind the same name does not read the window
            return "ROCm"
        if query.dtype not in _HALF:
            return f"{query.dtype} on a GPU"
        return f"head dimension {query.shape[-1]}" if query.shape[-1] > 256 or query.shape[-1] % 8 else None
    return f"device {query.device.type}"


def full(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of every query to every key; for the arguments and what comes back see `causal`."""
    if query.device.type == "cuda":
        return _flash_cuda(query, key, value, scale, is_causal=False, window=None)
    batch, heads, queries, head_dim = query.shape
    if queries > 1:
        return _flash_cpu(query, key, value, scale)
    # The heads that share a key become its queries: nothing is expanded.
    packed = query.reshape(batch, key.shape[1], -1, head_dim)
    pieces = _pieces(batch, key.shape[1], key.shape[2])
    output, lse = (
        _flash_cpu(packed, key, value, scale) if pieces == 1 else _in_pieces(packed, key, value, scale, pieces)
    )
    return output.reshape(*query.shape[:3], value.shape[3]), lse.reshape(batch, heads, 1)


def _pieces(batch: int, heads: int, keys: int) -> int:
    """Into how many pieces to take the keys of one text, so that all threads have as much to do: torch gives each head
    of them to one thread."""
    threads = torch.get_num_threads()
    return 1 if batch > 1 else max(1, min(threads // math.gcd(heads, threads), keys // _LEAST_PIECE))


def _in_pieces(query: Tensor, key: Tensor, value: Tensor, scale: float, pieces: int) -> tuple[Tensor, Tensor]:
    """Attention of every query to every key of one text, which become so many texts, and a rest that is none."""
    size = key.shape[2] // pieces
    keys, values = (
        x[0, :, : pieces * size].reshape(x.shape[1], pieces, size, -1).transpose(0, 1) for x in (key, value)
    )
    outputs, lses = _flash_cpu(query.expand(pieces, -1, -1, -1), keys, values, scale)
    if rest := key.shape[2] - pieces * size:
        last, last_lse = _flash_cpu(query, key[:, :, -rest:], value[:, :, -rest:], scale)
        outputs, lses = torch.cat((outputs, last)), torch.cat((lses, last_lse))
    weights = torch.softmax(lses, dim=0)[..., None]
    return (outputs.to(weights.dtype) * weights).sum(dim=0, keepdim=True), lses.logsumexp(dim=0, keepdim=True)


def causal(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> tuple[Tensor, Tensor]:
    """Attention where the last query is aligned with the last key and query i sees its nearest `window` keys.

    Args:
        query: (batch, heads, queries, head_dim).
        key, value: (batch, key heads, keys, head_dim), keys >= queries.
        window: keys seen by a query, its own included; None for all before it.

    Returns:
        The output, shaped as query, and its log-sum-exp, float32, (batch, heads, queries).
    """
    if query.device.type == "cuda":
        return _flash_cuda(query, key, value, scale, True, window)
    return _causal_cpu(query, key, value, scale, window)


def _flash_cuda(
    query: Tensor, key: Tensor, value: Tensor, scale: float, is_causal: bool, window: int | None
) -> tuple[Tensor, Tensor]:
    output, lse, *_ = torch.ops.aten._flash_attention_forward(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        None,
        None,
        query.shape[2],
        key.shape[2],
        0.0,
        is_causal,
        False,
        scale=scale,
        window_size_left=None if window is None else window - 1,
        window_size_right=0 if is_causal else None,
    )
    return output.transpose(1, 2), lse


def _causal_cpu(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> tuple[Tensor, Tensor]:
    queries, keys = query.shape[2], key.shape[2]
    past = keys - queries
    if window is None or window >= keys:
        return _unwindowed_cpu(query, key, value, scale)
    if queries == 1:
        return _unwindowed_cpu(query, key[:, :, -window:], value[:, :, -window:], scale)
    # Queries that still see every key before them, then a block that makes the rest whole blocks, then those.
    head = min(max(window - past, 0), queries)
    block = min(_CPU_BLOCK, max(32, window))
    edge = head + (queries - head) % block
    parts = []
    if head:
        parts.append(_unwindowed_cpu(query[:, :, :head], key[:, :, : past + head], value[:, :, : past + head], scale))
    for first, stop, size in ((head, edge, edge - head), (edge, queries, block)):
        if stop > first:
            seen = slice(past + first - window + 1, past + stop)
            parts.append(_blocks_cpu(query[:, :, first:stop], key[:, :, seen], value[:, :, seen], scale, window, size))
    outputs, lses = zip(*parts, strict=True)
    return torch.cat(outputs, dim=2), torch.cat(lses, dim=2)


def _unwindowed_cpu(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Causal, without a window."""
    past = key.shape[2] - query.shape[2]
    if query.shape[2] == 1:
        return full(query, key, value, scale)
    output, lse = _flash_cpu(query, key[:, :, past:], value[:, :, past:], scale, is_causal=True)
    if past == 0:
        return output, lse
    before, before_lse = _flash_cpu(query, key[:, :, :past], value[:, :, :past], scale)
    return merge(output, lse, before, before_lse)


def _blocks_cpu(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window: int, block: int
) -> tuple[Tensor, Tensor]:
    """Blocks of queries that all see a whole window; the blocks of a row are one batch of overlapping views."""
    row = torch.arange(block, device=query.device)[:, None]
    column = torch.arange(window + block - 1, device=query.device)
    hidden = (column < row) | (column >= row + window)
    bias = torch.zeros(hidden.shape, dtype=query.dtype, device=query.device).masked_fill_(hidden, -torch.inf)
    parts = []
    for q, k, v in zip(query, key, value, strict=True):
        blocks = q.unflatten(1, (-1, block)).transpose(0, 1)
        k_views, v_views = (x.unfold(1, window + block - 1, block).permute(1, 0, 3, 2) for x in (k, v))
        output, lse = _flash_cpu(blocks, k_views, v_views, scale, attn_mask=bias)
        parts.append((output.transpose(0, 1).flatten(1, 2), lse.transpose(0, 1).flatten(1, 2)))
    outputs, lses = zip(*parts, strict=True)
    return torch.stack(outputs), torch.stack(lses)


def _flash_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    is_causal: bool = False,
    attn_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale
    )
    return output, lse


def merge(output: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys from the attention over each. The sum is float32."""
    weight = torch.sigmoid(other_lse - lse)[..., None]
    merged = torch.lerp(output.float(), other.float(), weight.float())
    return merged, torch.logaddexp(lse, other_lse)
