"""The operator against independent computations and error budgets, on the CPU."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import random_rotary, random_tensors

from ropewalk.maps import SELF, Identity, LeakyReRoPE, ReRoPE, SelfExtend
from ropewalk.maps.query_scaling import QueryScaling
from ropewalk.maps.sliding_window import SlidingWindow
from ropewalk.ops import Layout, Rotary, api, attention, choose_impl
from ropewalk.testing.budget import within_budget
from ropewalk.testing.maps import example_maps, large_maps

MAPS = [position_map for maps in example_maps().values() for position_map in maps]
FAST = ["blocks", "flash"]


def explicit(query, key, value, position_map, rotary):
    """Attention from un-rotated float64 query and key, and nothing but the matrix of relative positions."""
    queries, keys, pairs = query.shape[2], key.shape[2], rotary.dim // 2
    relative = position_map.relative_positions(keys)[keys - queries :].double()
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    q, k = (torch.complex(x[..., :pairs], x[..., pairs : 2 * pairs]) for x in (query, key))
    turn = torch.exp(1j * relative[..., None] * rotary.inverse_frequencies.double())
    scores = torch.einsum("bhqd,bhkd,qkd->bhqk", q, k.conj(), turn).real
    scores = scores + query[..., 2 * pairs :] @ key[..., 2 * pairs :].transpose(-1, -2)
    scores = (scores / math.sqrt(query.shape[-1])).masked_fill(relative < 0, -torch.inf)
    return torch.softmax(scores, dim=-1) @ value


def rotated(x, rotary, begin=0):
    """x as a model rotates it at true positions `begin`, `begin + 1`, ..."""
    angles = torch.arange(begin, begin + x.shape[2])[:, None] * rotary.inverse_frequencies.double()
    return rotary.rotate(x, angles.cos(), angles.sin())


@pytest.mark.parametrize("position_map", MAPS, ids=str)
@pytest.mark.parametrize("queries", [1, 5, 23])
def test_reference_is_the_formula(position_map, queries):
    """Re-rotating what the model rotated gives what rotating by the relative position would have given."""
    rotary = random_rotary(12)
    q, k, v = (x.double() for x in random_tensors(2, 4, 2, queries, 23, 16))
    expected = explicit(q, k, v, position_map, rotary)
    output = attention(rotated(q, rotary, 23 - queries), rotated(k, rotary), v, position_map, rotary, impl="reference")
    torch.testing.assert_close(output, expected, rtol=0, atol=2e-5)  # phases are rounded to float32, as models do


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("position_map", MAPS, ids=str)
@pytest.mark.parametrize("queries", [1, 2, 7, 40])
def test_small_lengths(position_map, impl, queries):
    rotary = random_rotary(16)
    for keys in {queries, 40}:
        q, k, v = random_tensors(2, 4, 2, queries, keys, 20)
        expected = attention(q, k, v, position_map, rotary, impl="reference")
        torch.testing.assert_close(attention(q, k, v, position_map, rotary, impl=impl), expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("position_map", large_maps(), ids=str)
def test_budget(position_map, dtype, impl):
    rotary = random_rotary(32, base=1e4)
    for queries, keys in ((1, 700), (1, 4500), (3, 513), (256, 700), (257, 257), (300, 1100), (700, 700)):
        batch = (
            (16 if keys < 1000 else 3) if queries < 4 else 1
        )  # the yardstick is the largest error of a sample, which must not be small
        q, k, v = random_tensors(batch, 6, 2, queries, keys, 32, dtype)
        output = attention(q, k, v, position_map, rotary, impl=impl)
        assert output.dtype == dtype
        assert within_budget(output, q, k, v, position_map, rotary) is None, (queries, keys)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_shapes(data):
    draw = data.draw
    keys = draw(st.integers(1, 90), "keys")
    queries = draw(st.integers(1, keys), "queries")
    key_heads = draw(st.integers(1, 3), "key heads")
    heads = key_heads * draw(st.integers(1, 4), "groups")
    head_dim = draw(st.integers(1, 40), "head_dim")
    rotary_dim = 2 * draw(st.integers(0, head_dim // 2), "pairs")
    offset = draw(st.sampled_from([0, head_dim - rotary_dim]), "offset")
    rotary = random_rotary(rotary_dim, interleaved=draw(st.booleans(), "interleaved"), offset=offset)
    position_map = draw(
        st.one_of(
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
        ),
        "map",
    )
    q, k, v = random_tensors(draw(st.integers(1, 3), "batch"), heads, key_heads, queries, keys, head_dim)
    expected = attention(q, k, v, position_map, rotary, impl="reference")
    for impl in FAST:
        output = attention(q, k, v, position_map, rotary, impl=impl)
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("impl", ["reference", *FAST])
@pytest.mark.parametrize(
    "position_map", [SelfExtend(3, 8), SELF(5, 0.3, 8, "distance"), SelfExtend(4, 8, start=20)], ids=str
)
def test_chunks_and_decode_equal_one_shot(position_map, impl):
    """Bands depend on a query's own position, so how a text is cut does not matter."""
    rotary = random_rotary(16)
    q, k, v = random_tensors(1, 4, 2, 60, 60, 16)
    whole = attention(q, k, v, position_map, rotary, impl=impl)
    for size in (1, 7, 8, 9, 31):
        parts = [
            attention(q[:, :, i : i + size], k[:, :, : i + size], v[:, :, : i + size], position_map, rotary, impl=impl)
            for i in range(0, 60, size)
        ]
        torch.testing.assert_close(torch.cat(parts, dim=2), whole, rtol=0, atol=5e-6)


