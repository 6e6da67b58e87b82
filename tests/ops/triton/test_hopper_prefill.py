# SPDX-License-Identifier: Apache-2.0
"""What the kernels for Hopper read tensors by, made without Triton's own checks of each."""

import gc
import weakref

import numpy
import pytest
import torch
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ropewalk.ops.triton.hopper_prefill import _layout, can_be_described, descriptor


@pytest.mark.parametrize(
    ("shape", "block", "whole"),
    [
        ((2, 4, 100, 64), (64,), [1, 1, 64, 64]),
        ((2, 3, 10, 4, 128), (2, 4), [1, 1, 2, 4, 128]),
        ((1, 1, 7, 256), (128,), [1, 1, 128, 256]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_what_triton_makes(shape, block, whole, dtype):
    # The second is of a kind that was met before, but for its length and its strides.
    for x in (torch.zeros(shape, dtype=dtype), torch.zeros((*shape[:-2], 9, shape[-1]), dtype=dtype)[..., 5:, :]):
        made = vars(descriptor(x, *block))
        expected = vars(TensorDescriptor(x, list(x.shape), list(x.stride()), whole, _layout(tuple(whole), dtype)))
        assert made.pop("base") is expected.pop("base")
        assert made == expected


def test_no_tensor_is_kept():
    memory = numpy.zeros((1, 2, 33, 64), numpy.float16)
    x = torch.from_numpy(memory)  # which its views keep too
    kept = weakref.ref(memory)
    descriptor(x, 32)
    del x, memory
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(1, 2, 8, 65, dtype=torch.float16)[..., :64],
        torch.zeros(1, 2, 8, 128, dtype=torch.float16)[..., ::2],
        torch.zeros(1, 2, 8, 72, dtype=torch.float16)[..., 1:65],
    ],
    ids=["rows", "columns", "start"],
)
def test_what_cannot_be_described(x):
    assert not can_be_described(x)
    assert can_be_described(x.contiguous())
