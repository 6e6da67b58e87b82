# SPDX-License-Identifier: Apache-2.0
"""What the operator refuses: in one place, whatever the implementation."""

from __future__ import annotations

import math

import pytest
import torch
from tensors import IMPLEMENTATIONS, random_rotary

from ropewalk.maps import Identity, SelfExtend
from ropewalk.ops import Layout, Pages, Positions, Rotary, attention
from ropewalk.ops.call import Call, check, side_by_side

over_impls = pytest.mark.parametrize("impl", ["auto", *IMPLEMENTATIONS])

SHAPES = {"query": (1, 2, 3, 8), "key": (1, 2, 3, 8), "value": (1, 2, 3, 8)}


def refused(message, impl="auto", position_map=None, rotary=None, tensors=None, **options):
    given = {name: torch.zeros(shape) for name, shape in SHAPES.items()} | (tensors or {})
    with pytest.raises(ValueError, match=message):
        attention(
            *given.values(), SelfExtend(2, 2) if position_map is None else position_map, rotary, impl=impl, **options
        )


@over_impls
@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"query": (2, 3, 8)}, r"tensors must be \(batch, heads, tokens, head_dim\); query \(2, 3, 8\)"),
        ({"value": (1, 2, 4, 8)}, "key and value heads or lengths differ"),
        ({"value": (1, 1, 3, 8)}, "key and value heads or lengths differ"),
        ({"query": (1, 3, 3, 8)}, "multiple of key heads"),
        ({"query": (2, 2, 3, 8)}, "batch sizes differ"),
        ({"query": (1, 2, 3, 6)}, "head dimensions differ"),
        ({"query": (1, 2, 4, 8)}, "there are more queries than keys"),
        ({"query": (1, 0, 3, 8)}, "multiple of key heads, 1 or more of either"),
        ({"key": (1, 0, 3, 8), "value": (1, 0, 3, 8)}, "multiple of key heads, 1 or more of either"),
        ({"query": (1, 0, 3, 8), "key": (1, 0, 3, 8), "value": (1, 0, 3, 8)}, "1 or more of either"),
        ({"query": (1, 2, 3, 0), "key": (1, 2, 3, 0)}, "head_dim must be 1 or more"),
        ({"query": (0, 0, 0, 0), "key": (0, 0, 0, 0), "value": (0, 0, 0, 0)}, "head_dim must be 1 or more"),
    ],
    ids=str,
)
def test_shapes(shapes, message, impl):
    refused(message, impl, tensors={name: torch.zeros(shape) for name, shape in shapes.items()})


@over_impls
@pytest.mark.parametrize("name", ["scale", "softcap"])
@pytest.mark.parametrize("number", [0, 0.0, -0.0, -1.0, math.nan, math.inf, -math.inf])
def test_scale_and_softcap(name, number, impl):
    refused(rf"{name} must be above 0, and finite, got {number}", impl, **{name: number})


@over_impls
@pytest.mark.parametrize(
    ("sinks", "message"),
    [
        (torch.zeros(1), r"sinks must be one number a head, shape \(2,\), got \(1,\)"),
        (torch.zeros(3), r"shape \(2,\), got \(3,\)"),
        (torch.zeros(2, 1), r"shape \(2,\), got \(2, 1\)"),
        (torch.zeros(()), r"shape \(2,\), got \(\)"),
        (torch.zeros(1, 2), r"shape \(2,\), got \(1, 2\)"),
        (torch.zeros(2, dtype=torch.int64), r"floating-point numbers on cpu, got torch.int64 on cpu"),
        (torch.zeros(2).bool(), r"floating-point numbers on cpu, got torch.bool on cpu"),
        (torch.zeros(2).cfloat(), r"floating-point numbers on cpu, got torch.complex64 on cpu"),
        (torch.zeros(2, device="meta"), "floating-point numbers on cpu, got torch.float32 on meta"),
    ],
    ids=str,
)
def test_sinks_and_slopes(sinks, message, impl):
    refused(message, impl, sinks=sinks)
    if impl in ("auto", "reference"):
        refused(message.replace("sinks", "slopes"), impl, slopes=sinks)