MASKS = {
    "left": [[0] * 9 + [1] * 31, [1] * 40, [0] * 39 + [1]],
    "right": [[1] * 31 + [0] * 9, [1] * 40, [1] + [0] * 39],
    "gap": [[1] * 10 + [0] * 8 + [1] * 22, [0] * 3 + [1] * 20 + [0] * 10 + [1] * 7, [1] * 40],
    "empty row": [[0] * 40, [1] * 40, [0] * 40],
    "all": [[1] * 40] * 3,
}


@pytest.mark.parametrize("impl", ["reference", *FAST])
@pytest.mark.parametrize("case", MASKS)
@pytest.mark.parametrize("queries", [1, 12, 40])
def test_padded_batch_equals_its_rows_alone(case, impl, queries):
    position_map, rotary = SelfExtend(3, 8), random_rotary(16)
    mask = torch.tensor(MASKS[case]).bool()
    q, k, v = random_tensors(3, 4, 2, queries, 40, 16)
    # What padding slots hold must not matter, not even NaN.
    k, v = (x.masked_fill(~mask[:, None, :, None], torch.nan) for x in (k, v))
    output = attention(q, k, v, position_map, rotary, layout=Layout(queries, 40, key_mask=mask), impl=impl)
    query_mask = mask[:, 40 - queries :]
    assert (output.masked_select(~query_mask[:, None, :, None]) == 0).all()
    for row in range(3):
        kept, kept_queries = mask[row], query_mask[row]
        if not kept_queries.any():
            continue
        alone = attention(
            q[row : row + 1, :, kept_queries],
            k[row : row + 1, :, kept],
            v[row : row + 1, :, kept],
            position_map,
            rotary,
            impl="reference",
        )
        torch.testing.assert_close(output[row : row + 1, :, kept_queries], alone, rtol=0, atol=5e-6)


@pytest.mark.parametrize("impl", ["reference", *FAST])
@pytest.mark.parametrize("start", [17, torch.tensor(17), torch.tensor([17])])
def test_slots_after_the_queries_are_never_read(impl, start):
    """A static cache is longer than what it holds."""
    position_map, rotary = SelfExtend(3, 8), random_rotary(16)
    q, k, v = random_tensors(2, 4, 2, 5, 40, 16)
    k[:, :, 22:], v[:, :, 22:] = torch.nan, torch.nan
    expected = attention(q, k[:, :, :22], v[:, :, :22], position_map, rotary, impl="reference")
    output = attention(q, k, v, position_map, rotary, layout=Layout(5, 40, query_start=start), impl=impl)
    torch.testing.assert_close(output, expected, rtol=0, atol=5e-6)


