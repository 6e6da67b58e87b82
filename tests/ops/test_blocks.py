# SPDX-License-Identifier: Apache-2.0
"""impl="blocks": what the faster ones do not take."""

from __future__ import annotations

import pytest
import torch
from tensors import random_rotary, random_tensors
from torch.testing import assert_close

from ropewalk.maps import DualChunk, SelfExtend
from ropewalk.ops import attention


@pytest.mark.parametrize("impl", ["blocks", "auto"])
@pytest.mark.parametrize("position_map", [SelfExtend(3, 100), DualChunk(70, 30)], ids=str)
def test_gradients_are_those_of_the_reference(impl, position_map):
    gradients = []
    for name in ("reference", impl):
        torch.manual_seed(1)
        tensors = [x.requires_grad_() for x in random_tensors(2, 4, 2, 300, 300, 16)]
        sinks = torch.randn(4, requires_grad=True)
        output = attention(*tensors, position_map, random_rotary(16), softcap=5.0, sinks=sinks, impl=name)
        output.square().sum().backward()
        gradients.append([x.grad for x in (*tensors, sinks)])
    for expected, gradient in zip(*gradients, strict=True):
        assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", ["blocks", "auto"])
@pytest.mark.parametrize("value_dim", [1, 12, 24])
def test_value_heads_of_another_size(impl, value_dim):
    for queries in (1, 30):
        q, k, _ = random_tensors(2, 4, 2, queries, 40, 16)
        v = torch.randn(2, 2, 40, value_dim)
        expected = attention(q, k, v, SelfExtend(3, 8), random_rotary(16), impl="reference")
        output = attention(q, k, v, SelfExtend(3, 8), random_rotary(16), impl=impl)
        assert_close(output, expected, rtol=0, atol=5e-6)
    with pytest.raises(ValueError, match=f"value heads of {value_dim} dimensions beside key heads of 16"):
        attention(q, k, v, SelfExtend(3, 8), random_rotary(16), impl="flash")


def test_what_it_takes_instead_of_flash():
    q, k, v = random_tensors(2, 4, 2, 30, 40, 16)
    with pytest.raises(ValueError, match=r"impl='flash' does not take softcap; .*'blocks', 'reference' would"):
        attention(q, k, v, SelfExtend(3, 8), None, softcap=1.5, impl="flash")
    expected = attention(q, k, v, SelfExtend(3, 8), None, softcap=1.5, impl="blocks")
    assert torch.equal(attention(q, k, v, SelfExtend(3, 8), None, softcap=1.5), expected)