@over_impls
@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"query": torch.zeros(1, 2, 3, 8).long()}, "query must be float32, .* got torch.int64"),
        ({"key": torch.zeros(1, 2, 3, 8).half()}, "dtypes differ: query torch.float32, key torch.float16"),
        ({"value": torch.zeros(1, 2, 3, 8).half()}, "dtypes differ: query torch.float32, value torch.float16"),
        ({"key": torch.zeros(1, 2, 3, 8, device="meta")}, "devices differ: query cpu, key meta, value cpu"),
        ({"value": torch.zeros(1, 2, 3, 8, device="meta")}, "devices differ: query cpu, key cpu, value meta"),
    ],
)
def test_dtypes_and_devices(tensors, message, impl):
    refused(message, impl, tensors=tensors)


@over_impls
@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(2, 3), "layout is for 2 queries and 3 keys"),
        (Layout(3, 4), "layout is for 3 queries and 4 keys"),
        (Layout(3, 3, 1), "query_start 1 leaves no room for 3 queries among 3 keys"),
        (Layout(3, 3, -1), "query_start -1 leaves no room"),
        (Layout(3, 3, torch.tensor(1)), "query_start 1 leaves no room"),
        (Layout(3, 3, 1 << 40), f"query_start {1 << 40} leaves no room"),
        (Layout(3, 3, key_mask=torch.ones(2, 3).bool()), r"key_mask must be \(batch, keys\), got \(2, 3\)"),
        (Layout(3, 3, key_mask=torch.ones(3).bool()), r"key_mask must be \(batch, keys\), got \(3,\)"),
        (Layout(3, 3, key_mask=torch.ones(1, 1, 3, 3).bool()), r"key_mask must be \(batch, keys\)"),
        # Zeros of an additive mask mean the contrary of zeros of this one.
        (Layout(3, 3, key_mask=torch.zeros(1, 3)), "bool, or 0 and 1.*, got torch.float32"),
        (Layout(3, 3, key_mask=torch.ones(1, 3).half()), "bool, or 0 and 1.*, got torch.float16"),
    ],
    ids=str,
)
def test_layouts(layout, message, impl):
    refused(message, impl, layout=layout)


@over_impls
def test_rotary_embeddings_that_do_not_fit(impl):
    for rotary in (random_rotary(10), random_rotary(6, offset=4), random_rotary(4, offset=-2)):
        refused(rf"a rotary embedding of {rotary.dim} dimensions from {rotary.offset} on", impl, rotary=rotary)


@pytest.mark.parametrize("impl", ["fast", "", None, "Reference"])
def test_names_of_implementations(impl):
    refused(rf"impl must be one of auto, reference, blocks, flash, fused, got {impl!r}", impl)


def positions(queries, keys, axis_of_pair=None):
    return {"positions": Positions(queries, keys, axis_of_pair)}


def pages(table, lengths, starts):
    return {"pages": Pages(*(x if isinstance(x, torch.Tensor) else torch.tensor(x) for x in (table, lengths, starts)))}


THREE = torch.arange(3)[None]
AXES = THREE[..., None].expand(1, 3, 3)


