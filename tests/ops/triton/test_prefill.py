# SPDX-License-Identifier: Apache-2.0
"""The prefill kernel against attention written out in float64: on a GPU where there is one, otherwise interpreted."""

from __future__ import annotations

import math

import pytest
import torch
import triton_interpreter  # noqa: F401
from tensors import DEVICE

from ropewalk.maps.edges import BEGINNING, PAST_QUERY, Edge
from ropewalk.ops.triton import prefill
from ropewalk.ops.triton.banded import Banded
from ropewalk.ops.triton.prefill import PrefillConfig

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The smallest tiles have the most edges.
SMALL = PrefillConfig(16, 16, 16, warps=4, stages=2, edge_stages=2)


def random_input(batch, heads, key_heads, queries, keys, head_dim, dtype=torch.float32):
    """query, key, value, far query, far key."""

    def tensor(factor, heads, tokens):
        return (factor * torch.randn(batch, heads, tokens, head_dim, device=DEVICE)).to(dtype)

    return (
        tensor(2, heads, queries),
        tensor(1, key_heads, keys),
        tensor(1, key_heads, keys),
        tensor(2, heads, queries),
        tensor(1, key_heads, keys),
    )


def edges_of(near, far_first=None):
    """Edges of a neighbor window and of far keys from a distance on; `near` None for all keys, 0 for none."""
    low = BEGINNING if near is None else Edge(back=near - 1)
    return {"near_low": low, "far_high": low if far_first is None else Edge(back=far_first - 1)}


def attend(
    query, key, value, far_query, far_key, scale, config=SMALL, near_low=BEGINNING, far_high=BEGINNING, **options
):
    options = {"near_low": near_low, **options}
    if far_query is not None:
        options |= {"far_query": far_query, "far_key": far_key, "far_high": far_high}
    return prefill.attend(Banded(query, key, value, scale, **options), config)


def edge(edge, queries):
    """By definition, without a clip at what kernels count in."""
    keys = ((queries - edge.back) // edge.block * edge.block).clamp(min=0)
    return keys if edge.cap is None else keys.clamp(max=edge.cap)


def written_out(
    query, key, value, far_query, far_key, scale, near_low=BEGINNING, near_high=PAST_QUERY, far_high=BEGINNING,
    softcap=None, sinks=None,
):  # fmt: skip
    """Output and log-sum-exp by definition, all products and sums in the dtype of the tensors."""
    queries, keys, groups = query.shape[2], key.shape[2], query.shape[1] // key.shape[1]
    m, n = torch.arange(keys - queries, keys, device=DEVICE)[:, None], torch.arange(keys, device=DEVICE)
    seen = (n >= edge(near_low, m)) & (n < edge(near_high, m))
    scores = query @ key.repeat_interleave(groups, 1).mT * scale
    if far_query is not None:
        is_far = n < edge(far_high, m)
        assert not (is_far & seen).any()
        missing = max(keys - far_key.shape[2], 0)
        far_key = torch.nn.functional.pad(far_key[:, :, :keys], (0, 0, 0, missing)).repeat_interleave(groups, 1)
        scores = torch.where(is_far, far_query @ far_key.mT * scale, scores)
        seen = seen | is_far
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, -torch.inf)
    # A value that nothing sees may be NaN.
    value = value.masked_fill(~seen.any(0)[:, None], 0).repeat_interleave(groups, 1)
    if sinks is not None:
        sink = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, sink), dim=-1)
        value = torch.nn.functional.pad(value, (0, 0, 0, 1))
    weights = torch.softmax(scores.double() if scores.dtype == torch.float64 else scores.float(), -1)
    weights = weights.masked_fill(~seen.any(1)[:, None], 0)
    return weights.to(value.dtype) @ value, torch.logsumexp(scores.double(), -1)


