# SPDX-License-Identifier: Apache-2.0
"""What every implementation of the operator owes: the same numbers, whatever the map, the lengths and the memory.

The reference is held to attention written as loops, and the others to the reference.
"""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_maps import Bands, random_maps
from tensors import FAST, IMPLEMENTATIONS, device_of, explicit, random_rotary, random_tensors, relative, rotated
from torch.testing import assert_close

from ropewalk.maps import SELF, Band, DualChunk, Identity, LeakyReRoPE, ReRoPE, SelfExtend, SlidingWindow, StreamingLLM
from ropewalk.maps.edges import BEGINNING, PAST_QUERY, Edge
from ropewalk.maps.positions import Constant
from ropewalk.maps.query_scaling import QueryScaling
from ropewalk.ops import Layout, Rotary, attention
from ropewalk.testing.budget import within_budget
from ropewalk.testing.maps import example_maps, large_maps

MAPS = [position_map for maps in example_maps().values() for position_map in maps]
# Of one band, two and many; with keys that are not seen; with edges that are no diagonals; with a late start.
SOME_MAPS = [
    Identity(),
    SelfExtend(3, 8),
    SelfExtend(4, 8, start=20),
    SELF(5, 0.3, 8, "distance"),
    LeakyReRoPE(2.5, 7),
    SlidingWindow(9),
    DualChunk(6, 4),
    StreamingLLM(3, 7),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

over_impls = pytest.mark.parametrize("impl", IMPLEMENTATIONS)
over_fast = pytest.mark.parametrize("impl", FAST)
over_maps = pytest.mark.parametrize("position_map", SOME_MAPS, ids=str)

# Queries without far keys are never turned: the interpreter's numpy warns of what their memory happens to hold.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{what}:RuntimeWarning")
    for what in ("overflow encountered", "invalid value encountered", "All-NaN slice")
]


def tensors(impl, *shape, dtype=torch.float32):
    return random_tensors(*shape, dtype, device_of(impl))


def rotary_of(impl, dim, **kind):
    return random_rotary(dim, device=device_of(impl), **kind)


def assert_near(output, expected, impl):
    """Float32 in another order of summation, and in the kernels with sines of their own."""
    assert_close(output, expected, rtol=0, atol=1e-5 if impl == "fused" else 5e-6)


@pytest.mark.parametrize("position_map", MAPS, ids=str)
def test_reference_is_the_formula(position_map):
    """Re-rotating what the model rotated gives what rotating by the relative position would have given."""
    rotary, tokens = random_rotary(12), torch.arange(23)
    expected_relative = relative(position_map, 23)
    for queries in (1, 5, 23):
        q, k, v = (x.double() for x in random_tensors(2, 4, 2, queries, 23, 16))
        expected = explicit(q, k, v, expected_relative[-queries:], rotary)
        q, k = rotated(q, rotary, tokens[-queries:]), rotated(k, rotary, tokens)
        output = attention(q, k, v, position_map, rotary, impl="reference")
        assert_close(output, expected, rtol=0, atol=2e-5)  # phases are rounded to float32, as models do


@over_fast
@pytest.mark.parametrize("position_map", MAPS, ids=str)
def test_every_map(position_map, impl):
    rotary = rotary_of(impl, 16)
    # An interpreted kernel takes a hundred times as long.
    for queries, keys in ((1, 40), (40, 40), (9, 40), (1, 1), (2, 2), (2, 40), (7, 7))[: 2 if impl == "fused" else 7]:
        q, k, v = tensors(impl, *((1, 2, 1) if impl == "fused" else (2, 4, 2)), queries, keys, 24)
        expected = attention(q, k, v, position_map, rotary, impl="reference")
        assert_near(attention(q, k, v, position_map, rotary, impl=impl), expected, impl)


