"""The operator on a CUDA device, by the same error budgets as on the CPU."""

from __future__ import annotations

import pytest
import torch

from ropewalk.maps import SelfExtend
from ropewalk.ops import Layout, Rotary, attention
from ropewalk.testing.budget import within_budget
from ropewalk.testing.maps import large_maps

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: make test-gpu on one"),
]


def _tensors(batch, heads, key_heads, queries, keys, head_dim, dtype):
    shapes = ((batch, heads, queries, head_dim), (batch, key_heads, keys, head_dim), (batch, key_heads, keys, head_dim))
    q, k, v = (torch.randn(shape, device="cuda") for shape in shapes)
    return (2 * q).to(dtype), k.to(dtype), v.to(dtype)


def _rotary(dim):
    return Rotary(1e4 ** -(torch.arange(0, dim, 2, device="cuda") / dim))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("position_map", large_maps(), ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_budget(position_map, dtype, head_dim):
    torch.manual_seed(0)
    rotary = _rotary(head_dim // 2)
    for queries, keys in ((1, 700), (3, 513), (256, 700), (257, 257), (300, 1100), (700, 700)):
        batch = 64 if queries < 4 else 2  # the yardstick is the largest error of a sample, which must not be small
        q, k, v = _tensors(batch, 6, 2, queries, keys, head_dim, dtype)
        output = attention(q, k, v, position_map, rotary)
        assert within_budget(output, q, k, v, position_map, rotary) is None, (queries, keys)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_padded_batch_equals_its_rows_alone(dtype):
    torch.manual_seed(0)
    position_map, rotary = SelfExtend(3, 8), _rotary(64)
    q, k, v = _tensors(2, 4, 2, 12, 40, 64, dtype)
    mask = torch.ones(2, 40, device="cuda").bool()
    mask[0, :9] = False
    output = attention(q, k, v, position_map, rotary, layout=Layout(12, 40, key_mask=mask))
    alone = attention(q[:1], k[:1, :, 9:], v[:1, :, 9:], position_map, rotary)
    torch.testing.assert_close(output[:1], alone)


def test_memory_grows_linearly():
    """32k tokens: one bf16 query x key matrix would take 2 GiB a head."""
    q, k, v = _tensors(1, 8, 2, 32768, 32768, 64, torch.bfloat16)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.inference_mode():
        attention(q, k, v, SelfExtend(8, 1024), _rotary(64))
    inputs = sum(x.nbytes for x in (q, k, v))
    assert torch.cuda.max_memory_allocated() - before < 12 * inputs