def assert_within_budget(output, lse, tensors, scale, softcap=None, **options):
    """At most twice as far from the truth as the same computation in the tensors' dtype, plus rounding."""
    options = {"scale": scale, "softcap": softcap, **options}
    exact, exact_lse = written_out(*(None if x is None else x.double() for x in tensors), **options)
    plain, _ = written_out(*tensors, **options)
    query, key, value = (x.double().nan_to_num() for x in tensors[:3])
    largest_score = query.norm(dim=-1).max() * key.norm(dim=-1).max() * scale
    # Scores are known to float32's precision, and those that a cap levels to that of the cap.
    precision = torch.finfo(torch.float32).eps * (largest_score + (softcap or 0))
    rounding = torch.finfo(query.dtype if output is None else output.dtype).eps * exact.abs().max()
    rounding += precision * value.abs().max()
    error, yardstick = (output.double() - exact).abs(), (plain.double() - exact).abs()
    assert output.dtype == tensors[0].dtype
    assert error.max() <= 2 * (yardstick.max() + rounding)
    assert error.mean() <= 2 * (yardstick.mean() + rounding)
    if lse is not None:
        assert lse.dtype == torch.float32
        assert torch.equal(lse.isinf(), exact_lse.isinf())
        finite = exact_lse.isfinite()
        assert ((lse.double() - exact_lse)[finite].abs() <= 4 * precision + 1e-6 * exact_lse[finite].abs()).all()


def check(tensors, near, far_first=None, config=SMALL, scale=0.2, **options):
    return check_edges(tensors, config, scale, **edges_of(near, far_first), **options)


def check_edges(tensors, config=SMALL, scale=0.2, **options):
    output, lse = attend(*tensors, scale, config, return_lse=True, **options)
    assert output.is_contiguous()
    assert_within_budget(output, lse, tensors, scale, **options)
    return output


def outputs(tensors, near, far_first=None, config=SMALL, scale=0.2, **options):
    return attend(*tensors, scale, config, **edges_of(near, far_first), **options)[0]


def near_only(tensors):
    return (*tensors[:3], None, None)


# Around one and two tiles of 16.
@pytest.mark.parametrize("keys", [1, 16, 17, 50])
@pytest.mark.parametrize("window", [1, 15, 16, 17, 32])
def test_tile_edges(keys, window):
    tensors = random_input(1, 1, 1, keys, keys, 16)
    check(tensors, window)
    check(near_only(tensors), window)


@pytest.mark.parametrize("queries", [1, 16, 17])
@pytest.mark.parametrize("window", [5, 16, 30])
def test_fewer_queries_than_keys(queries, window):
    tensors = random_input(1, 1, 1, queries, 61, 16)
    check(tensors, window)
    check(near_only(tensors), window)
    check(near_only(tensors), None)


# The beginnings of chunks, sinks, and what goes on from a diagonal; chunks that are tiles, fit none, or are one key.
EDGES = {
    "chunks": (Edge(0, 12), PAST_QUERY, Edge(12, 12)),
    "chunks next to each other": (Edge(0, 16), PAST_QUERY, Edge(0, 16)),
    "chunks of one key": (Edge(0, 1), PAST_QUERY, Edge(3, 1)),
    "sinks": (Edge(19), PAST_QUERY, Edge(19, 1, 4)),
    "sinks over tiles": (Edge(10), PAST_QUERY, Edge(10, 1, 21)),
    "chunk before": (Edge(12, 12), Edge(0, 12), BEGINNING),
    "strip": (Edge(30), Edge(7), BEGINNING),
    "strip and sinks": (Edge(30), Edge(7), Edge(40, 1, 3)),
    "some first keys": (BEGINNING, Edge(5, 1, 18), BEGINNING),
    "first chunks": (Edge(24, 12, 20), Edge(3, 6, 40), Edge(24, 12, 5)),
}


@pytest.mark.parametrize("case", EDGES)
def test_edges_of_other_bands(case):
    edges = dict(zip(("near_low", "near_high", "far_high"), EDGES[case], strict=True))
    for queries, keys in ((50, 50), (21, 90), (1, 37)):
        tensors = random_input(1, 1, 1, queries, keys, 16)
        check_edges(near_only(tensors) if edges["far_high"].is_beginning else tensors, **edges)
    sinks = torch.tensor([0.5, -2.0], device=DEVICE)
    tensors = random_input(1, 2, 1, 40, 70, 32, torch.bfloat16)
    tensors = near_only(tensors) if edges["far_high"].is_beginning else tensors
    check_edges(tensors, PrefillConfig(32, 32, 16, 4, 2, 1), softcap=5.0, sinks=sinks, **edges)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("case", EDGES)
def test_what_other_bands_do_not_see_may_be_anything(case):
    low, high, far = EDGES[case]
    edges = {"near_low": low, "near_high": high, "far_high": far}
    query, key, value, far_query, far_key = random_input(1, 1, 1, 21, 90, 16)
    expected = attend(query, key, value, far_query, far_key, 0.2, **edges)[0]
    m, n = torch.arange(69, 90)[:, None], torch.arange(90)
    near, is_far = (n >= edge(low, m)) & (n < edge(high, m)), n < edge(far, m)
    key[:, :, ~near.any(0)], far_key[:, :, ~is_far.any(0)] = torch.nan, torch.nan
    value[:, :, ~(near | is_far).any(0)] = torch.nan
    assert torch.equal(attend(query, key, value, far_query, far_key, 0.2, **edges)[0], expected)