@over_impls
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (positions(THREE[0], THREE), r"positions of queries must be int64 \(1, 3\), got torch.int64 \(3,\)"),
        (positions(THREE, THREE[:, :2]), r"positions of keys must be int64 \(1, 3\), got torch.int64 \(1, 2\)"),
        (positions(THREE.int(), THREE), "positions of queries must be int64"),
        (positions(THREE, THREE.double()), "positions of keys must be int64"),
        (positions(THREE[..., None, None], THREE), "positions of queries must be int64"),
        (positions(AXES, THREE), "positions of queries and of keys must have the same axes"),
        (positions(THREE, AXES), "positions of queries and of keys must have the same axes"),
        (positions(AXES, AXES[..., :2]), "positions of queries and of keys must have the same axes"),
        (positions(AXES, AXES), "axis_of_pair must name one of the axes of positions for each of 4 pairs"),
        (positions(THREE, THREE, torch.zeros(4).long()), "axis_of_pair must name one of the axes"),
        (positions(AXES, AXES, torch.tensor([0, 1, 2])), "for each of 4 pairs"),
        (positions(AXES, AXES, torch.tensor([0, 1, 2, 3])), "axis_of_pair must name one of the axes"),
        (positions(AXES, AXES, torch.tensor([0, 1, 2, -1])), "axis_of_pair must name one of the axes"),
        (positions(THREE.to("meta"), THREE), "positions of queries must be on cpu, got meta"),
        (pages([0], [3], [0, 3]), "pages must have a table"),
        (pages([[0]], [3, 3], [0, 3]), "pages must have a table"),
        (pages([[0]], [3], [0, 3, 3]), "pages must have a table"),
        (pages([[0.0]], [3], [0, 3]), "tensors of pages must be int32 or int64, got torch.float32"),
        (pages([[0]], [3], [0, 3]) | {"layout": Layout(3, 3)}, "layout must be left out"),
        (pages([[0]], [3], [0, 3]) | positions(THREE, THREE), "pages take neither far_keys nor positions"),
        ({"key_scale": torch.ones(2)}, r"key_scale must be broadcast to \(1, 2, 3, 8\), got \(2,\)"),
        ({"value_scale": torch.ones(1, 1, 1, 1, 1)}, r"value_scale must be broadcast to .* got \(1, 1, 1, 1, 1\)"),
    ],
    ids=str,
)
def test_what_only_some_implementations_know(options, message, impl):
    refused(message, impl, rotary=random_rotary(8), **options)


@over_impls
@pytest.mark.parametrize("maps", [[Identity()], [Identity()] * 3, []], ids=str)
def test_a_map_for_each_key_head(maps, impl):
    refused(rf"maps must be one for each of 2 key heads, got {len(maps)}", impl, maps)


def test_every_shape_is_in_the_error():
    refused(
        r"; query \(1, 3, 3, 8\), key \(1, 2, 3, 8\), value \(1, 2, 3, 8\)", tensors={"query": torch.zeros(1, 3, 3, 8)}
    )


def test_a_call_without_layout():
    """As implementations get it."""
    call = Call(*(torch.zeros(1, 2, n, 8) for n in (4, 3, 3)), Identity(), random_rotary(8), None, 1.0)
    with pytest.raises(ValueError, match="there are more queries than keys"):
        check(call)


def test_numbers_side_by_side_are_not_copied():
    x = torch.zeros(2, 3, 4, 8)
    for view in (x, x.transpose(1, 2), x[..., 2:5], x[..., ::2][..., :1], x.expand(5, 2, 3, 4, 8)[0]):
        assert side_by_side(view) is view
    for view in (x.mT, x[..., ::2], x[..., :1].expand(-1, -1, -1, 8)):
        assert side_by_side(view).stride(-1) == 1
        assert torch.equal(side_by_side(view), view)
    assert side_by_side(None) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"position_map": SelfExtend}, "position_map must be a map such as .*, got <class"),
        ({"position_map": "selfextend"}, "position_map must be a map such as .*, got 's'"),
        ({"position_map": [Identity(), None]}, "one a key head, got None"),
        ({"rotary": torch.ones(4)}, "rotary must be a Rotary, got tensor"),
        ({"scale": "1"}, "scale must be a number, got '1'"),
        ({"scale": 10**400}, "scale must be above 0, and finite, got 1000"),
        ({"scale": 1e39}, "scale must be above 0, and finite"),
        ({"softcap": [1.0]}, r"softcap must be a number, got \[1.0\]"),
        ({"softcap": 10**400}, "softcap must be above 0, and finite"),
        ({"sinks": [0.0, 0.0]}, r"sinks must be a tensor, got \[0.0, 0.0\]"),
        ({"slopes": 1.0}, "slopes must be a tensor, got 1.0"),
        ({"far_keys": [torch.zeros(1)]}, "far_keys must be a tensor, got"),
        ({"query_scaling": "log-n"}, "query_scaling must be a QueryScaling, got 'log-n'"),
        ({"key_scale": 2.0}, "key_scale must be a tensor, got 2.0"),
        ({"value_scale": 2}, "value_scale must be a tensor, got 2"),
        ({"layout": (3, 3)}, r"layout must be a Layout, got \(3, 3\)"),
        ({"layout": Layout(3.0, 3)}, "lengths and start of a layout must be whole numbers, got 3.0, 3, None"),
        ({"layout": Layout(3, 3, torch.tensor([0, 0]))}, r"query_start must be one number, got \(2,\)"),
        ({"layout": Layout(3, 3, 0, torch.ones(1, 3, device="meta").bool())}, "key_mask is on the meta device"),
        ({"positions": torch.arange(3)}, "positions must be a Positions, got tensor"),
        ({"positions": Positions([0, 1, 2], [0, 1, 2])}, "queries, keys of Positions must be tensors"),
        ({"pages": Pages([[0]], [3], [0, 3])}, "table, lengths, query_starts of Pages must be tensors"),
        ({"tensors": {"query": [[0.0]]}}, r"query must be a tensor, got \[\[0.0\]\]"),
        ({"tensors": {"value": None}}, "value must be a tensor, got None"),
    ],
    ids=str,
)
def test_kinds(options, message):
    refused(message, **options)


