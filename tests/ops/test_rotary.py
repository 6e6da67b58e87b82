# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tensors import random_rotary

from ropewalk.maps.positions import Grouped
from ropewalk.ops import Rotary
from ropewalk.ops.rotary import Tables, rerotated


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("offset", [0, 4])
def test_rotate_turns_pairs(interleaved, offset):
    rotary = random_rotary(8, interleaved=interleaved, offset=offset)
    x = torch.randn(2, 5, 12)
    angles = torch.rand(5, 4)
    y = rotary.rotate(x, angles.cos(), angles.sin())
    for pair in range(4):
        first, second = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + 4)
        before = torch.complex(x[..., offset + first], x[..., offset + second])
        after = torch.complex(y[..., offset + first], y[..., offset + second])
        torch.testing.assert_close(after, before * torch.exp(1j * angles[:, pair]))
    untouched = [i for i in range(12) if not offset <= i < offset + 8]
    assert torch.equal(y[..., untouched], x[..., untouched])


def test_tables_grow_without_changing():
    rotary, function = random_rotary(8), Grouped(3, 5)
    tokens = torch.arange(5000)
    angles = rotary.phases(function(tokens)) - rotary.phases(tokens)
    expected = torch.stack((angles.cos(), angles.sin())).float()
    for begin, end in ((0, 0), (0, 10), (3, 700), (699, 700), (100, 5000), (0, 5000), (7, 7)):
        assert torch.equal(rotary.table(function, begin, end, torch.device("cpu")), expected[:, begin:end])


def test_few_tables_are_kept():
    rotary = random_rotary(8)
    for size in range(1, 60):
        rotary.table(Grouped(size), 0, 10, torch.device("cpu"))
    assert len(rotary.tables._angles) <= 8


def test_far_positions_are_where_the_model_rotates():
    """Past 2^17 a float32 phase is off by hundredths of a turn; the model's own rounding is reproduced, not mended."""
    rotary = Rotary(1e4 ** -(torch.arange(0, 64, 2) / 64))
    tokens = torch.arange(1 << 18, (1 << 18) + 16)
    function = Grouped(16, 960)
    x = torch.randn(1, 1, 16, 64, dtype=torch.float64)

    def at(positions: torch.Tensor) -> torch.Tensor:
        angles = (positions.float()[:, None] * rotary.inverse_frequencies).double()
        return rotary.rotate(x, angles.cos(), angles.sin())

    output = rerotated(at(tokens), function, 1 << 18, rotary)
    torch.testing.assert_close(output, at(function(tokens)), rtol=0, atol=1e-6)


def test_tables_made_in_inference_mode_serve_gradients():
    rotary, function = random_rotary(8), Grouped(3, 5)
    x = torch.randn(1, 1, 6, 8)
    with torch.inference_mode():
        rerotated(x, function, 0, rotary)
    leaf = x.clone().requires_grad_()
    rerotated(leaf, function, 0, rotary).sum().backward()
    assert leaf.grad is not None


def test_frequencies_are_copied_to_a_device_once():
    rotary = Rotary(torch.tensor([1.0, 0.5], dtype=torch.float64))
    frequencies = rotary.frequencies(torch.device("meta"))
    assert frequencies.device.type == "meta"
    assert frequencies.dtype == torch.float32
    assert rotary.frequencies(torch.device("meta")) is frequencies


def test_what_is_kept_is_made_once():
    """By whatever thread comes first."""
    tables, made, start = Tables(), [], threading.Barrier(8)

    def make(key, argument):
        made.append((key, argument))
        return object()

    def work(_):
        start.wait()
        return [tables.get(key, make, "x") for key in range(50)]

    with ThreadPoolExecutor(8) as executor:
        found = list(executor.map(work, range(8)))
    assert sorted(made) == [(key, "x") for key in range(50)]
    assert all(one == found[0] for one in found)


def test_threads_share_tables_that_grow_and_go():
    """More functions than are kept, asked for at growing lengths by eight threads at once."""
    rotary, functions = random_rotary(8), [Grouped(size, 3) for size in range(1, 30)]
    expected = {function: rotary.angles(function, torch.arange(900)) for function in functions}
    start = threading.Barrier(8)

    def work(thread):
        start.wait()
        for length in range(50 + thread, 900, 97):
            for function in functions[thread:] + functions[:thread]:
                cosine, sine = rotary.table(function, 3, length, torch.device("cpu"))
                angles = expected[function][3:length]
                assert torch.equal(cosine, angles.cos().float())
                assert torch.equal(sine, angles.sin().float())

    with ThreadPoolExecutor(8) as executor:
        list(executor.map(work, range(8)))
    assert len(rotary.tables._angles) <= 8