def check_random(impl, draw, position_map, keys):
    """One call of random shapes against the loops."""
    queries, key_heads = draw(st.integers(1, keys), "queries"), draw(st.integers(1, 2), "key heads")
    heads = key_heads * draw(st.integers(1, 3), "groups")
    unit = 8 if impl == "fused" else 1  # of head dimensions
    head_dim = unit * draw(st.integers(1, 24 // unit), "head_dim")
    dim = 2 * draw(st.integers(0, head_dim // 2), "pairs")
    offset = draw(st.sampled_from([0, head_dim - dim]), "offset")
    kind = {"interleaved": draw(st.booleans(), "interleaved"), "offset": offset}
    q, k, v = random_tensors(draw(st.integers(1, 2), "batch"), heads, key_heads, queries, keys, head_dim)
    tokens, rotary = torch.arange(keys), random_rotary(dim)
    # As `explicit` wants a head: both of every pair a half apart, and the others behind them.
    order = list(range(dim, dim + offset)) + ([i // 2 + i % 2 * dim // 2 for i in range(dim)] if kind["interleaved"]
        else list(range(dim))) + list(range(dim + offset, head_dim))  # fmt: skip
    expected = explicit(q.double(), k.double(), v.double(), relative(position_map, keys)[-queries:], rotary)
    q, k = (rotated(x.double(), rotary, at)[..., order].float() for x, at in ((q, tokens[-queries:]), (k, tokens)))
    device = device_of(impl)
    arguments = [x.to(device) for x in (q, k, v)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        output = attention(*arguments, position_map, random_rotary(dim, device=device, **kind), impl=impl)
    assert_close(output.double().cpu(), expected, rtol=0, atol=3e-5)


known_maps = st.one_of(
    st.builds(SelfExtend, st.integers(1, 12), st.integers(1, 60), start=st.integers(0, 50)),
    st.builds(
        SELF,
        st.integers(2, 9),
        st.floats(0.05, 3),
        st.integers(1, 60),
        st.sampled_from(["anchored", "distance"]),
        start=st.integers(0, 50),
    ),
    st.builds(LeakyReRoPE, st.floats(1, 9), st.integers(1, 60)),
    st.builds(ReRoPE, st.integers(1, 60)),
    st.builds(SlidingWindow, st.integers(1, 60)),
)


@pytest.mark.parametrize("impl", ["reference", "blocks", "flash"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_bands_and_shapes(impl, data):
    position_map = data.draw(st.one_of(random_maps(), known_maps), "map")
    check_random(impl, data.draw, position_map, data.draw(st.integers(1, 60), "keys"))


@pytest.mark.skipif("fused" not in FAST, reason="needs Triton")
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_random_bands_and_shapes_in_the_kernels(data):
    check_random("fused", data.draw, data.draw(random_maps(), "map"), data.draw(st.integers(1, 40), "keys"))


@over_impls
def test_bands_without_keys(impl):
    """A map may leave a band empty: its edges are one edge, or it never leaves the first key."""
    near = Band(Edge(4), PAST_QUERY)
    q, k, v = tensors(impl, 1, 2, 1, 9, 20, 16)
    rotary = rotary_of(impl, 16)
    expected = attention(q, k, v, SlidingWindow(5), rotary, impl="reference")
    for low, high in ((Edge(6), Edge(6)), (BEGINNING, BEGINNING), (BEGINNING, Edge(7, 3, 0)), (Edge(5, 2, 4),) * 2):
        position_map = Bands((near, Band(low, high, Constant(4), Constant(0))))
        for queries in (1, 9):
            output = attention(q[:, :, -queries:], k, v, position_map, rotary, impl=impl)
            assert_near(output, expected[:, :, -queries:], impl)


@pytest.mark.parametrize("impl", ["blocks", "flash"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("position_map", large_maps(), ids=str)
def test_budget(position_map, dtype, impl):
    rotary = random_rotary(32, base=1e4)
    # The yardstick is the largest error of a sample, which must not be small.
    for batch, queries, keys in ((16, 1, 700), (1, 300, 700), (1, 257, 257)):
        q, k, v = random_tensors(batch, 3, 1, queries, keys, 32, dtype)
        output = attention(q, k, v, position_map, rotary, impl=impl)
        assert output.dtype == dtype
        assert within_budget(output, q, k, v, position_map, rotary) is None, (queries, keys)


@pytest.mark.parametrize("impl", ["blocks", "flash"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_budget_of_longer_texts(dtype, impl):
    """More keys than a piece of a single query's, and more queries than a block."""
    rotary = random_rotary(32, base=1e4)
    for position_map in (SelfExtend(7, 300), SELF(9, 0.05, 100, "distance"), DualChunk(250, 101)):
        for batch, queries, keys in ((3, 1, 4500), (1, 600, 1100)):
            q, k, v = random_tensors(batch, 3, 1, queries, keys, 32, dtype)
            output = attention(q, k, v, position_map, rotary, impl=impl)
            assert within_budget(output, q, k, v, position_map, rotary) is None, (str(position_map), queries, keys)


@over_impls
@over_maps
def test_chunks_and_decode_equal_one_shot(position_map, impl):
    """Bands depend on a query's own position, so how a text is cut does not matter."""
    rotary = rotary_of(impl, 16)
    q, k, v = tensors(impl, 1, 2, 1, 40, 40, 16)
    whole = attention(q, k, v, position_map, rotary, impl=impl)
    cuts = [(i, i + size) for size in (1, 7, 8, 31) for i in range(0, 40, size)]
    if impl == "fused":
        cuts = [(0, 13), (13, 14), (14, 33)]
    for begin, end in cuts:
        part = attention(q[:, :, begin:end], k[:, :, :end], v[:, :, :end], position_map, rotary, impl=impl)
        assert_near(part, whole[:, :, begin:end], impl)


MASKS = {
    "left": [[0] * 9 + [1] * 31, [1] * 40, [0] * 39 + [1]],
    "right": [[1] * 31 + [0] * 9, [1] * 40, [1] + [0] * 39],
    "gap": [[1] * 10 + [0] * 8 + [1] * 22, [0] * 3 + [1] * 20 + [0] * 10 + [1] * 7, [1] * 40],
    "empty row": [[0] * 40, [1] * 40, [0] * 40],
    "all": [[1] * 40] * 3,
}


@over_impls
@pytest.mark.parametrize("case", MASKS)
def test_padded_batch_equals_its_rows_alone(case, impl):
    position_map, rotary = SelfExtend(3, 8), rotary_of(impl, 16)
    mask = torch.tensor(MASKS[case], device=device_of(impl)).bool()
    for queries in (1, 12, 40):
        q, k, v = tensors(impl, 3, 2, 1, queries, 40, 16)
        # What padding slots hold must not matter, not even NaN.
        k, v = (x.masked_fill(~mask[:, None, :, None], torch.nan) for x in (k, v))
        layout = Layout(queries, 40, key_mask=mask)
        output = attention(q, k, v, position_map, rotary, layout=layout, impl=impl)
        if queries == 1:
            assert (layout.step(3, q.device) is None) == (case in ("right", "gap"))
        for row in range(3):
            kept, kept_queries = mask[row], mask[row, 40 - queries :]
            assert (output[row, :, ~kept_queries] == 0).all()
            if kept_queries.any():
                one = slice(row, row + 1)
                parts = q[one, :, kept_queries], k[one, :, kept], v[one, :, kept]
                alone = attention(*parts, position_map, rotary, impl="reference")
                assert_near(output[one, :, kept_queries], alone, impl)


@over_impls
@pytest.mark.parametrize("kind", [int, torch.tensor, lambda start: torch.tensor([start])])
@pytest.mark.parametrize("queries", [1, 5])
def test_slots_after_the_queries_are_never_read(impl, kind, queries):
    """A static cache is longer than what it holds."""
    position_map, rotary = SelfExtend(3, 8), rotary_of(impl, 16)
    for start in (0, 17, 40 - queries):
        end = start + queries
        q, k, v = tensors(impl, 2, 2, 1, queries, 40, 16)
        k[:, :, end:], v[:, :, end:] = torch.nan, torch.nan
        expected = attention(q, k[:, :, :end], v[:, :, :end], position_map, rotary, impl="reference")
        layout = Layout(queries, 40, query_start=kind(start))
        assert_near(attention(q, k, v, position_map, rotary, layout=layout, impl=impl), expected, impl)


@over_impls
@pytest.mark.parametrize("queries", [1, 5])
def test_mask_shorter_than_the_keys(impl, queries):
    q, k, v = tensors(impl, 2, 2, 1, queries, 40, 16)
    position_map, rotary, end = SelfExtend(3, 8), rotary_of(impl, 16), 17 + queries
    mask = torch.ones(2, end, device=q.device).bool()
    mask[0, :4] = False
    output = attention(
        q, k, v, position_map, rotary, layout=Layout(queries, 40, query_start=17, key_mask=mask), impl=impl
    )
    for row, first in enumerate((4, 0)):
        one = slice(row, row + 1)
        alone = attention(q[one], k[one, :, first:end], v[one, :, first:end], position_map, rotary, impl="reference")
        assert_near(output[one], alone, impl)


@over_impls
@over_maps
def test_sinks(impl, position_map):
    """A sink takes the share of the softmax that its logit has, and adds nothing."""
    rotary = rotary_of(impl, 16)
    for queries in (1, 25):
        q, k, v = (x.double() for x in tensors(impl, 1, 4, 1, queries, 40, 16))
        sinks = torch.tensor([0.5, -2.0, 3.0, 0.0], device=q.device)
        # A key of its own for each head, whose value is zero and whose score is the sink, does the same.
        plain = attention(q, k, v, position_map, rotary, impl="reference")
        ones = torch.cat((v, torch.ones_like(v[..., :1])), dim=-1)
        expected = attention(q, k, ones, position_map, rotary, sinks=sinks, impl="reference")
        kept = expected[..., -1:]  # what the sink leaves
        assert ((kept > 0) & (kept < 1)).all()
        assert_close(expected[..., :-1], plain * kept, rtol=0, atol=1e-12)
        output = attention(q.float(), k.float(), v.float(), position_map, rotary, sinks=sinks, impl=impl)
        assert_near(output, expected[..., :-1].float(), impl)


def test_a_sinks_share_is_that_of_its_logit():
    q, k, v = random_tensors(2, 4, 2, 30, 40, 16)
    sinks = torch.randn(4)
    plain = attention(q, k, v, Identity(), None, impl="reference")
    scores = (q @ k.repeat_interleave(2, 1).mT / 4).masked_fill(
        torch.arange(40) > torch.arange(10, 40)[:, None], -torch.inf
    )
    kept = torch.sigmoid(scores.logsumexp(-1) - sinks[:, None])[..., None]
    assert_close(attention(q, k, v, Identity(), None, sinks=sinks, impl="reference"), plain * kept, rtol=0, atol=5e-6)


@over_impls
@pytest.mark.parametrize("queries", [1, 9])
@pytest.mark.parametrize("name", ["sinks", "slopes"])
def test_a_number_a_head_of_any_memory_and_dtype(impl, queries, name):
    if (impl, name) == ("flash", "slopes"):
        pytest.skip("flash has no ALiBi, and says so")
    q, k, v = tensors(impl, 1, 4, 1, queries, 20, 16)
    rotary = rotary_of(impl, 16) if name == "sinks" else None
    numbers = torch.tensor([0.5, -2.0, 3.0, 0.25], device=q.device)

    def attend(numbers, impl):
        return attention(q, k, v, SelfExtend(3, 8), rotary, impl=impl, **{name: numbers})

    expected = attend(numbers, "reference")
    strided = torch.stack((numbers, torch.full_like(numbers, 50)), dim=1)[:, 0]
    offset = torch.cat((torch.full_like(numbers[:1], 50), numbers))[1:]
    for same in (strided, offset, numbers.bfloat16(), numbers.half(), numbers.double(), numbers.flip(0).flip(0)):
        assert_near(attend(same, impl), expected, impl)
    one = numbers[:1].expand(4)
    assert_near(attend(one, impl), attend(one.clone(), "reference"), impl)


@over_impls
@pytest.mark.parametrize("queries", [1, 9])
@pytest.mark.parametrize("position_map", [Identity(), SELF(5, 0.3, 4, "distance"), DualChunk(6, 4)], ids=str)
def test_sinks_without_bounds(impl, position_map, queries):
    """All of the softmax, none of it, and a sink that is no number leaves none."""
    q, k, v = tensors(impl, 1, 5, 1, queries, 20, 16)
    rotary = rotary_of(impl, 16)
    sinks = torch.tensor([torch.inf, 3e38, -torch.inf, torch.nan, 1.0], device=q.device)
    output = attention(q, k, v, position_map, rotary, sinks=sinks, impl=impl)
    assert (output[:, :2] == 0).all()
    assert_near(output[:, 2], attention(q, k, v, position_map, rotary, impl="reference")[:, 2], impl)
    assert output[:, 3].isnan().all()
    expected = attention(q[:, 4:], k, v, position_map, rotary, sinks=sinks[4:], impl="reference")
    assert_near(output[:, 4:], expected, impl)


@pytest.mark.parametrize("impl", ["reference", "blocks", "auto"])
def test_sinks_take_part_in_gradients(impl):
    q, k, v = random_tensors(1, 4, 2, 9, 20, 16)
    sinks = torch.tensor([0.5, -2.0, 3.0, 0.0], requires_grad=True)
    step = torch.tensor([0.0, 1e-3, 0.0, 0.0], dtype=torch.float64)

    def total(sinks, impl, dtype):
        return attention(*(x.to(dtype) for x in (q, k, v)), SelfExtend(3, 8), None, sinks=sinks, impl=impl).sum()

    total(sinks, impl, torch.float32).backward()
    ahead, behind = (total(sinks.detach().double() + s, "reference", torch.float64) for s in (step, -step))
    assert sinks.grad[1].item() == pytest.approx(((ahead - behind) / 2e-3).item(), rel=1e-4)


@pytest.mark.parametrize("impl", [impl for impl in IMPLEMENTATIONS if impl not in ("reference", "blocks")])
@pytest.mark.parametrize("queries", [1, 9])
def test_gradients_are_never_lost(impl, queries):
    names = ("query", "key", "value", "sinks")
    for name in names:
        arguments = dict(zip(names, (*tensors(impl, 1, 2, 1, queries, 9, 16), torch.zeros(2)), strict=True))
        arguments["sinks"] = arguments["sinks"].to(arguments["query"].device)
        arguments[name].requires_grad_()
        with pytest.raises(ValueError, match=rf"impl={impl!r} does not take gradients"):
            attention(*list(arguments.values())[:3], SelfExtend(3, 8), None, sinks=arguments["sinks"], impl=impl)
        assert attention(*list(arguments.values())[:3], SelfExtend(3, 8), None, sinks=arguments["sinks"]).requires_grad
        with torch.inference_mode():
            attention(*list(arguments.values())[:3], SelfExtend(3, 8), None, sinks=arguments["sinks"], impl=impl)


@pytest.mark.parametrize("impl", [impl for impl in FAST if impl != "flash"])
@over_maps
def test_softcap(impl, position_map):
    rotary = rotary_of(impl, 16)
    for queries in (1, 25):
        q, k, v = tensors(impl, 1, 4, 1, queries, 40, 16)
        sinks = torch.tensor([0.5, -2.0, 3.0, 0.0], device=q.device)
        for options in ({"softcap": 1.5}, {"softcap": 1.5, "sinks": sinks, "scale": 0.3}, {"softcap": 2, "scale": 1}):
            expected = attention(q, k, v, position_map, rotary, impl="reference", **options)
            assert_near(attention(q, k, v, position_map, rotary, impl=impl, **options), expected, impl)


def test_softcap_is_a_level_of_the_scores():
    q, k, v = random_tensors(2, 4, 2, 30, 40, 16)
    scores = 1.5 * torch.tanh(q @ k.repeat_interleave(2, 1).mT / 4 / 1.5)
    scores = scores.masked_fill(torch.arange(40) > torch.arange(10, 40)[:, None], -torch.inf)
    expected = scores.softmax(-1) @ v.repeat_interleave(2, 1)
    output = attention(q, k, v, Identity(), None, softcap=1.5, impl="reference")
    assert_close(output, expected, rtol=0, atol=5e-6)
    assert (output - attention(q, k, v, Identity(), None)).abs().max() > 0.1


@over_fast
@pytest.mark.parametrize("scale", [1, 0.05, 2.0])
def test_scale(impl, scale):
    for queries in (1, 9):
        q, k, v = tensors(impl, 1, 2, 1, queries, 40, 16)
        expected = attention(q * scale * 4, k, v, SelfExtend(3, 8), rotary_of(impl, 16), impl="reference")
        output = attention(q, k, v, SelfExtend(3, 8), rotary_of(impl, 16), scale=scale, impl=impl)
        assert_close(output, expected, rtol=0, atol=2e-5)


@over_fast
@over_maps
def test_without_rotary(impl, position_map):
    for queries in (1, 30):
        q, k, v = tensors(impl, 1, 2, 1, queries, 40, 16)
        expected = attention(q, k, v, position_map, None, impl="reference")
        assert_near(attention(q, k, v, position_map, None, impl=impl), expected, impl)
        seen = relative(position_map, 40)[-queries:].isfinite().to(q.device)
        scores = (q @ k.mT / 4).masked_fill(~seen, -torch.inf)
        assert_near(expected, scores.softmax(-1) @ v, impl)


@over_fast
@pytest.mark.parametrize("kind", ["log-n", "yarn"])
def test_query_scaling(kind, impl):
    position_map, rotary = SelfExtend(3, 8), rotary_of(impl, 16)
    m = torch.arange(40.0, device=device_of(impl))
    factors = {
        "log-n": ((m + 1).log() / math.log(16)).clamp(min=1),
        "yarn": (0.1 * (m / 16).clamp(min=1).log() + 1) ** 2,
    }[kind][:, None]
    first_slots = (0, 9)
    mask = torch.arange(40, device=m.device) >= torch.tensor(first_slots, device=m.device)[:, None]
    for queries in (1, 30):
        q, k, v = tensors(impl, 2, 2, 1, queries, 40, 16)
        scaling = {"query_scaling": QueryScaling(kind, 16), "impl": impl}
        output = attention(q, k, v, position_map, rotary, **scaling)
        assert_near(output, attention(q * factors[-queries:], k, v, position_map, rotary, impl="reference"), impl)
        layout = Layout(queries, 40, key_mask=mask)
        output = attention(q, k, v, position_map, rotary, layout=layout, **scaling)
        for row, first in enumerate(first_slots):
            one, padding = slice(row, row + 1), max(0, first - 40 + queries)
            scaled = q[one, :, padding:] * factors[: 40 - first][-queries:]
            alone = attention(scaled, k[one, :, first:], v[one, :, first:], position_map, rotary, impl="reference")
            assert_near(output[one, :, padding:], alone, impl)
    start = Layout(1, 40, torch.tensor(25, device=m.device))
    output = attention(q[:, :, :1], k, v, position_map, rotary, layout=start, **scaling)
    parts = q[:, :, :1] * factors[25], k[:, :, :26], v[:, :, :26]
    assert_near(output, attention(*parts, position_map, rotary, impl="reference"), impl)


def with_last_stride(x, stride):
    """The same numbers, as far apart; what lies between them is NaN."""
    room = torch.full((*x.shape, stride), torch.nan, dtype=x.dtype, device=x.device)
    room[..., 0] = x
    return room[..., 0]


MEMORIES = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "every third": lambda x: with_last_stride(x, 3),
    "tokens first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "padded": lambda x: torch.nn.functional.pad(x, (3, 2), value=torch.nan)[..., 3:-2],
    "a slice of slots": lambda x: torch.cat((x, torch.full_like(x, torch.nan)), dim=2)[:, :, : x.shape[2]],
}


@over_impls
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_does_not_matter(impl, dtype):
    """Query, key and value alone and together, for decode and for prefill through near, narrow and far bands."""
    rotary = rotary_of(impl, 16)
    for position_map in (SELF(5, 0.3, 6, "distance"), SelfExtend(3, 8), DualChunk(6, 4))[: 1 if impl == "fused" else 3]:
        for queries in (1, 11):
            arguments = tensors(impl, 2, 2, 1, queries, 24, 16, dtype=dtype)
            expected = attention(*arguments, position_map, rotary, impl=impl)
            assert not expected.isnan().any()
            for name, change in MEMORIES.items():
                for which in ((0, 1, 2),) if impl == "fused" else ((0,), (1,), (2,), (0, 1, 2)):
                    changed = [change(x) if i in which else x for i, x in enumerate(arguments)]
                    assert all(torch.equal(x, y) for x, y in zip(changed, arguments, strict=True))
                    output = attention(*changed, position_map, rotary, impl=impl)
                    assert torch.equal(output, expected), (str(position_map), queries, name, which)


@over_impls
@pytest.mark.parametrize("queries", [1, 11])
def test_heads_and_rows_that_are_one(impl, queries):
    """Expanded tensors, whose strides are 0, are read and never written."""
    rotary = rotary_of(impl, 16)
    q, k, v = tensors(impl, 1, 1, 1, queries, 24, 16)
    for position_map in (SelfExtend(3, 8), SELF(5, 0.3, 6, "distance"), DualChunk(6, 4)):
        expanded = q.expand(2, 4, -1, -1), k.expand(2, 2, -1, -1), v.expand(2, 2, -1, -1)
        expected = attention(q, k, v, position_map, rotary, impl="reference")
        output = attention(*expanded, position_map, rotary, impl=impl)
        assert_near(output, expected.expand(2, 4, -1, -1), impl)
        # One number for a whole head, as a gradient of a sum is.
        constant = v[..., :1].expand(-1, -1, -1, 16)
        expected = attention(q, k, constant.clone(), position_map, rotary, impl=impl)
        assert torch.equal(attention(q, k, constant, position_map, rotary, impl=impl), expected)


@over_impls
@pytest.mark.parametrize(
    "shape",
    [(0, 4, 2, 3, 5, 8), (2, 4, 2, 0, 5, 8), (2, 4, 2, 0, 0, 8), (0, 4, 2, 1, 5, 8), (0, 4, 2, 0, 0, 8)],
    ids=["no rows", "no queries", "no keys", "no row to decode", "nothing"],
)
def test_nothing_to_do(impl, shape):
    for position_map in SOME_MAPS:
        for dtype in DTYPES:
            q, k, v = tensors(impl, *shape, dtype=dtype)
            output = attention(q, k, v, position_map, rotary_of(impl, 8), impl=impl)
            assert output.shape == q.shape
            assert output.dtype == dtype
    mask = torch.ones(shape[0], shape[4], device=q.device).bool()
    layout = Layout(shape[3], shape[4], key_mask=mask)
    sinks = torch.zeros(4, device=q.device)
    options = {"layout": layout, "sinks": sinks, "query_scaling": QueryScaling("log-n", 16), "impl": impl}
    assert attention(q, k, v, SelfExtend(3, 8), None, **options).shape == q.shape


@pytest.mark.parametrize("impl", ["reference", "blocks", "auto"])
def test_values_without_dimensions(impl):
    q, k, v = random_tensors(2, 4, 2, 3, 5, 8)
    assert attention(q, k, v[..., :0], SelfExtend(3, 8), None, impl=impl).shape == (2, 4, 3, 0)


@over_impls
@pytest.mark.parametrize("queries", [1, 9])
def test_maps_of_huge_numbers(impl, queries):
    """Past 32 bits, which kernels count in."""
    q, k, v = tensors(impl, 1, 2, 1, queries, 20, 16)
    huge, rotary = 1 << 40, rotary_of(impl, 16)
    whole = attention(q, k, v, Identity(), rotary, impl="reference")
    for position_map in (
        SelfExtend(3, huge),
        SelfExtend(3, 8, start=huge),
        SELF(9, 0.3, huge, "distance"),
        SlidingWindow(huge),
        DualChunk(huge, 5),
        StreamingLLM(huge, 5),
        StreamingLLM(5, huge),
    ):
        assert_near(attention(q, k, v, position_map, rotary, impl=impl), whole, impl)
    # Groups so large share one position each; that is ReRoPE's.
    for position_map in (SelfExtend(huge, 8), LeakyReRoPE(float(huge), 8)):
        expected = attention(q, k, v, position_map, rotary, impl="reference")
        assert_near(attention(q, k, v, position_map, rotary, impl=impl), expected, impl)
        assert_near(expected, attention(q, k, v, ReRoPE(8), rotary, impl="reference"), impl)


@over_fast
def test_same_call_twice_is_identical(impl):
    keys = 90 if impl == "fused" else 700
    for queries in (1, keys - 40):
        q, k, v = tensors(impl, 1, 3, 1, queries, keys, 16, dtype=torch.bfloat16)
        first, second = (attention(q, k, v, SelfExtend(8, 20), rotary_of(impl, 16), impl=impl) for _ in range(2))
        assert torch.equal(first, second)
        assert not first.isnan().any()


@over_impls
def test_inputs_are_left_alone(impl):
    for position_map in (SelfExtend(3, 8), SELF(9, 0.3, 6, "distance")):
        for queries in (1, 30):
            arguments = tensors(impl, 1, 2, 1, queries, 40, 16)
            copies = [x.clone() for x in arguments]
            attention(*arguments, position_map, rotary_of(impl, 16), impl=impl)
            assert all(torch.equal(x, copy) for x, copy in zip(arguments, copies, strict=True))


@over_maps
@over_fast
def test_the_default_device_of_the_process_is_no_matter(position_map, impl):
    q, k, v = random_tensors(1, 4, 2, 50, 60, 16)
    rotary = random_rotary(16)
    expected = attention(q, k, v, position_map, rotary, impl=impl)
    for_length, matrix = type(position_map).for_length(20, 64), position_map.relative_positions(20)
    with torch.device("meta"):
        assert torch.equal(attention(q, k, v, position_map, rotary, impl=impl), expected)
        anew = Rotary(rotary.inverse_frequencies, rotary.interleaved, rotary.offset)
        assert torch.equal(attention(q, k, v, position_map, anew, impl=impl), expected)
        assert type(position_map).for_length(20, 64) == for_length
        assert torch.equal(position_map.relative_positions(20), matrix)


@pytest.mark.parametrize("dynamic", [None, False, True])
@pytest.mark.parametrize("impl", ["auto", "reference", "blocks", "flash"])
def test_a_function_that_calls_it_is_compiled(impl, dynamic):
    rotary = random_rotary(16)
    torch._dynamo.reset()

    def work(q, k, v):
        return 2 * attention(q + 1, k, v, SelfExtend(3, 8), rotary, impl=impl)

    compiled = torch.compile(work, backend="eager", dynamic=dynamic)
    for tokens in (50, 33, 20):
        tensors = random_tensors(1, 4, 2, tokens, tokens, 16)
        assert_close(compiled(*tensors), work(*tensors), rtol=0, atol=1e-6)
    torch._dynamo.reset()
