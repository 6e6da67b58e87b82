"""impl="fused" end to end: on a GPU where there is one, otherwise in Triton's interpreter."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import triton_interpreter  # noqa: F401
from tensors import random_rotary, random_tensors
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from ropewalk.maps import SELF, Identity, LeakyReRoPE, ReRoPE, SelfExtend
from ropewalk.maps.query_scaling import QueryScaling
from ropewalk.maps.sliding_window import SlidingWindow
from ropewalk.ops import Layout, Rotary, api, attention, choose_impl, fused
from ropewalk.ops.rotary import far_band, moved
from ropewalk.testing.budget import within_budget
from ropewalk.testing.maps import example_maps

# Queries without far keys are never turned: the interpreter's numpy warns of what their memory happens to hold.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{what}:RuntimeWarning")
    for what in ("overflow encountered", "invalid value encountered", "All-NaN slice")
]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MAPS = [position_map for maps in example_maps().values() for position_map in maps]
SOME_MAPS = [
    Identity(),
    SelfExtend(3, 8),
    SelfExtend(3, 8, start=20),
    SELF(9, 0.3, 6, "distance", start=11),
    LeakyReRoPE(2.5, 7),
    SlidingWindow(9),
]
over_maps = pytest.mark.parametrize("position_map", SOME_MAPS, ids=str)


def tensors(batch, heads, key_heads, queries, keys, head_dim, dtype=torch.float32):
    return random_tensors(batch, heads, key_heads, queries, keys, head_dim, dtype, DEVICE)


def rotary_of(dim, **kind):
    rotary = random_rotary(dim, **kind)
    return Rotary(rotary.inverse_frequencies.to(DEVICE), rotary.interleaved, rotary.offset)


def close_to_reference(*arguments, layout=None, tolerance=1e-5, **options):
    output = attention(*arguments, layout=layout, impl="fused", **options)
    expected = attention(*arguments, layout=layout, impl="reference", **options)
    assert output.dtype == arguments[0].dtype
    assert_close(output, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("position_map", MAPS, ids=str)
def test_every_map(position_map):
    rotary = rotary_of(16)
    for queries in (1, 9, 40):
        close_to_reference(*tensors(1, 2, 1, queries, 40, 16), position_map, rotary)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("position_map", [SelfExtend(7, 50), SELF(9, 0.3, 30, "distance"), ReRoPE(64)], ids=str)
def test_budget(position_map, dtype):
    rotary = rotary_of(32, base=1e4)
    # The yardstick is the largest error of a sample, which must not be small.
    for batch, queries in ((16, 1), (1, 70), (1, 140)):
        q, k, v = tensors(batch, 3, 1, queries, 140, 32, dtype)
        output = attention(q, k, v, position_map, rotary, impl="fused")
        assert within_budget(output, q, k, v, position_map, rotary) is None, queries


@pytest.mark.parametrize("kind", [{"interleaved": True}, {"offset": 8}], ids=str)
def test_kinds_of_rotary(kind):
    rotary = rotary_of(16, **kind)
    for queries in (1, 30):
        close_to_reference(*tensors(1, 2, 1, queries, 40, 24), SelfExtend(3, 8), rotary)


@over_maps
def test_without_rotary(position_map):
    for queries in (1, 30):
        close_to_reference(*tensors(1, 2, 1, queries, 40, 16), position_map, None)


@over_maps
@pytest.mark.parametrize("queries", [1, 25])
def test_softcap_and_sinks(position_map, queries):
    q, k, v = tensors(1, 4, 2, queries, 40, 16)
    sinks = torch.tensor([0.5, -2.0, 3.0, 0.0], device=DEVICE)
    close_to_reference(q, k, v, position_map, rotary_of(16), sinks=sinks)
    close_to_reference(q, k, v, position_map, rotary_of(16), softcap=1.5)
    close_to_reference(q, k, v, position_map, rotary_of(16), softcap=1.5, sinks=sinks, scale=0.3)


@over_maps
def test_chunks_and_decode_equal_one_shot(position_map):
    rotary = rotary_of(16)
    q, k, v = tensors(1, 2, 1, 40, 40, 16)
    whole = attention(q, k, v, position_map, rotary, impl="fused")
    for begin, end in ((0, 1), (0, 13), (13, 14), (14, 33), (33, 40), (39, 40)):
        part = attention(q[:, :, begin:end], k[:, :, :end], v[:, :, :end], position_map, rotary, impl="fused")
        assert_close(part, whole[:, :, begin:end], rtol=0, atol=1e-5)


MASKS = {
    "left": [[0] * 9 + [1] * 31, [1] * 40, [0] * 39 + [1]],
    "right": [[1] * 31 + [0] * 9, [1] * 40, [1] + [0] * 39],
    "gap": [[1] * 10 + [0] * 8 + [1] * 22, [0] * 3 + [1] * 20 + [0] * 10 + [1] * 7, [1] * 40],
    "empty row": [[0] * 40, [1] * 40, [0] * 40],
    "all": [[1] * 40] * 3,
}


@pytest.mark.parametrize("case", MASKS)
@pytest.mark.parametrize("queries", [1, 12])
def test_padded_batch_equals_its_rows_alone(case, queries, monkeypatch):
    position_map, rotary = SelfExtend(3, 8), rotary_of(16)
    mask = torch.tensor(MASKS[case], device=DEVICE).bool()
    q, k, v = tensors(3, 4, 2, queries, 40, 16)
    k, v = (x.masked_fill(~mask[:, None, :, None], torch.nan) for x in (k, v))
    layout = Layout(queries, 40, key_mask=mask)
    output = attention(q, k, v, position_map, rotary, layout=layout, impl="fused")
    if queries == 1:
        assert (layout.step(3, DEVICE) is None) == (case in ("right", "gap"))
    for row in range(3):
        kept, kept_queries = mask[row], mask[row, 40 - queries :]
        assert (output[row, :, ~kept_queries] == 0).all()
        if kept_queries.any():
            one = slice(row, row + 1)
            alone = attention(
                q[one, :, kept_queries], k[one, :, kept], v[one, :, kept], position_map, rotary, impl="fused"
            )
            assert_close(output[one, :, kept_queries], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["int", "tensor", "one-element tensor", "host tensor"])
@pytest.mark.parametrize("start", [0, 17, 39])
def test_decode_in_a_static_cache(kind, start):
    position_map, rotary = SelfExtend(3, 8), rotary_of(16)
    q, k, v = tensors(2, 4, 2, 1, 40, 16)
    k[:, :, start + 1 :], v[:, :, start + 1 :] = torch.nan, torch.nan
    expected = attention(q, k[:, :, : start + 1], v[:, :, : start + 1], position_map, rotary, impl="reference")
    query_start = {
        "int": start,
        "tensor": torch.tensor(start, device=DEVICE),
        "one-element tensor": torch.tensor([start], device=DEVICE),
        "host tensor": torch.tensor(start),
    }[kind]
    layout = Layout(1, 40, query_start)
    assert_close(attention(q, k, v, position_map, rotary, layout=layout, impl="fused"), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("columns", [30, 40])
def test_decode_of_padded_rows_in_a_static_cache(columns):
    position_map, rotary = SelfExtend(3, 8), rotary_of(16)
    q, k, v = tensors(2, 4, 2, 1, 40, 16)
    mask = torch.zeros(2, columns, device=DEVICE).bool()
    mask[0, 5:30], mask[1, :30] = True, True
    output = attention(
        q, k, v, position_map, rotary, layout=Layout(1, 40, torch.tensor(29, device=DEVICE), mask), impl="fused"
    )
    for row, first in enumerate((5, 0)):
        one = slice(row, row + 1)
        alone = attention(q[one], k[one, :, first:30], v[one, :, first:30], position_map, rotary, impl="reference")
        assert_close(output[one], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["log-n", "yarn"])
def test_query_scaling(kind):
    options = {"query_scaling": QueryScaling(kind, 16)}
    position_map, rotary = SelfExtend(3, 8), rotary_of(16)
    mask = torch.arange(40, device=DEVICE) >= torch.tensor([0, 9], device=DEVICE)[:, None]
    for queries in (1, 30):
        q, k, v = tensors(2, 4, 2, queries, 40, 16)
        close_to_reference(q, k, v, position_map, rotary, **options)
        close_to_reference(q, k, v, position_map, rotary, layout=Layout(queries, 40, key_mask=mask), **options)
    start = torch.tensor(25, device=DEVICE)
    close_to_reference(*tensors(2, 4, 2, 1, 40, 16), position_map, rotary, layout=Layout(1, 40, start), **options)


@pytest.mark.parametrize("position_map", [SelfExtend(3, 8), SelfExtend(3, 8, start=30), ReRoPE(5)], ids=str)
@pytest.mark.parametrize("queries", [1, 23])
def test_kept_far_keys(position_map, queries):
    rotary, band = rotary_of(16), far_band(position_map)
    q, k, v = tensors(2, 4, 2, queries, 40, 24)
    view = moved(k[:, :, : 40 - band.first], band.key_positions, 0, rotary)
    close_to_reference(q, k, v, position_map, rotary, far_keys=view)
    # Of several queries they are used.
    output = attention(q, k, v, position_map, rotary, far_keys=view * torch.nan, impl="fused")
    assert output.isnan().any() == (queries > 1)


def test_strides():
    q, k, v = tensors(2, 2, 2, 12, 24, 16)
    rotary = rotary_of(16)
    for position_map in (SelfExtend(3, 8), SELF(9, 0.3, 6, "distance")):
        for first in (0, 11):
            expected = attention(q[:, :, first:], k, v, position_map, rotary, impl="fused")
            for change in (
                lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
                lambda x: x.mT.contiguous().mT,
                lambda x: torch.nn.functional.pad(x, (3, 2))[..., 3:-2],
            ):
                output = attention(*map(change, (q[:, :, first:], k, v)), position_map, rotary, impl="fused")
                assert torch.equal(output, expected)


def test_inputs_are_left_alone():
    arguments = tensors(2, 4, 2, 30, 40, 16)
    copies = [x.clone() for x in arguments]
    attention(*arguments, SelfExtend(3, 8), rotary_of(16), impl="fused")
    assert all(torch.equal(x, copy) for x, copy in zip(arguments, copies, strict=True))


@pytest.fixture
def no_host_reads(monkeypatch):
    """What waits for a device raises. The kernel, which the interpreter runs on the host, is taken down for later."""
    calls = []

    def record(query, *arguments):
        calls.append((query, *arguments))
        return torch.empty_like(query)

    def refuse(self, *arguments, **options):
        raise AssertionError("a tensor was read on the host")

    def forbid():
        monkeypatch.setattr(fused, "decode", SimpleNamespace(decode=record))
        for name in ("item", "tolist", "cpu", "numpy", "__int__", "__bool__", "__float__", "__index__", "nonzero"):
            monkeypatch.setattr(Tensor, name, refuse)

    def outputs():
        monkeypatch.undo()
        return [fused.decode.decode(*arguments) for arguments in calls]

    return SimpleNamespace(forbid=forbid, outputs=outputs)


@pytest.mark.parametrize("query_scaling", [None, QueryScaling("log-n", 16)], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_decode_reads_nothing_on_the_host(no_host_reads, batch, query_scaling):
    position_map, rotary = SelfExtend(3, 8), rotary_of(16)
    q, k, v = tensors(batch, 4, 2, 1, 40, 16)
    layouts = [Layout(1, 40, torch.tensor(25, device=DEVICE)), Layout(1, 40), Layout(1, 40, 30)]
    options = {"query_scaling": query_scaling}
    no_host_reads.forbid()
    for layout in layouts:
        for _ in range(2):
            attention(q, k, v, position_map, rotary, layout=layout, impl="fused", **options)
    for output, end in zip(no_host_reads.outputs(), (26, 26, 40, 40, 31, 31), strict=True):
        expected = attention(q, k[:, :, :end], v[:, :, :end], position_map, rotary, impl="reference", **options)
        assert_close(output, expected, rtol=0, atol=1e-5)


def test_layers_share_what_the_layout_knows():
    layout = Layout(1, 40, torch.tensor(25, device=DEVICE))
    assert layout.step(3, DEVICE) is layout.step(3, DEVICE)
    assert Layout(1, 40).step(3, DEVICE).lengths is None


def test_a_mask_is_read_once(no_host_reads):
    mask = torch.arange(40, device=DEVICE) >= torch.tensor([0, 9], device=DEVICE)[:, None]
    layout = Layout(1, 40, key_mask=mask)
    q, k, v = tensors(2, 4, 2, 1, 40, 16)
    assert layout.step(2, DEVICE).tokens == 40
    no_host_reads.forbid()
    for _ in range(3):
        attention(q, k, v, SelfExtend(3, 8), rotary_of(16), layout=layout, impl="fused")
    assert len(no_host_reads.outputs()) == 3


def test_a_captured_step_has_the_device_check_the_mask(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    checked = []
    monkeypatch.setattr(torch, "_assert_async", lambda condition, message: checked.append((condition, message)))
    device = SimpleNamespace(type="cuda")
    for rows, fits in (([[0, 0, 1, 1], [1, 1, 1, 1]], True), ([[1, 0, 1, 1], [1, 1, 1, 1]], False)):
        mask = SimpleNamespace(to=lambda device, rows=rows: torch.tensor(rows))
        step = Layout(1, 6, 3, mask)._make_step(2, device)
        assert step.tokens is None
        (condition, message) = checked.pop()
        assert bool(condition) == fits
        assert "padded on the left only" in message


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
    with pytest.raises(ValueError, match=rf"impl='fused' does not take .*{message}.*; impl='blocks' does"):
        attention(q, k, v, SelfExtend(2, 2), None, impl="fused")


def test_installations_without_triton(monkeypatch):
    monkeypatch.setattr(api, "_NO_KERNELS", "this installation, which has no Triton")
    with pytest.raises(ValueError, match="this installation, which has no Triton"):
        attention(*tensors(1, 4, 2, 3, 5, 16), SelfExtend(2, 2), None, impl="fused")


def test_fake_tensors_never_reach_a_kernel():
    with FakeTensorMode():
        q, k, v = (torch.randn(1, 2, 4, 16, device=DEVICE) for _ in range(3))
        with pytest.raises(ValueError, match="FakeTensor"):
            attention(q, k, v, SelfExtend(2, 2), None, impl="fused")


@pytest.mark.skipif(DEVICE.type != "cpu", reason="on a GPU it is what auto means")
def test_the_interpreter_is_never_chosen(monkeypatch):
    tried = tensors(1, 2, 1, 3, 3, 8)
    assert choose_impl(*tried) == "flash"
    assert choose_impl(*tried, softcap=2.0) == "blocks"
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="device cpu"):
        attention(*tried, SelfExtend(2, 2), None, impl="fused")


def test_choice_on_a_gpu(caplog, monkeypatch):
    """With tensors that only say where they are."""
    monkeypatch.setattr(api, "_fused_lacks", lambda *tensors: None)
    gpu = SimpleNamespace(device=SimpleNamespace(type="cuda"))
    assert choose_impl(gpu, gpu, gpu, softcap=2.0) == "fused"
    api._log_fallback.cache_clear()
    monkeypatch.setattr(api, "_fused_lacks", lambda *tensors: "this installation, which has no Triton")
    monkeypatch.setattr(api.windowed, "unsupported", lambda *tensors: None)
    gpu.requires_grad = False
    assert choose_impl(gpu, gpu, gpu) == "flash"
    assert choose_impl(gpu, gpu, gpu, softcap=2.0) == "blocks"
    assert choose_impl(gpu, gpu, gpu) == "flash"
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        (
            "WARNING",
            f"attention runs on impl={impl!r}, slower than 'fused', which does not take this installation, which has "
            "no Triton",
        )
        for impl in ("flash", "blocks")
    ]


def test_prefill_kernel_is_explained(caplog):
    fused._log_kernel.cache_clear()
    q, k, v = tensors(1, 2, 1, 3, 3, 8)
    with caplog.at_level("INFO", logger="ropewalk"):
        for _ in range(2):
            attention(q, k, v, SelfExtend(2, 2), None, impl="fused")
    assert len(caplog.messages) == 1
    assert "prefill runs on the portable kernel; the one for Hopper GPUs does not take" in caplog.messages[0]


def test_same_call_twice_is_identical():
    for queries in (1, 50):
        arguments = tensors(1, 6, 2, queries, 90, 16, torch.bfloat16)
        first, second = (attention(*arguments, SelfExtend(8, 20), rotary_of(16), impl="fused") for _ in range(2))
        assert torch.equal(first, second)
    assert not math.isnan(first.float().sum())
