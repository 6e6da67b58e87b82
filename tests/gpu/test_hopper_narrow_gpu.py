# SPDX-License-Identifier: Apache-2.0
"""The Hopper kernel for narrow bands beside the portable one, which is held to the specification everywhere."""

from __future__ import annotations

import pytest
import torch

from ropewalk.maps import SELF
from ropewalk.ops import Rotary

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a Hopper GPU: make test-gpu on one",
    ),
]

WIDE = SELF(16, 0.02, 1024, "distance").bands[1:-1]
NARROW = SELF(5, 0.05, 130, "distance").bands[1:-1]
# Kernels differ in the order of sums alone: a few roundings of the output, and of the weights before it.
BOUND = {torch.bfloat16: 2e-3, torch.float16: 3e-4}
GUARD = 40


def tensors(batch, heads, key_heads, queries, keys, head_dim, dtype, unseen):
    """The cache holds NaN behind the keys; the output lies in memory as the main kernel leaves it, 7 behind it."""
    query = (1.5 * torch.randn(batch, queries, heads, head_dim, device="cuda")).to(dtype).transpose(1, 2)
    cache = torch.full((2, batch, key_heads, keys + 100, head_dim), torch.nan, device="cuda", dtype=dtype)
    cache[..., :keys, :] = torch.randn(2, batch, key_heads, keys, head_dim, device="cuda").to(dtype)
    memory = torch.full((batch, queries + GUARD, heads, head_dim), 7.0, device="cuda", dtype=dtype)
    memory[:, :queries] = (0.1 * torch.randn(batch, queries, heads, head_dim, device="cuda")).to(dtype)
    lse = 6 + torch.randn(batch, heads, queries, device="cuda")
    if unseen:
        hidden = torch.rand(lse.shape, device="cuda") < 0.3
        lse[hidden] = -torch.inf
        memory[:, :queries].transpose(1, 2)[hidden] = 0
    return query, *cache[..., :keys, :], memory, lse


@pytest.mark.parametrize(
    ("heads", "key_heads", "head_dim", "dtype"),
    [
        (8, 2, 128, torch.bfloat16),
        (4, 4, 128, torch.bfloat16),
        (16, 2, 128, torch.float16),
        (9, 3, 64, torch.bfloat16),
        (8, 1, 64, torch.bfloat16),
        (2, 2, 64, torch.float16),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("batch", "queries", "keys", "bands", "chunk", "unseen"),
    [
        (1, 4096, 4096, WIDE, None, False),
        (2, 5001, 5001, WIDE, 1024, False),
        (1, 1001, 5001, WIDE, None, True),
        (1, 3000, 3000, NARROW, 1000, True),
        (1, 1064, 1064, WIDE, None, False),  # one query sees one key
    ],
    ids=["whole", "chunks", "past", "narrow", "one key"],
)
def test_equals_the_portable_kernel(heads, key_heads, head_dim, dtype, batch, queries, keys, bands, chunk, unseen):
    from ropewalk.ops.triton import hopper_narrow as hopper
    from ropewalk.ops.triton import narrow as portable
    from ropewalk.ops.triton.narrow_keys import Narrow

    torch.manual_seed(0)
    query, key, value, memory, lse = tensors(batch, heads, key_heads, queries, keys, head_dim, dtype, unseen)
    rotary = Rotary(1e4 ** -(torch.arange(0, head_dim, 2, device="cuda") / head_dim))
    results = []
    for kernel in (hopper, hopper, portable):
        # What is re-rotated for the bands gets memory that holds NaN.
        poison = torch.full((300 << 20,), torch.nan, device="cuda", dtype=torch.bfloat16)
        del poison
        mine = memory.clone()
        output = mine[:, :queries].transpose(1, 2)
        work = Narrow(query, key, value, bands, rotary, output, lse, head_dim**-0.5)
        assert kernel is portable or hopper.lacks(work) is None
        kernel.attend(work, chunk=chunk)
        results.append(mine)
    first, second, expected = results
    assert torch.equal(first, second)
    assert (first[:, queries:] == 7).all()
    error = (first - expected).float().norm() / expected[:, :queries].float().norm()
    assert error <= BOUND[dtype]