@pytest.mark.parametrize(
    ("window", "far_first"),
    [(0, 1), (0, 8), (0, 40), (1, 1), (1, 17), (1, 64), (12, 17), (12, 40), (12, 100), (16, 17), (16, 40), (16, 64)],
)
def test_hole_between_near_and_far(window, far_first):
    """Keys between the two are not seen; a window of 0 leaves the first queries with nothing."""
    for queries, keys in ((50, 50), (9, 83)):
        check(random_input(1, 1, 1, queries, keys, 16), window, far_first)


@pytest.mark.parametrize(
    "config",
    [
        PrefillConfig(32, 16, 16, 4, 2, 2),
        PrefillConfig(16, 32, 16, 4, 2, 1),
        PrefillConfig(32, 64, 16, 4, 2, 2),
        PrefillConfig(64, 32, 32, 4, 2, 1),
    ],
)
@pytest.mark.parametrize(("window", "far_first"), [(None, None), (24, None), (20, 75)])
def test_tiles_of_other_shapes(config, window, far_first):
    tensors = random_input(1, 1, 1, 101, 131, 16)
    check(near_only(tensors) if window is None else tensors, window, far_first, config)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 64, 72, 80, 96, 128, 256])
def test_head_dimensions_and_dtypes(head_dim, dtype):
    tensors = random_input(1, 1, 1, 90, 150, head_dim, dtype)
    check(tensors, 60, config=None, scale=head_dim**-0.5)
    check(near_only(tensors), None, config=None, scale=head_dim**-0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("window", [50, 128, 400])
def test_longer_text_in_large_tiles(window, dtype):
    check(random_input(1, 1, 1, 500, 700, 32, dtype), window, config=PrefillConfig(128, 64, 32, 4, 2, 1))


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("shared_bytes", [1, 8000, 1 << 30])
def test_grouped_heads(groups, shared_bytes, monkeypatch):
    """In whatever order programs run: a key head at a time, two of the three, or all."""
    monkeypatch.setattr("ropewalk.ops.triton.prefill._SHARED_BYTES", shared_bytes)
    check(random_input(1, 3 * groups, 3, 18, 20, 16), 7)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softcap", [0.05, 1.5, 50.0])
def test_softcap(softcap, dtype):
    tensors = random_input(1, 2, 1, 40, 50, 16, dtype)
    check(tensors, 10, softcap=softcap)
    check(near_only(tensors), None, softcap=softcap, scale=3.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sinks(dtype):
    tensors = random_input(1, 4, 2, 20, 30, 16)
    sinks = torch.tensor([-torch.inf, -50.0, 0.5, 90.0], device=DEVICE).to(dtype)
    check(tensors, 10, sinks=sinks)
    check(near_only(tensors), None, sinks=sinks, softcap=5.0)
    without = outputs(tensors, 10)
    assert torch.equal(outputs(tensors, 10, sinks=sinks)[:, 0], without[:, 0])


def test_queries_that_see_nothing():
    tensors = random_input(1, 2, 1, 40, 40, 16)
    output, lse = attend(*tensors, 0.2, return_lse=True, **edges_of(0, 21))
    assert (output[:, :, :21] == 0).all()
    assert (lse[:, :, :21] == -torch.inf).all()
    assert (output[:, :, 21:] != 0).any(-1).all()
    sinks = torch.tensor([1.0, -2.0], device=DEVICE)
    output, lse = attend(*tensors, 0.2, sinks=sinks, return_lse=True, **edges_of(0, 21))
    assert (output[:, :, :21] == 0).all()
    torch.testing.assert_close(lse[0, :, :21], sinks[:, None].expand(2, 21))
    for x in attend(*near_only(tensors), 0.2, return_lse=True, **edges_of(0)):
        assert ((x == 0) | (x == -torch.inf)).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize(
    ("queries", "keys", "window", "far_first"),
    [(50, 50, 5, 5), (50, 50, 20, 43), (21, 90, 16, 16), (21, 90, 0, 20), (21, 90, 30, 60)],
)
def test_what_is_not_seen_may_be_anything(queries, keys, window, far_first):
    past = keys - queries
    tensors = random_input(1, 2, 1, queries, keys, 16)
    expected = outputs(tensors, window, far_first)
    query, key, value, far_query, far_key = (x.clone() for x in tensors)
    far_query[:, :, : max(far_first - past, 0)] = torch.nan
    far_key[:, :, keys - far_first :] = torch.nan
    key[:, :, : max(past - window + 1, 0)] = torch.nan
    seen_near, seen_far = past - window + 1, keys - far_first
    if seen_far < seen_near:
        value[:, :, max(seen_far, 0) : seen_near] = torch.nan
    poisoned = (query, key, value, far_query, far_key)
    assert torch.equal(outputs(poisoned, window, far_first), expected)
    short = (query, key, value, far_query, far_key[:, :, : max(keys - far_first, 0)])
    assert torch.equal(outputs(short, window, far_first), expected)
    near = outputs(near_only(tensors), window)
    value[:, :, : max(seen_near, 0)] = torch.nan
    assert torch.equal(outputs((query, key, value, None, None), window), near)


def test_strides():
    tensors = random_input(2, 1, 1, 37, 53, 24)
    expected = outputs(tensors, 10)
    as_tokens_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    assert torch.equal(outputs(as_tokens_first, 10), expected)
    slices = []
    for x in tensors:
        batch, heads, tokens, head_dim = x.shape
        room = torch.full((batch + 1, heads + 2, tokens + 9, head_dim + 8), torch.nan, device=DEVICE)
        room[1:, 1:-1, 5:-4, 8:] = x
        slices.append(room[1:, 1:-1, 5:-4, 8:])
    assert torch.equal(outputs(slices, 10), expected)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs 5 GB of a GPU's memory")
def test_offsets_past_two_to_the_31():
    keys = 140_000
    room = torch.zeros(1, keys, 128, 128, dtype=torch.bfloat16, device=DEVICE)
    assert room.numel() > 1 << 31
    key = room.transpose(1, 2)[:, -1:]
    key.copy_(torch.randn(key.shape, device=DEVICE))
    query = torch.randn(1, 1, 20, 128, device=DEVICE).bfloat16()
    expected = outputs((query, *[key.contiguous()] * 2, query, key.contiguous()), 1000, config=None)
    assert torch.equal(outputs((query, key, key, query, key), 1000, config=None), expected)


def test_same_call_twice_is_identical():
    tensors = random_input(1, 2, 1, 130, 150, 64, torch.bfloat16)
    first, second = (attend(*tensors, 0.1, None, return_lse=True, **edges_of(40)) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize(("near", "far_first"), [(None, None), (9, None), (9, 30)])
def test_chunks_equal_one_shot(near, far_first):
    tensors = random_input(1, 1, 1, 60, 60, 16)
    tensors = near_only(tensors) if near is None else tensors
    whole = outputs(tensors, near, far_first)
    query, key, value, far_query, far_key = tensors
    for begin, end in ((0, 7), (7, 16), (16, 47), (47, 60)):
        far = (None, None) if far_query is None else (far_query[:, :, begin:end], far_key[:, :, :end])
        part = outputs((query[:, :, begin:end], key[:, :, :end], value[:, :, :end], *far), near, far_first)
        torch.testing.assert_close(part, whole[:, :, begin:end], rtol=0, atol=5e-6)


@pytest.mark.parametrize("shape", [(0, 2, 5, 8), (2, 2, 0, 8)])
def test_nothing_to_do(shape):
    query, key = torch.empty(shape, device=DEVICE), torch.zeros(shape[0], 2, 5, 8, device=DEVICE)
    assert outputs((query, key, key, None, None), 3).shape == shape


def test_sum_of_many_equal_scores():
    """No weight is lost over a long text: the log-sum-exp of n zeros is log n, and the mean of ones is one."""
    query, key = torch.zeros(1, 1, 20, 16, device=DEVICE), torch.zeros(1, 1, 3000, 16, device=DEVICE)
    config = PrefillConfig(16, 128, 32, 4, 2, 1)
    output, lse = attend(query, key, key + 1, query, key, 1.0, config, return_lse=True, **edges_of(100))
    torch.testing.assert_close(output, torch.ones_like(output))
    for index in (0, 19):
        assert lse[0, 0, index].item() == pytest.approx(math.log(2981 + index), rel=1e-6)


def test_config_whose_tiles_do_not_fit():
    with pytest.raises(ValueError, match="edge_keys must divide block_keys"):
        PrefillConfig(64, 32, 64, 4, 2, 1)