@pytest.mark.parametrize(
    ("frequencies", "message"),
    [
        ([1.0, 0.1], r"floating-point numbers, shape \(pairs,\), got \[1.0, 0.1\]"),
        (torch.ones(1, 4), r"shape \(pairs,\), got \(1, 4\)"),
        (torch.ones(4).long(), r"floating-point numbers, shape \(pairs,\), got \(4,\)"),
        (torch.ones(4, device="meta"), "must be finite"),
        (torch.tensor([1.0, math.nan]), "must be finite, got .*nan"),
        (torch.tensor([math.inf]), "must be finite, got .*inf"),
    ],
    ids=str,
)
def test_frequencies(frequencies, message):
    with pytest.raises(ValueError, match=f"inverse_frequencies must be .*{message.removeprefix('must be ')}"):
        Rotary(frequencies)


@pytest.mark.parametrize(
    ("table", "lengths", "starts", "message"),
    [
        ([[0, 1]], [9], [0, 3], r"text 0 has 9 tokens, .* hold its 3 queries and lie in its 2 pages of 4"),
        ([[0, 1]], [2], [0, 3], "text 0 has 2 tokens, which must hold its 3 queries"),
        ([[0, 1]], [7], [1, 3], r"query_starts must go from 0 to the 3 queries, got \[1, 3\]"),
        ([[0, 1]], [7], [0, 5], r"query_starts must go from 0 to the 3 queries, got \[0, 5\]"),
        ([[0, 1], [0, 1]], [7, 7], [0, 4, 3], r"query_starts must go from 0 to the 3 queries, got \[0, 4, 3\]"),
        ([[0, -1]], [7], [0, 3], r"text 0 has pages \[0, -1\], and there are 2"),
        ([[2, 1]], [3], [0, 3], r"text 0 has pages \[2\], and there are 2"),
    ],
    ids=str,
)
def test_numbers_of_pages(table, lengths, starts, message):
    pages = Pages(torch.tensor(table), torch.tensor(lengths), torch.tensor(starts))
    stores = {"key": torch.zeros(2, 2, 4, 8), "value": torch.zeros(2, 2, 4, 8)}
    refused(message, tensors=stores, pages=pages)


def test_pages_past_a_text_may_be_anything():
    pages = Pages(torch.tensor([[0, -1]]), torch.tensor([4]), torch.tensor([0, 3]))
    store = torch.zeros(2, 2, 4, 8)
    attention(torch.zeros(1, 2, 3, 8), store, store, Identity(), None, pages=pages)


def test_far_keys_of_another_device():
    refused("devices differ: key cpu, far_keys meta", far_keys=torch.zeros(1, 2, 3, 8, device="meta"))
