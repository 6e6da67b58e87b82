# SPDX-License-Identifier: Apache-2.0
"""What kernels share, each alone: on a GPU where there is one, otherwise in Triton's interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
import triton_interpreter  # noqa: F401
from tensors import DEVICE
from torch.testing import assert_close

from ropewalk.maps.edges import BEGINNING, PAST_QUERY, Edge
from ropewalk.ops.triton import primitives
from ropewalk.ops.triton.tables import LARGEST_FORMULA, edge_numbers


@triton.jit
def _edge(tokens, out, back, block, cap, diagonal: tl.constexpr, size: tl.constexpr):
    at = tl.arange(0, size)
    tl.store(out + at, primitives.edge(tl.load(tokens + at), back, block, cap, diagonal))


@triton.jit
def _mapped(tokens, numbers, positions, out, capacity, size: tl.constexpr):
    at = tl.arange(0, size)
    token = tl.load(tokens + at)
    inverse = tl.load(numbers).to(tl.float32, bitcast=True)
    tl.store(out + at, primitives.mapped(token, inverse, tl.load(numbers + 1), positions, capacity, token >= 0))


@triton.jit
def _softmax(scores, values, out, scale, rows: tl.constexpr, keys: tl.constexpr, tile: tl.constexpr):
    row, column = tl.arange(0, rows), tl.arange(0, tile)
    peak = tl.full((rows,), -float("inf"), tl.float32)
    total = tl.zeros((rows,), tl.float32)
    mean = tl.zeros((rows,), tl.float32)
    for begin in range(0, keys, tile):
        at = row[:, None] * keys + begin + column[None, :]
        weights, fade, peak = primitives.softmax_step(tl.load(scores + at), scale, peak, True)
        total = total * fade + tl.sum(weights, 1)
        mean = mean * fade + tl.sum(weights * tl.load(values + at), 1)
    tl.store(out + row, mean / tl.where(total > 0, total, 1.0))
    tl.store(out + rows + row, (peak + tl.log2(tl.where(total > 0, total, 1.0))) * primitives.LN_2)


@triton.jit
def _softcapped(scores, out, cap, cap_scale, size: tl.constexpr):
    at = tl.arange(0, size)
    tl.store(out + at, primitives.softcapped(tl.load(scores + at), cap, cap_scale))


@triton.jit
def _sinks(sinks, out, heads: tl.constexpr):
    for head in range(heads):
        tl.store(out + head, primitives.load_sink(sinks, head))


@triton.jit
def _rerotate(first, second, to, come, frequencies, out, tokens: tl.constexpr, pairs: tl.constexpr):
    t, p = tl.arange(0, tokens), tl.arange(0, pairs)
    at = t[:, None] * pairs + p[None, :]
    x, y = primitives.rerotate(
        tl.load(first + at),
        tl.load(second + at),
        tl.load(to + t)[:, None],
        tl.load(come + t)[:, None],
        tl.load(frequencies + p)[None, :],
        False,
    )
    tl.store(out + at, x)
    tl.store(out + tokens * pairs + at, y)


@pytest.mark.parametrize(
    "edge",
    [
        PAST_QUERY,
        BEGINNING,
        Edge(5),
        Edge(0, 8),
        Edge(13, 7),
        Edge(-1, 3),
        Edge(4, 1, 9),
        Edge(6, 5, 11),
        Edge(1 << 40),
    ],
    ids=str,
)
def test_edges(edge):
    tokens = torch.arange(64, dtype=torch.int32, device=DEVICE)
    out = torch.empty_like(tokens)
    for diagonal in (False, True) if edge.is_diagonal or edge.is_beginning else (False,):
        _edge[(1,)](tokens, out, *edge_numbers(edge), diagonal=diagonal, size=64)
        assert torch.equal(out.long(), edge(tokens.long()))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 10, 33, 127, 1000, 4095, 65537, 1 << 20])
def test_groups_by_formula(size):
    """Where a quotient could be off by rounding: on both sides of every group's edge that is tried, up to the last."""
    edges = torch.arange(0, LARGEST_FORMULA, max(size, LARGEST_FORMULA // 4096 // size * size))
    tokens = torch.cat([edges - 1, edges, edges + 1, torch.arange(LARGEST_FORMULA - 64, LARGEST_FORMULA)])
    tokens = tokens.clamp(0, LARGEST_FORMULA - 1)
    tokens = torch.nn.functional.pad(tokens, (0, 16384 - len(tokens))).int().to(DEVICE)
    numbers = torch.tensor([int(np.float32(1 / size).view(np.int32)), 5], dtype=torch.int32, device=DEVICE)
    out = torch.empty(len(tokens), device=DEVICE)
    _mapped[(1,)](tokens, numbers, out, out, 1, size=len(tokens))
    assert torch.equal(out, (tokens // size + 5).float())


def test_positions_from_a_table():
    positions = torch.randn(3, 50, device=DEVICE)
    tokens = torch.arange(32, dtype=torch.int32, device=DEVICE)
    numbers, out = torch.tensor([0, 2], dtype=torch.int32, device=DEVICE), torch.empty(32, device=DEVICE)
    _mapped[(1,)](tokens, numbers, positions, out, 50, size=32)
    assert torch.equal(out, positions[2, :32])


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_online_softmax(scale):
    """From tile to tile; a row whose first tiles are not seen, and one that sees nothing."""
    scores, values = torch.randn(4, 64, device=DEVICE) * 3, torch.randn(4, 64, device=DEVICE)
    scores[1, :40], scores[2] = -torch.inf, -torch.inf
    scores[3, 63] = 50
    out = torch.empty(2, 4, device=DEVICE)
    _softmax[(1,)](scores, values, out, scale * primitives.LOG2_E.value, rows=4, keys=64, tile=16)
    scaled = scores.double() * scale
    expected = (scaled.softmax(-1) * values).sum(-1).nan_to_num()
    assert_close(out[0].double(), expected, rtol=1e-5, atol=1e-5)
    assert_close(out[1].double(), scaled.logsumexp(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")
@pytest.mark.parametrize("softcap", [0.05, 1.5, 50.0, 1e6])
def test_softcapped(softcap):
    scores = [1e-6, -1e-3, 0.1, -3.0, 40.0, 1e4, -1e4, 1e30, -1e30, torch.inf, -torch.inf, *[0.0] * 5]
    scores = torch.tensor(scores)
    scores, out, scale = scores.to(DEVICE), torch.empty(16, device=DEVICE), 0.3
    log2_e = primitives.LOG2_E.value
    _softcapped[(1,)](scores, out, softcap * log2_e, 2 * log2_e * scale / softcap, size=16)
    expected = softcap * torch.tanh(scores.double() * scale / softcap) * log2_e
    assert_close(out.double(), expected, rtol=1e-5, atol=4e-7 * softcap)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_sinks(dtype):
    sinks = torch.tensor([0.0, 1.5, -2.0, 3e38, torch.inf, -torch.inf, torch.nan], device=DEVICE).to(dtype)
    out = torch.empty(7, device=DEVICE)
    _sinks[(1,)](sinks, out, heads=7)
    expected = sinks.double().clamp(max=primitives.LARGEST_SINK.value) * primitives.LOG2_E.value
    assert_close(out, expected.float(), equal_nan=True, rtol=1e-6, atol=0)
    assert out[:5].isfinite().all()


@pytest.mark.parametrize("furthest", [1000, 1 << 18])
def test_rerotation_is_exact_between_rounded_phases(furthest):
    """Where phases are whole turns, and many thousands of them, the angle between two is not lost."""
    frequencies = 1e4 ** -(torch.arange(16, device=DEVICE) / 16)
    come = torch.randint(1, furthest, (32,), device=DEVICE).float()
    to = torch.cat(((come[:16] / 7).floor(), (come[16:] * 1.3).floor()))
    first, second = torch.randn(2, 32, 16, device=DEVICE)
    out = torch.empty(2, 32, 16, device=DEVICE)
    _rerotate[(1,)](first, second, to, come, frequencies, out, tokens=32, pairs=16)
    phase_to, phase_come = ((x[:, None] * frequencies).double() for x in (to, come))
    turned = torch.complex(first.double(), second.double()) * torch.exp(1j * (phase_to - phase_come))
    assert_close(torch.complex(*out.double()), turned, rtol=0, atol=4e-6)
