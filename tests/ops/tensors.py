from __future__ import annotations

import torch

from ropewalk.ops import Rotary


def random_rotary(dim: int, base: float = 100.0, **kind: object) -> Rotary:
    return Rotary(base ** -(torch.arange(0, dim, 2) / dim), **kind)


def random_tensors(batch, heads, key_heads, queries, keys, head_dim, dtype=torch.float32, device="cpu"):
    """Query, key, value; values and keys large enough for a peaked softmax, which flat ones would not test."""
    query = 2 * torch.randn(batch, heads, queries, head_dim, device=device)
    key = torch.randn(batch, key_heads, keys, head_dim, device=device)
    value = torch.randn(batch, key_heads, keys, head_dim, device=device)
    return query.to(dtype), key.to(dtype), value.to(dtype)
