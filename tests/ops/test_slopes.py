# SPDX-License-Identifier: Apache-2.0
"""ALiBi: a band takes its slope times the mapped distance away from each score, in every implementation that has it."""

from __future__ import annotations

import pytest
import torch
from tensors import device_of, explicit, random_rotary, random_tensors, relative, rotated
from torch.testing import assert_close

from ropewalk.maps import Identity, SelfExtend
from ropewalk.ops import Layout, attention
from ropewalk.testing.maps import example_maps, large_maps

MAPS = [one for maps in example_maps().values() for one in maps[:2] if not one.by_pair]
over_maps = pytest.mark.parametrize("position_map", MAPS, ids=str)
over_impls = pytest.mark.parametrize("impl", ["reference", "blocks", "fused"])
SLOPES = torch.tensor([0.5, 0.25, 0.03125, -0.1])


@over_maps
@over_impls
@pytest.mark.parametrize(("queries", "keys", "pairs"), [(40, 40, 0), (9, 50, 3), (1, 50, 0), (1, 50, 3)])
def test_slopes(position_map, impl, queries, keys, pairs):
    tokens, distances = torch.arange(keys), relative(position_map, keys)[-queries:]
    rotary = random_rotary(2 * pairs, device=device_of(impl))
    bias = -SLOPES.double()[:, None, None] * distances.nan_to_num()
    q, k, v = (x.double() for x in random_tensors(2, 4, 2, queries, keys, 16))
    expected = explicit(q, k, v, distances, rotary, bias)
    q, k = rotated(q, rotary, tokens[-queries:]), rotated(k, rotary, tokens)
    output = attention(*(x.float() for x in (q, k, v)), position_map, rotary, slopes=SLOPES, impl=impl)
    assert_close(output.double(), expected, rtol=0, atol=2e-5)


@over_impls
@pytest.mark.parametrize("queries", [1, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_with_all_the_rest(impl, queries, dtype):
    """Padding, softcap, sinks, and slopes in another dtype."""
    q, k, v = random_tensors(3, 4, 2, queries, 60, 16)
    mask = torch.ones(3, 60).bool()
    mask[1, :20] = False
    options = {"softcap": 5.0, "sinks": torch.randn(4), "layout": Layout(queries, 60, key_mask=mask)}
    for position_map in (SelfExtend(3, 8), SelfExtend(4, 6, start=30)):
        expected = attention(
            *(x.double() for x in (q, k, v)), position_map, None, slopes=SLOPES.double(), impl="reference", **options
        )
        output = attention(q, k, v, position_map, None, slopes=SLOPES.to(dtype), impl=impl, **options)
        assert_close(output.double(), expected, rtol=0, atol=2e-2 if dtype == torch.bfloat16 else 2e-5)


@pytest.mark.parametrize("impl", ["blocks", "fused"])
@pytest.mark.parametrize("position_map", large_maps()[:4], ids=str)
def test_long_texts(position_map, impl):
    q, k, v = random_tensors(1, 2, 1, 600, 600, 16)
    slopes = torch.tensor([0.01, 0.5])
    doubles = (x.double() for x in (q, k, v))
    expected = attention(*doubles, position_map, None, slopes=slopes.double(), impl="reference")
    assert_close(attention(q, k, v, position_map, None, slopes=slopes, impl=impl).double(), expected, rtol=0, atol=2e-5)


def test_differences_of_far_positions_are_exact():
    """Whatever the text's length: positions are subtracted before they are multiplied."""
    q, k, v = random_tensors(1, 2, 2, 1, 200_000, 8)
    slopes = torch.tensor([1.0, 0.1])
    output = attention(q, k, v, Identity(), None, slopes=slopes, impl="blocks")
    expected = attention(q, k[:, :, -1000:], v[:, :, -1000:], Identity(), None, slopes=slopes, impl="reference")
    assert_close(output, expected, rtol=0, atol=1e-6)


def test_flash_says_what_it_lacks():
    q, k, v = random_tensors(1, 2, 2, 8, 8, 8)
    with pytest.raises(ValueError, match=r"impl='flash' does not take slopes \(ALiBi\); .*'blocks'"):
        attention(q, k, v, Identity(), None, slopes=torch.ones(2), impl="flash")
