# SPDX-License-Identifier: Apache-2.0
"""The re-rotation kernel against `Rotary.rotate`: on a GPU where there is one, otherwise in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
import triton_interpreter  # noqa: F401
from tensors import DEVICE, random_rotary

from ropewalk.maps.positions import TRUE_POSITIONS, Capped, Grouped
from ropewalk.ops import Rotary
from ropewalk.ops.triton.rerotate import rerotate

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FUNCTION = Grouped(4, 30)


def rotary_of(dim, **kind):
    return random_rotary(dim, device=DEVICE, **kind)


def assert_rerotated(output, x, rotary, begin=0, function=FUNCTION):
    """Within half a step of the dtype of the exact product: what is left once a result is rounded a single time."""
    cosine, sine = rotary.table(function, begin, begin + x.shape[2], DEVICE)
    exact = rotary.rotate(x.double(), cosine.double(), sine.double())
    float32_error = 4 * torch.finfo(torch.float32).eps * x.double().abs().max()
    step = torch.finfo(x.dtype).eps / 2 * exact.abs()
    assert output.dtype == x.dtype
    assert ((output.double() - exact).abs() <= step + float32_error).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("head_dim", "dim", "offset"),
    [(64, 64, 0), (128, 128, 0), (80, 80, 0), (80, 32, 0), (96, 48, 48), (72, 40, 16), (6, 2, 3)],
)
def test_every_shape_of_head(head_dim, dim, offset, interleaved, dtype):
    rotary = rotary_of(dim, interleaved=interleaved, offset=offset)
    x = torch.randn(2, 3, 37, head_dim, device=DEVICE).to(dtype)
    output = rerotate(x, FUNCTION, 100, rotary)
    assert output.is_contiguous()
    assert_rerotated(output, x, rotary, 100)
    rest = [i for i in range(head_dim) if not offset <= i < offset + dim]
    assert torch.equal(output[..., rest], x[..., rest])


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 32])
@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (1, 7), (1, 8), (1, 9), (3, 7)])
def test_tile_edges(tokens, heads, batch):
    """Sixteen tokens and eight heads are what a program takes."""
    rotary = rotary_of(128)
    x = torch.randn(batch, heads, tokens, 128, device=DEVICE)
    assert_rerotated(rerotate(x, FUNCTION, 0, rotary), x, rotary)


@pytest.mark.parametrize("interleaved", [False, True])
def test_strides(interleaved):
    rotary = rotary_of(24, interleaved=interleaved, offset=4)
    buffer = torch.randn(2, 30, 9, 40, device=DEVICE)
    copy = buffer.clone()
    x = buffer.transpose(1, 2)[:, 2:7, 5:26, 4:36]
    assert torch.equal(rerotate(x, FUNCTION, 7, rotary), rerotate(x.contiguous(), FUNCTION, 7, rotary))
    assert torch.equal(buffer, copy)


@pytest.mark.parametrize("first", [-3, 0, 1, 20, 21, 40])
def test_tokens_that_may_be_anything(first):
    """Those before `first`: queries that see nothing through a band."""
    rotary, x = rotary_of(16), torch.randn(1, 2, 21, 24, device=DEVICE)
    output = rerotate(x, FUNCTION, 7, rotary, first)
    assert output.shape == x.shape
    whole = rerotate(x, FUNCTION, 7, rotary)
    assert torch.equal(output[:, :, max(first, 0) :], whole[:, :, max(first, 0) :])


def test_what_is_where_it_should_be_is_not_copied():
    x = torch.randn(1, 2, 21, 24, device=DEVICE)
    assert rerotate(x, TRUE_POSITIONS, 7, rotary_of(16)) is x
    assert rerotate(x, FUNCTION, 7, Rotary.none()) is x


def test_functions_that_are_no_groups():
    rotary, x = rotary_of(16), torch.randn(1, 2, 21, 24, device=DEVICE)
    assert_rerotated(rerotate(x, Capped(12), 7, rotary), x, rotary, 7, Capped(12))


@pytest.mark.parametrize("shape", [(0, 2, 5, 8), (2, 2, 0, 8)])
def test_nothing_to_do(shape):
    x = torch.empty(shape, device=DEVICE)
    assert rerotate(x, FUNCTION, 0, rotary_of(8)).shape == shape
