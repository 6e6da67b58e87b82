# SPDX-License-Identifier: Apache-2.0
"""What the operator keeps belongs to the caller's `Rotary`, serves several threads, and goes with it."""

from __future__ import annotations

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tensors import IMPLEMENTATIONS, device_of, random_rotary, random_tensors
from torch.testing import assert_close

from ropewalk.maps import SELF, DualChunk, LeakyReRoPE, SelfExtend, StreamingLLM
from ropewalk.ops import Rotary, attention

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{what}:RuntimeWarning")
    for what in ("overflow encountered", "invalid value encountered", "All-NaN slice")
]

MAPS = [
    SelfExtend(3, 8),
    SELF(9, 0.3, 6, "distance"),
    SELF(9, 0.3, 6),
    LeakyReRoPE(2.5, 7),
    DualChunk(6, 4),
    StreamingLLM(3, 7),
]


def tensors_alive():
    gc.collect()
    return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())


def sweep(impl, rotary, maps, inference=True):
    device = device_of(impl)
    for position_map in maps:
        for queries in (1, 11):
            q, k, v = random_tensors(1, 2, 1, queries, 24, 16, device=device)
            with torch.inference_mode(inference):
                attention(q, k, v, position_map, rotary, impl=impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_nothing_outlives_its_owner(impl):
    sweep(impl, random_rotary(16, device=device_of(impl)), MAPS)  # what is made once for good
    before = tensors_alive()
    owners = [random_rotary(16, device=device_of(impl)) for _ in range(2)]
    for rotary in owners:
        sweep(impl, rotary, MAPS)
    alive = [weakref.ref(rotary) for rotary in owners]
    assert tensors_alive() > before
    del owners, rotary
    assert tensors_alive() <= before
    assert [ref() for ref in alive] == [None] * 2


@pytest.mark.parametrize("impl", ["flash", "blocks"])
def test_a_hundred_maps_leave_nothing_behind(impl):
    """Nothing of a module holds a tensor of theirs, and what the owner holds while it lives does not grow with them."""
    before, rotary = tensors_alive(), random_rotary(16)
    few = None
    for size in range(100):
        sweep(impl, rotary, [SelfExtend(2 + size, 3 + size % 7)])
        if size == 20:
            few = tensors_alive()
    assert tensors_alive() <= few
    del rotary
    assert tensors_alive() <= before


@pytest.mark.skipif("fused" not in IMPLEMENTATIONS, reason="needs Triton")
def test_a_sweep_of_maps_in_the_kernels_leaves_nothing_behind():
    before, rotary = tensors_alive(), random_rotary(16, device=device_of("fused"))
    q, k, v = random_tensors(1, 1, 1, 1, 8, 16, device=device_of("fused"))
    for size in range(40):
        attention(q, k, v, SelfExtend(2 + size, 3), rotary, impl="fused")
    del rotary, q, k, v
    assert tensors_alive() <= before


def test_a_call_without_an_owner_keeps_nothing():
    q, k, v = random_tensors(1, 2, 1, 11, 24, 16)
    for impl in ("reference", "blocks", "flash"):
        attention(q, k, v, SelfExtend(3, 8), None, impl=impl)
        before = tensors_alive()
        for _ in range(3):
            attention(q, k, v, SelfExtend(3, 8), None, impl=impl)
        assert tensors_alive() <= before


@pytest.mark.parametrize("impl", ["reference", "blocks", "flash"])
def test_threads_under_a_map_of_many_bands(impl):
    """More functions than an owner keeps the angles of, at lengths that grow: a table may go while another is made."""
    position_map, rotary = SELF(9, 0.1, 8, "distance"), random_rotary(16)
    assert len({function for band in position_map.bands for function in band.functions}) > 8
    lengths = range(20, 120, 14)
    calls = {n: random_tensors(1, 2, 1, n, n, 16) for n in lengths}
    expected = {n: attention(*calls[n], position_map, random_rotary(16), impl="reference") for n in lengths}
    start = threading.Barrier(8)

    def work(thread):
        start.wait()
        for n in [*lengths[thread % 4 :], *lengths[: thread % 4]]:
            with torch.no_grad():
                output = attention(*calls[n], position_map, rotary, impl=impl)
            assert_close(output, expected[n], rtol=0, atol=5e-6)

    with ThreadPoolExecutor(8) as executor:
        list(executor.map(work, range(8)))


def test_an_owner_that_is_copied_or_sent_elsewhere_starts_anew():
    import copy
    import pickle

    rotary = random_rotary(16, interleaved=True, offset=2)
    q, k, v = random_tensors(1, 2, 1, 11, 24, 24)
    expected = attention(q, k, v, SelfExtend(3, 8), rotary)
    for other in (copy.deepcopy(rotary), copy.copy(rotary), pickle.loads(pickle.dumps(rotary))):
        assert isinstance(other, Rotary)
        assert other.tables is not rotary.tables
        assert torch.equal(attention(q, k, v, SelfExtend(3, 8), other), expected)
