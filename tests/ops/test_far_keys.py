# SPDX-License-Identifier: Apache-2.0
"""The far view of the keys, kept by the caller: it changes the cost of a call and nothing else."""

from __future__ import annotations

import pytest
import torch
from tensors import random_rotary, random_tensors
from torch.testing import assert_close

from ropewalk.maps import (
    SELF,
    DualChunk,
    Identity,
    LeakyReRoPE,
    LMInfinite,
    ReRoPE,
    SelfExtend,
    SlidingWindow,
    StreamingLLM,
)
from ropewalk.ops import Layout, attention
from ropewalk.ops.rotary import far_band, rerotated

MAPS = [SelfExtend(3, 8), SelfExtend(3, 8, start=30), SELF(9, 0.3, 6), ReRoPE(5), LeakyReRoPE(2.5, 7)]
over_maps = pytest.mark.parametrize("position_map", MAPS, ids=str)
over_impls = pytest.mark.parametrize("impl", ["reference", "blocks", "flash"])


def kept(key, position_map, rotary, starts=(0,)):
    """What a caller keeps; NaN wherever it may hold anything."""
    band, keys = far_band(position_map), key.shape[2]
    view = torch.full_like(key, torch.nan)
    for row, start in enumerate(starts):
        rows = slice(None) if len(starts) == 1 else slice(row, row + 1)
        far = slice(start, start + band.high(keys - 1 - start))
        view[rows, :, far] = rerotated(key[rows, :, far], band.key_positions, 0, rotary)
    return view


@over_maps
@over_impls
@pytest.mark.parametrize("queries", [1, 5, 23, 40])
def test_kept_keys_change_nothing(position_map, impl, queries):
    rotary = random_rotary(16)
    q, k, v = random_tensors(2, 6, 2, queries, 40, 20)
    expected = attention(q, k, v, position_map, rotary, impl=impl)
    view = kept(k, position_map, rotary)
    assert_close(attention(q, k, v, position_map, rotary, far_keys=view, impl=impl), expected, rtol=0, atol=2e-6)
    # The slots that are near every query need not be there.
    view = view[:, :, : far_band(position_map).high(39)]
    assert_close(attention(q, k, v, position_map, rotary, far_keys=view, impl=impl), expected, rtol=0, atol=2e-6)


@over_maps
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_they_are_what_the_operator_would_have_computed(position_map, dtype):
    """Keys that fit one piece: bit for bit."""
    rotary = random_rotary(32)
    q, k, v = random_tensors(2, 6, 2, 1, 1500, 32, dtype)
    expected = attention(q, k, v, position_map, rotary)
    assert torch.equal(attention(q, k, v, position_map, rotary, far_keys=kept(k, position_map, rotary)), expected)


@over_impls
def test_they_are_used(impl):
    q, k, v = random_tensors(1, 2, 1, 1, 40, 16)
    output = attention(q, k, v, MAPS[0], random_rotary(16), far_keys=torch.full_like(k, torch.nan), impl=impl)
    assert output.isnan().all() == (impl != "reference")


def test_they_are_not_used_inside_the_window():
    q, k, v = random_tensors(1, 2, 1, 8, 8, 16)
    assert not attention(q, k, v, MAPS[0], random_rotary(16), far_keys=k[:, :, :0]).isnan().any()


@over_maps
@over_impls
@pytest.mark.parametrize("queries", [1, 12])
def test_rows_that_begin_at_different_slots(position_map, impl, queries):
    rotary, starts = random_rotary(16), (9, 0, 35)
    mask = torch.arange(40) >= torch.tensor(starts)[:, None]
    q, k, v = random_tensors(3, 4, 2, queries, 40, 16)
    arguments = {"layout": Layout(queries, 40, key_mask=mask), "impl": impl}
    expected = attention(q, k, v, position_map, rotary, **arguments)
    view = kept(k, position_map, rotary, starts)[:, :, : far_band(position_map).high(39)]
    assert_close(attention(q, k, v, position_map, rotary, far_keys=view, **arguments), expected, rtol=0, atol=2e-6)


@over_impls
def test_a_row_with_a_gap(impl):
    position_map, rotary = MAPS[0], random_rotary(16)
    mask = torch.tensor([[1] * 10 + [0] * 8 + [1] * 22]).bool()
    q, k, v = random_tensors(1, 4, 2, 1, 40, 16)
    arguments = {"layout": Layout(1, 40, key_mask=mask), "impl": impl}
    view = torch.full_like(k, torch.nan)
    view[:, :, mask[0]] = rerotated(k[:, :, mask[0]], far_band(position_map).key_positions, 0, rotary)
    expected = attention(q, k, v, position_map, rotary, **arguments)
    view = view[:, :, : 40 - position_map.window]
    assert_close(attention(q, k, v, position_map, rotary, far_keys=view, **arguments), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "position_map",
    [Identity(), SELF(9, 0.3, 6, "distance"), SlidingWindow(4), DualChunk(6, 4), StreamingLLM(4, 7), LMInfinite(4, 7)],
    ids=str,
)
def test_maps_without_one_far_band_take_none(position_map):
    """Nor do those whose far band's end does not follow the query: a padded row's would be in another slot."""
    assert far_band(position_map) is None
    q, k, v = random_tensors(1, 2, 1, 1, 40, 16)
    with pytest.raises(ValueError, match="far_keys needs a map with one far band"):
        attention(q, k, v, position_map, random_rotary(16), far_keys=k)


@pytest.mark.parametrize("change", [lambda k: k[:, :, :31], lambda k: k[:, :1], lambda k: k.double(), lambda k: k[0]])
def test_bad_input(change):
    q, k, v = random_tensors(2, 4, 2, 1, 40, 16)
    with pytest.raises(ValueError, match=r"far_keys .* do not fit .* 32 slots are needed"):
        attention(q, k, v, SelfExtend(3, 8), random_rotary(16), far_keys=change(k))