def test_mask_shorter_than_the_keys():
    q, k, v = random_tensors(2, 4, 2, 5, 40, 16)
    mask = torch.ones(2, 22).bool()
    mask[0, :4] = False
    output = attention(
        q, k, v, SelfExtend(3, 8), random_rotary(16), layout=Layout(5, 40, query_start=17, key_mask=mask)
    )
    alone = attention(q[:1], k[:1, :, 4:22], v[:1, :, 4:22], SelfExtend(3, 8), random_rotary(16), impl="reference")
    torch.testing.assert_close(output[:1], alone, rtol=0, atol=5e-6)


@pytest.mark.parametrize("impl", ["blocks", "flash"])
def test_sinks(impl):
    q, k, v = random_tensors(2, 4, 2, 30, 40, 16)
    sinks = torch.randn(4)
    plain = attention(q, k, v, Identity(), None, impl="reference")
    with_sinks = attention(q, k, v, Identity(), None, sinks=sinks, impl="reference")
    scores = (q @ k.repeat_interleave(2, 1).transpose(-1, -2) / 4).masked_fill(
        torch.arange(40) > torch.arange(10, 40)[:, None], -torch.inf
    )
    kept = torch.sigmoid(scores.logsumexp(-1) - sinks[:, None])[..., None]
    torch.testing.assert_close(with_sinks, plain * kept, rtol=0, atol=5e-6)
    for position_map in (Identity(), SelfExtend(3, 8)):
        expected = attention(q, k, v, position_map, random_rotary(16), sinks=sinks, impl="reference")
        output = attention(q, k, v, position_map, random_rotary(16), sinks=sinks, impl=impl)
        torch.testing.assert_close(output, expected, rtol=0, atol=5e-6)


def test_softcap():
    q, k, v = random_tensors(2, 4, 2, 30, 40, 16)
    expected = attention(q, k, v, SelfExtend(3, 8), random_rotary(16), softcap=1.5, impl="reference")
    assert (expected - attention(q, k, v, SelfExtend(3, 8), random_rotary(16))).abs().max() > 0.1
    output = attention(q, k, v, SelfExtend(3, 8), random_rotary(16), softcap=1.5)
    torch.testing.assert_close(output, expected, rtol=0, atol=5e-6)
    with pytest.raises(ValueError, match="softcap"):
        attention(q, k, v, SelfExtend(3, 8), random_rotary(16), softcap=1.5, impl="flash")


def test_value_heads_of_another_size():
    q, k, _ = random_tensors(2, 4, 2, 30, 40, 16)
    v = torch.randn(2, 2, 40, 12)
    expected = attention(q, k, v, SelfExtend(3, 8), random_rotary(16), impl="reference")
    torch.testing.assert_close(attention(q, k, v, SelfExtend(3, 8), random_rotary(16)), expected, rtol=0, atol=5e-6)


def test_gradients_are_those_of_the_reference():
    gradients = []
    for impl in ("reference", "auto"):
        torch.manual_seed(1)
        tensors = [x.requires_grad_() for x in random_tensors(2, 4, 2, 300, 300, 16)]
        attention(*tensors, SelfExtend(3, 100), random_rotary(16), impl=impl).square().sum().backward()
        gradients.append([x.grad for x in tensors])
    for expected, gradient in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="gradients"):
        attention(*tensors, SelfExtend(3, 100), random_rotary(16), impl="flash")


def test_choice_is_explained(caplog):
    q, k, v = random_tensors(1, 2, 1, 3, 3, 8)
    api._log_fallback.cache_clear()
    with caplog.at_level("INFO", logger="ropewalk"):
        assert choose_impl(q, k, v) == "flash"
        assert caplog.messages == []
        assert choose_impl(q, k, v, softcap=7.5) == "blocks"
        assert choose_impl(q, k, v, softcap=7.5) == "blocks"
    assert caplog.messages == ["attention runs on impl='blocks', slower than 'flash', which does not take softcap"]


