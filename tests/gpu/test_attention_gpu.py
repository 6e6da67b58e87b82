# SPDX-License-Identifier: Apache-2.0
"""The operator on a CUDA device, by the same error budgets as on the CPU."""

from __future__ import annotations

import gc
import warnings
import weakref

import pytest
import torch

from ropewalk.maps import SELF, Identity, SelfExtend
from ropewalk.maps.query_scaling import QueryScaling
from ropewalk.ops import Layout, Rotary, attention
from ropewalk.ops.call import Call
from ropewalk.ops.implementations import choose
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


over_dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)


@over_dtypes
@pytest.mark.parametrize("position_map", large_maps(), ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("impl", ["auto", "fused", "flash", "blocks"])
def test_budget(position_map, dtype, head_dim, impl):
    if impl == "flash" and dtype == torch.float32:
        pytest.skip("flash does not take float32 on a GPU")
    torch.manual_seed(0)
    rotary = _rotary(head_dim // 2)
    for queries, keys in ((1, 700), (1, 4500), (3, 513), (256, 700), (257, 257), (300, 1100), (700, 700)):
        # The yardstick is the largest error of a sample, which must not be small.
        batch = (64 if keys < 1000 else 16) if queries < 4 else 2
        q, k, v = _tensors(batch, 6, 2, queries, keys, head_dim, dtype)
        output = attention(q, k, v, position_map, rotary, impl=impl)
        assert output.dtype == dtype
        assert within_budget(output, q, k, v, position_map, rotary) is None, (queries, keys)


def test_auto_is_fused_where_it_can_be():
    def chosen(q, k, v, **options):
        return choose(Call(q, k, v, SelfExtend(2, 8), _rotary(64), None, 0.1, **options))

    q, k, v = _tensors(1, 4, 2, 3, 40, 64, torch.bfloat16)
    assert chosen(q, k, v) == chosen(q, k, v, softcap=5.0) == "fused"
    assert chosen(q.requires_grad_(), k, v) == "blocks"
    assert chosen(*_tensors(1, 4, 2, 3, 40, 64, torch.float64)) == "blocks"


@over_dtypes
@pytest.mark.parametrize(
    "position_map",
    [Identity(), SelfExtend(8, 256), SelfExtend(8, 256, start=600), SELF(9, 0.05, 100, "distance")],
    ids=str,
)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_softcap_and_sinks(position_map, dtype, head_dim):
    torch.manual_seed(0)
    rotary, sinks = _rotary(head_dim), torch.randn(6, device="cuda")
    tolerance = {torch.float32: 3e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}[dtype]
    for options in ({"sinks": sinks}, {"softcap": 5.0}, {"softcap": 5.0, "sinks": sinks}):
        for queries in (1, 300, 700):
            q, k, v = _tensors(2, 6, 2, queries, 700, head_dim, dtype)
            output = attention(q, k, v, position_map, rotary, impl="fused", **options)
            # The specification on the same numbers, not rounded in between.
            expected = attention(q.float(), k.float(), v.float(), position_map, rotary, impl="reference", **options)
            torch.testing.assert_close(output.float(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("impl", ["fused", "auto"])
@pytest.mark.parametrize("queries", [1, 40])
def test_rows_in_a_static_cache(impl, queries):
    """Padded on the left, and with nothing but NaN past the queries."""
    torch.manual_seed(0)
    position_map, rotary, scaling = SelfExtend(3, 32), _rotary(64), QueryScaling("log-n", 64)
    q, k, v = _tensors(3, 6, 2, queries, 500, 64, torch.bfloat16)
    firsts, end = (0, 130, 299), 340
    mask = torch.zeros(3, 500, device="cuda").bool()
    for row, first in enumerate(firsts):
        mask[row, first:end] = True
    k, v = (x.masked_fill(~mask[:, None, :, None], torch.nan) for x in (k, v))
    start = torch.tensor(end - queries, device="cuda")
    options = {"query_scaling": scaling, "impl": impl}
    output = attention(q, k, v, position_map, rotary, layout=Layout(queries, 500, start, mask), **options)
    for row, first in enumerate(firsts):
        one = (q[row : row + 1], k[row : row + 1, :, first:end], v[row : row + 1, :, first:end])
        alone = attention(*one, position_map, rotary, **options)
        torch.testing.assert_close(output[row : row + 1], alone, rtol=0, atol=5e-2)


@pytest.mark.parametrize("masked", [False, True])
def test_a_cuda_graph_holds_a_decode_step(masked):
    """One graph for all lengths: they, and the padding, are read on the device at each replay."""
    torch.manual_seed(0)
    position_map, rotary, scaling = SelfExtend(8, 64), _rotary(64), QueryScaling("yarn", 100)
    q, k, v = _tensors(2, 6, 2, 1, 1000, 64, torch.bfloat16)
    start = torch.tensor(999, device="cuda")
    mask = torch.ones(2, 1000, device="cuda").bool() if masked else None

    def step():
        layout = Layout(1, 1000, start, mask)
        return attention(q, k, v, position_map, rotary, layout=layout, query_scaling=scaling)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for last, first in ((0, 0), (63, 40), (64, 10), (517, 300), (999, 1)):
        start.fill_(last)
        if mask is not None:
            mask.fill_(True)
            mask[1, :first] = False
        graph.replay()
        assert torch.equal(captured, step())
        end = last + 1
        for row, begin in ((0, 0), (1, first if masked else 0)):
            one = (q[row : row + 1], k[row : row + 1, :, begin:end], v[row : row + 1, :, begin:end])
            alone = attention(*one, position_map, rotary, query_scaling=scaling, impl="reference")
            torch.testing.assert_close(captured[row : row + 1], alone, rtol=0, atol=5e-2)


@pytest.mark.parametrize("queries", [1, 300])
@pytest.mark.parametrize("position_map", [SelfExtend(8, 64), SELF(9, 0.05, 100, "distance")], ids=str)
def test_a_graph_keeps_its_tables_and_only_its_own(position_map, queries):
    q, k, v = _tensors(1, 4, 2, queries, 1000, 64, torch.bfloat16)
    rotary = _rotary(64)
    attention(q, k, v, position_map, rotary)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attention(q, k, v, position_map, rotary)
    expected = attention(q, k, v, position_map, rotary)
    tables = [weakref.ref(x) for x in (*rotary.tables._kept.values(), *rotary.tables._angles.values())]
    owner = weakref.ref(rotary)
    del rotary
    gc.collect()
    assert owner() is None
    # What was let go of would be overwritten.
    filler = [torch.full((1 << 20,), torch.nan, device="cuda") for _ in range(64)]
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, expected)
    del filler, graph, captured
    gc.collect()
    torch.cuda.synchronize()
    # The next graph that is captured looks at which are gone.
    other, rotary = torch.cuda.CUDAGraph(), _rotary(64)
    attention(q, k, v, SelfExtend(2, 64), rotary)
    with torch.cuda.graph(other):
        attention(q, k, v, SelfExtend(2, 64), rotary)
    gc.collect()
    assert all(table() is None for table in tables)


def test_a_decode_step_does_not_wait_for_the_device():
    q, k, v = _tensors(2, 6, 2, 1, 1000, 64, torch.bfloat16)
    layouts = [Layout(1, 1000), Layout(1, 1000, 700), Layout(1, 1000, torch.tensor(700, device="cuda"))]
    arguments = (q, k, v, SelfExtend(8, 64), _rotary(64))
    attention(*arguments, layout=Layout(1, 1000, 700))  # compiles, and makes tables
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that it may miss some
        torch.cuda.set_sync_debug_mode("error")
    try:
        for layout in layouts:
            attention(*arguments, layout=layout, query_scaling=QueryScaling("log-n", 64))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@over_dtypes
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_same_call_twice_is_identical(dtype, head_dim):
    rotary = _rotary(head_dim)
    for position_map in (SelfExtend(8, 256), SELF(9, 0.05, 100, "distance"), SelfExtend(8, 256, start=600)):
        for queries in (1, 3, 900):
            q, k, v = _tensors(2, 6, 2, queries, 900, head_dim, dtype)
            first, *others = (attention(q, k, v, position_map, rotary) for _ in range(4))
            assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("impl", ["auto", "blocks"])
def test_padded_batch_equals_its_rows_alone(dtype, impl):
    torch.manual_seed(0)
    position_map, rotary = SelfExtend(3, 8), _rotary(64)
    q, k, v = _tensors(2, 4, 2, 12, 40, 64, dtype)
    mask = torch.ones(2, 40, device="cuda").bool()
    mask[0, :9] = False
    output = attention(q, k, v, position_map, rotary, layout=Layout(12, 40, key_mask=mask), impl=impl)
    alone = attention(q[:1], k[:1, :, 9:], v[:1, :, 9:], position_map, rotary, impl=impl)
    torch.testing.assert_close(output[:1], alone)


@pytest.mark.parametrize("head_dim", [80, 128])
@pytest.mark.parametrize("queries", [1, 70])
def test_a_million_tokens(head_dim, queries):
    """Offsets into such a cache are past 32 bits."""
    keys = 1 << 20
    key_heads = 2**31 // (keys * head_dim) + 2
    if torch.cuda.mem_get_info()[1] < 40e9:
        pytest.skip("needs a GPU with 40 GB")
    torch.manual_seed(0)
    shape = (1, key_heads, keys, head_dim)
    q = 2 * torch.randn(1, key_heads, queries, head_dim, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    position_map, rotary = SelfExtend(64, 1024), _rotary(head_dim // 2)
    output = attention(q, k, v, position_map, rotary, impl="fused")
    # Of the last head alone: a reference of all would not fit.
    one = slice(key_heads - 1, key_heads)
    assert k[:, one].storage_offset() >= 2**31
    expected = attention(
        q[:, one].float(), k[:, one].float(), v[:, one].float(), position_map, rotary, impl="reference"
    )
    error = (output[:, one].float() - expected).norm() / expected.norm()
    assert error <= 1e-2


def test_memory_grows_linearly():
    """32k tokens: one bf16 query x key matrix would take 2 GiB a head."""
    q, k, v = _tensors(1, 8, 2, 32768, 32768, 64, torch.bfloat16)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.inference_mode():
        attention(q, k, v, SelfExtend(8, 1024), _rotary(64))
    inputs = sum(x.nbytes for x in (q, k, v))
    assert torch.cuda.max_memory_allocated() - before < 12 * inputs
