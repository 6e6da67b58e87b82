# SPDX-License-Identifier: Apache-2.0
"""impl="fused": what it waits for, does not take, and which kernels it chooses. `test_attention` has its numbers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tensors import DEVICE, FAST, random_rotary, random_tensors
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from ropewalk.maps import SELF, DualChunk, ReRoPE, SelfExtend
from ropewalk.maps.query_scaling import QueryScaling
from ropewalk.ops import Layout, attention, fused
from ropewalk.ops.rotary import far_band, rerotated
from ropewalk.ops.triton.launch import Launch
from ropewalk.testing.budget import within_budget

# Queries without far keys are never turned: the interpreter's numpy warns of what their memory happens to hold.
pytestmark = [
    pytest.mark.skipif("fused" not in FAST, reason="needs Triton"),
    *[
        pytest.mark.filterwarnings(f"ignore:{what}:RuntimeWarning")
        for what in ("overflow encountered", "invalid value encountered", "All-NaN slice")
    ],
]


def tensors(batch, heads, key_heads, queries, keys, head_dim, dtype=torch.float32):
    return random_tensors(batch, heads, key_heads, queries, keys, head_dim, dtype, DEVICE)


def rotary_of(dim, **kind):
    return random_rotary(dim, device=DEVICE, **kind)


@pytest.mark.parametrize(
    ("position_map", "dtype"),
    [
        (SelfExtend(7, 50), torch.float32),
        (SelfExtend(7, 50), torch.float16),
        (SELF(9, 0.3, 30, "distance"), torch.float32),
        (SELF(9, 0.3, 30, "distance"), torch.bfloat16),
        (DualChunk(60, 20), torch.float32),
        (DualChunk(60, 20), torch.bfloat16),
    ],
    ids=str,
)
def test_budget(position_map, dtype):
    rotary = rotary_of(32, base=1e4)
    # The yardstick is the largest error of a sample, which must not be small.
    for batch, queries in ((16, 1), (1, 80)):
        q, k, v = tensors(batch, 3, 1, queries, 140, 32, dtype)
        output = attention(q, k, v, position_map, rotary, impl="fused")
        assert within_budget(output, q, k, v, position_map, rotary) is None, queries


@pytest.mark.parametrize("position_map", [SelfExtend(3, 8), SelfExtend(3, 8, start=30), ReRoPE(5)], ids=str)
@pytest.mark.parametrize("queries", [1, 23])
def test_kept_far_keys(position_map, queries):
    rotary, band = rotary_of(16), far_band(position_map)
    q, k, v = tensors(1, 2, 1, queries, 40, 24)
    view = rerotated(k[:, :, : band.high(39)], band.key_positions, 0, rotary)
    expected = attention(q, k, v, position_map, rotary, impl="reference")
    output = attention(q, k, v, position_map, rotary, far_keys=view, impl="fused")
    assert_close(output, expected, rtol=0, atol=1e-5)
    # Of several queries they are used.
    output = attention(q, k, v, position_map, rotary, far_keys=view * torch.nan, impl="fused")
    assert output.isnan().any() == (queries > 1)


@pytest.fixture
def no_host_reads(monkeypatch):
    """What waits for a device raises. Kernels, which the interpreter runs on the host, are taken down for later."""
    launches = []

    def refuse(self, *arguments, **options):
        raise AssertionError("a tensor was read on the host")

    def forbid():
        record = lambda launch, grid: lambda *arguments: launches.append((launch, grid, arguments))  # noqa: E731
        monkeypatch.setattr(Launch, "__getitem__", record)
        for name in ("item", "tolist", "cpu", "numpy", "__int__", "__bool__", "__float__", "__index__", "nonzero"):
            monkeypatch.setattr(Tensor, name, refuse)

    def run():
        monkeypatch.undo()
        for launch, grid, arguments in launches:
            launch[grid](*arguments)
        return len(launches)

    return SimpleNamespace(forbid=forbid, run=run)


@pytest.mark.parametrize("query_scaling", [None, QueryScaling("log-n", 16)], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_decode_reads_nothing_on_the_host(no_host_reads, batch, query_scaling):
    """From the first step on, which makes tables."""
    position_map, rotary = SelfExtend(3, 8), rotary_of(16)
    q, k, v = tensors(batch, 2, 1, 1, 40, 16)
    layouts = [Layout(1, 40, torch.tensor(25, device=DEVICE)), Layout(1, 40), Layout(1, 40, 30)]
    options = {"query_scaling": query_scaling}
    no_host_reads.forbid()
    outputs = [
        attention(q, k, v, position_map, rotary, layout=layout, impl="fused", **options)
        for layout in layouts
        for _ in range(2)
    ]
    assert no_host_reads.run() == 2 * len(outputs)
    for output, end in zip(outputs, (26, 26, 40, 40, 31, 31), strict=True):
        expected = attention(q, k[:, :, :end], v[:, :, :end], position_map, rotary, impl="reference", **options)
        assert_close(output, expected, rtol=0, atol=1e-5)


def test_a_mask_is_read_once(no_host_reads):
    mask = torch.arange(40, device=DEVICE) >= torch.tensor([0, 9], device=DEVICE)[:, None]
    layout = Layout(1, 40, key_mask=mask)
    q, k, v = tensors(2, 2, 1, 1, 40, 16)
    rotary = rotary_of(16)
    assert layout.step(2, DEVICE).tokens == 40
    no_host_reads.forbid()
    for _ in range(3):
        attention(q, k, v, SelfExtend(3, 8), rotary, layout=layout, impl="fused")
    assert no_host_reads.run() == 6


def test_start_past_the_slots():
    q, k, v = tensors(1, 2, 1, 1, 40, 16)
    with pytest.raises(ValueError, match="query_start 40 leaves no room for 1 queries among 40 keys"):
        attention(q, k, v, SelfExtend(3, 8), None, layout=Layout(1, 40, 40), impl="fused")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q.requires_grad_(), k, v), "gradients"),
        (lambda q, k, v: (q, k, v[..., :8]), "value heads of 8 dimensions beside key heads of 16"),
        (lambda q, k, v: (q.double(), k.double(), v.double()), "torch.float64"),
        (lambda q, k, v: (q[..., :12], k[..., :12], v[..., :12]), "head dimension 12"),
        (lambda q, k, v: tuple(x.repeat(1, 1, 1, 17) for x in (q, k, v)), "head dimension 272"),
        (lambda q, k, v: (q.to("meta"), k.to("meta"), v.to("meta")), "device meta"),
        (lambda q, k, v: tuple(torch.nn.Parameter(x, False) for x in (q, k, v)), "Parameter"),
    ],
)
def test_what_it_does_not_take(change, message):
    q, k, v = change(*tensors(1, 4, 2, 3, 5, 16))
    with pytest.raises(ValueError, match=rf"impl='fused' does not take .*{message}.*; .*'blocks'.* would"):
        attention(q, k, v, SelfExtend(2, 2), None, impl="fused")


def test_installations_without_triton(monkeypatch):
    monkeypatch.setattr(fused, "_NO_KERNELS", "this installation, which has no Triton")
    with pytest.raises(ValueError, match="this installation, which has no Triton"):
        attention(*tensors(1, 4, 2, 3, 5, 16), SelfExtend(2, 2), None, impl="fused")


def test_fake_tensors_never_reach_a_kernel():
    with FakeTensorMode():
        q, k, v = (torch.randn(1, 2, 4, 16, device=DEVICE) for _ in range(3))
        with pytest.raises(ValueError, match="FakeTensor"):
            attention(q, k, v, SelfExtend(2, 2), None, impl="fused")


def test_prefill_kernel_is_explained(caplog):
    fused._log_kernel.cache_clear()
    q, k, v = tensors(1, 2, 1, 3, 3, 8)
    with caplog.at_level("INFO", logger="ropewalk"):
        for _ in range(2):
            attention(q, k, v, SelfExtend(2, 2), None, impl="fused")
    assert len(caplog.messages) == 1
    assert "prefill runs on the portable kernel; the one for Hopper GPUs does not take" in caplog.messages[0]


@pytest.mark.parametrize("queries", [1, 12])
def test_tokens_that_lie_far_apart(queries):
    """Offsets within a tile are 32 bits: what strides too large for that lead to is copied first, or read by 64."""
    q, k, v = tensors(1, 1, 1, queries, 20, 16, torch.bfloat16)
    rotary = rotary_of(16)

    def apart(x):
        # Only the pages that are written exist.
        room = torch.empty(x.shape[2] << 23, dtype=x.dtype, device=DEVICE)
        return room.as_strided(x.shape, (0, 0, 1 << 23, 1)).copy_(x)

    for position_map in (SelfExtend(3, 8), SELF(5, 0.3, 6, "distance")):
        expected = attention(q, k, v, position_map, rotary, impl="fused")
        assert torch.equal(attention(apart(q), apart(k), apart(v), position_map, rotary, impl="fused"), expected)