@pytest.mark.parametrize("kind", ["log-n", "yarn"])
def test_query_scaling(kind):
    scaling = QueryScaling(kind, 16)
    position_map, rotary = SelfExtend(3, 8), random_rotary(16)
    q, k, v = random_tensors(1, 4, 2, 40, 40, 16)
    output = attention(q, k, v, position_map, rotary, query_scaling=scaling)
    m = torch.arange(40.0)
    factors = {
        "log-n": ((m + 1).log() / math.log(16)).clamp(min=1),
        "yarn": (0.1 * (m / 16).clamp(min=1).log() + 1) ** 2,
    }[kind]
    expected = attention(q * factors[:, None], k, v, position_map, rotary, impl="reference")
    torch.testing.assert_close(output, expected, rtol=0, atol=5e-6)
    torch.testing.assert_close(output[:, :, :15], attention(q, k, v, position_map, rotary)[:, :, :15])


def test_same_call_twice_is_identical():
    q, k, v = random_tensors(1, 6, 2, 700, 700, 32, torch.bfloat16)
    first, second = (attention(q, k, v, SelfExtend(8, 256), random_rotary(32)) for _ in range(2))
    assert torch.equal(first, second)


def test_inputs_are_left_alone():
    tensors = random_tensors(2, 4, 2, 30, 40, 16)
    copies = [x.clone() for x in tensors]
    for impl in FAST:
        attention(*tensors, SelfExtend(3, 8), random_rotary(16), impl=impl)
    assert all(torch.equal(x, copy) for x, copy in zip(tensors, copies, strict=True))


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((1, 2, 3, 8), (1, 2, 3, 8), (1, 2, 4, 8)), {}, "lengths differ"),
        (((1, 3, 3, 8), (1, 2, 3, 8), (1, 2, 3, 8)), {}, "multiple of key heads"),
        (((2, 2, 3, 8), (1, 2, 3, 8), (1, 2, 3, 8)), {}, "batch sizes differ"),
        (((1, 2, 3, 8), (1, 2, 3, 6), (1, 2, 3, 6)), {}, "head dimensions differ"),
        (((1, 2, 4, 8), (1, 2, 3, 8), (1, 2, 3, 8)), {}, "leaves no room for 4 queries among 3 keys"),
        (((1, 2, 3, 8), (1, 2, 3, 8), (1, 2, 3, 8)), {"impl": "fast"}, "impl must be one of .* got 'fast'"),
        (((1, 2, 3, 8), (1, 2, 3, 8), (1, 2, 3, 8)), {"scale": 0.0}, "scale must be above 0, got 0.0"),
        (((1, 2, 3, 8), (1, 2, 3, 8), (1, 2, 3, 8)), {"scale": math.nan}, "scale must be above 0, got nan"),
        (((1, 2, 3, 8), (1, 2, 3, 8), (1, 2, 3, 8)), {"layout": Layout(2, 3)}, "layout is for 2 queries"),
        (((1, 2, 3, 8), (1, 2, 3, 8), (1, 2, 3, 8)), {"layout": Layout(3, 3, 1)}, "query_start 1"),
        (
            ((1, 2, 3, 8), (1, 2, 3, 8), (1, 2, 3, 8)),
            {"layout": Layout(3, 3, key_mask=torch.ones(2, 3))},
            "key_mask must be",
        ),
        (((1, 2, 3, 8), (1, 2, 3, 8), (1, 2, 3, 8)), {"rotary": random_rotary(10)}, "rotary embedding of 10"),
    ],
)
def test_bad_input(shapes, options, message):
    rotary: Rotary = options.pop("rotary", random_rotary(8)) if "rotary" in options else random_rotary(6)
    with pytest.raises(ValueError, match=message):
        attention(*(torch.randn(shape) for shape in shapes), SelfExtend(2, 2), rotary, **options)
