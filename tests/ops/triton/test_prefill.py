"""The prefill kernel against attention written out in float64: on a GPU where there is one, otherwise interpreted."""

from __future__ import annotations

import math

import pytest
import torch
import triton_interpreter  # noqa: F401

from ropewalk.ops.triton.prefill import PrefillConfig, banded

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
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


def written_out(query, key, value, far_query, far_key, scale, window, far_first=None, softcap=None, sinks=None):
    """Output and log-sum-exp by definition, all products and sums in the dtype of the tensors."""
    queries, keys, groups = query.shape[2], key.shape[2], query.shape[1] // key.shape[1]
    distance = torch.arange(keys - queries, keys, device=DEVICE)[:, None] - torch.arange(keys, device=DEVICE)
    seen = (distance >= 0) & (distance < (keys if window is None else window))
    scores = query @ key.repeat_interleave(groups, 1).mT * scale
    if far_query is not None:
        is_far = distance >= (window if far_first is None else far_first)
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


def assert_within_budget(output, lse, tensors, scale, window, far_first=None, softcap=None, sinks=None):
    """At most twice as far from the truth as the same computation in the tensors' dtype, plus rounding."""
    options = (scale, window, far_first, softcap, sinks)
    exact, exact_lse = written_out(*(None if x is None else x.double() for x in tensors), *options)
    plain, _ = written_out(*tensors, *options)
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


def check(tensors, window, far_first=None, config=SMALL, scale=0.2, **options):
    output, lse = banded(*tensors, scale, window, far_first, return_lse=True, config=config, **options)
    assert output.is_contiguous()
    assert_within_budget(output, lse, tensors, scale, window, far_first, **options)
    return output


def near_only(tensors):
    return (*tensors[:3], None, None)


# Around one and two tiles of 16.
@pytest.mark.parametrize("keys", [1, 16, 17, 33, 50])
@pytest.mark.parametrize("window", [1, 15, 16, 17, 32, 49])
def test_tile_edges(keys, window):
    tensors = random_input(1, 1, 1, keys, keys, 16)
    check(tensors, window)
    check(near_only(tensors), window)


@pytest.mark.parametrize("queries", [1, 15, 16, 17, 33])
@pytest.mark.parametrize("window", [5, 16, 30])
def test_fewer_queries_than_keys(queries, window):
    tensors = random_input(1, 2, 1, queries, 61, 16)
    check(tensors, window)
    check(near_only(tensors), window)
    check(near_only(tensors), None)


@pytest.mark.parametrize("window", [0, 1, 12, 16])
@pytest.mark.parametrize("far_first", [1, 8, 17, 40, 64, 100])
def test_hole_between_near_and_far(window, far_first):
    """Keys between the two are not seen; a window of 0 leaves the first queries with nothing."""
    for queries, keys in ((50, 50), (9, 83)):
        tensors = random_input(1, 1, 1, queries, keys, 16)
        if far_first >= window:
            check(tensors, window, far_first)
            continue
        with pytest.raises(ValueError, match="far_first must not be less"):
            check(tensors, window, far_first)


@pytest.mark.parametrize(
    "config",
    [
        PrefillConfig(32, 16, 16, 4, 2, 2),
        PrefillConfig(16, 32, 16, 4, 2, 1),
        PrefillConfig(32, 64, 16, 4, 2, 2),
        PrefillConfig(64, 32, 32, 4, 2, 1),
    ],
)
@pytest.mark.parametrize(("window", "far_first"), [(None, None), (24, None), (40, 40), (20, 75)])
def test_tiles_of_other_shapes(config, window, far_first):
    for queries, keys in ((150, 150), (41, 131)):
        tensors = random_input(1, 1, 1, queries, keys, 16)
        check(near_only(tensors) if window is None else tensors, window, far_first, config)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 64, 72, 80, 96, 128, 256])
def test_head_dimensions_and_dtypes(head_dim, dtype):
    for heads, queries, keys in ((2, 1, 150), (1, 140, 150)):
        tensors = random_input(1, heads, 1, queries, keys, head_dim, dtype)
        check(tensors, 60, config=None, scale=head_dim**-0.5)
    check(near_only(tensors), None, config=None, scale=head_dim**-0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("window", [50, 128, 400])
def test_longer_text_in_large_tiles(window, dtype):
    check(random_input(1, 1, 1, 500, 700, 32, dtype), window, config=PrefillConfig(128, 64, 32, 4, 2, 1))


@pytest.mark.parametrize("groups", [1, 3, 4, 8])
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
    without = banded(*tensors, 0.2, 10, config=SMALL)
    assert torch.equal(banded(*tensors, 0.2, 10, sinks=sinks, config=SMALL)[:, 0], without[:, 0])


def test_queries_that_see_nothing():
    tensors = random_input(1, 2, 1, 40, 40, 16)
    output, lse = banded(*tensors, 0.2, 0, 21, return_lse=True, config=SMALL)
    assert (output[:, :, :21] == 0).all()
    assert (lse[:, :, :21] == -torch.inf).all()
    assert (output[:, :, 21:] != 0).any(-1).all()
    sinks = torch.tensor([1.0, -2.0], device=DEVICE)
    output, lse = banded(*tensors, 0.2, 0, 21, sinks=sinks, return_lse=True, config=SMALL)
    assert (output[:, :, :21] == 0).all()
    torch.testing.assert_close(lse[0, :, :21], sinks[:, None].expand(2, 21))
    for x in banded(*near_only(tensors), 0.2, 0, return_lse=True, config=SMALL):
        assert ((x == 0) | (x == -torch.inf)).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize(("window", "far_first"), [(5, 5), (16, 16), (20, 43), (0, 20), (30, 60)])
@pytest.mark.parametrize(("queries", "keys"), [(50, 50), (21, 90)])
def test_what_is_not_seen_may_be_anything(queries, keys, window, far_first):
    past = keys - queries
    tensors = random_input(1, 2, 1, queries, keys, 16)
    expected = banded(*tensors, 0.2, window, far_first, config=SMALL)
    query, key, value, far_query, far_key = (x.clone() for x in tensors)
    far_query[:, :, : max(far_first - past, 0)] = torch.nan
    far_key[:, :, keys - far_first :] = torch.nan
    key[:, :, : max(past - window + 1, 0)] = torch.nan
    seen_near, seen_far = past - window + 1, keys - far_first
    if seen_far < seen_near:
        value[:, :, max(seen_far, 0) : seen_near] = torch.nan
    poisoned = (query, key, value, far_query, far_key)
    assert torch.equal(banded(*poisoned, 0.2, window, far_first, config=SMALL), expected)
    short = (query, key, value, far_query, far_key[:, :, : max(keys - far_first, 0)])
    assert torch.equal(banded(*short, 0.2, window, far_first, config=SMALL), expected)
    near = banded(*near_only(tensors), 0.2, window, config=SMALL)
    value[:, :, : max(seen_near, 0)] = torch.nan
    assert torch.equal(banded(query, key, value, None, None, 0.2, window, config=SMALL), near)


def test_strides():
    tensors = random_input(2, 2, 1, 37, 53, 24)
    expected = banded(*tensors, 0.2, 10, config=SMALL)
    as_tokens_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    assert torch.equal(banded(*as_tokens_first, 0.2, 10, config=SMALL), expected)
    slices = []
    for x in tensors:
        batch, heads, tokens, head_dim = x.shape
        room = torch.full((batch + 1, heads + 2, tokens + 9, head_dim + 8), torch.nan, device=DEVICE)
        room[1:, 1:-1, 5:-4, 8:] = x
        slices.append(room[1:, 1:-1, 5:-4, 8:])
    assert torch.equal(banded(*slices, 0.2, 10, config=SMALL), expected)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs 5 GB of a GPU's memory")
def test_offsets_past_two_to_the_31():
    keys = 140_000
    room = torch.zeros(1, keys, 128, 128, dtype=torch.bfloat16, device=DEVICE)
    assert room.numel() > 1 << 31
    key = room.transpose(1, 2)[:, -1:]
    key.copy_(torch.randn(key.shape, device=DEVICE))
    query = torch.randn(1, 1, 20, 128, device=DEVICE).bfloat16()
    expected = banded(query, *[key.contiguous()] * 2, query, key.contiguous(), 0.1, 1000)
    assert torch.equal(banded(query, key, key, query, key, 0.1, 1000), expected)


def test_same_call_twice_is_identical():
    tensors = random_input(1, 6, 2, 130, 150, 64, torch.bfloat16)
    first, second = (banded(*tensors, 0.1, 40, return_lse=True) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize(("window", "far_first"), [(None, None), (9, None), (9, 30)])
def test_chunks_equal_one_shot(window, far_first):
    tensors = random_input(1, 2, 1, 60, 60, 16)
    tensors = near_only(tensors) if window is None else tensors
    whole = banded(*tensors, 0.2, window, far_first, config=SMALL)
    query, key, value, far_query, far_key = tensors
    for size in (7, 16, 31):
        for begin in range(0, 60, size):
            end = begin + size
            far = (None, None) if far_query is None else (far_query[:, :, begin:end], far_key[:, :, :end])
            part = banded(
                query[:, :, begin:end], key[:, :, :end], value[:, :, :end], *far, 0.2, window, far_first, config=SMALL
            )
            torch.testing.assert_close(part, whole[:, :, begin:end], rtol=0, atol=5e-6)


@pytest.mark.parametrize("shape", [(0, 2, 5, 8), (2, 2, 0, 8)])
def test_nothing_to_do(shape):
    query, key = torch.empty(shape, device=DEVICE), torch.zeros(shape[0], 2, 5, 8, device=DEVICE)
    assert banded(query, key, key, None, None, 1.0, 3).shape == shape


def test_sum_of_many_equal_scores():
    """No weight is lost over a long text: the log-sum-exp of n zeros is log n, and the mean of ones is one."""
    query, key = torch.zeros(1, 1, 20, 16, device=DEVICE), torch.zeros(1, 1, 3000, 16, device=DEVICE)
    output, lse = banded(
        query, key, key + 1, query, key, 1.0, 100, return_lse=True, config=PrefillConfig(16, 128, 32, 4, 2, 1)
    )
    torch.testing.assert_close(output, torch.ones_like(output))
    for index in (0, 19):
        assert lse[0, 0, index].item() == pytest.approx(math.log(2981 + index), rel=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(2, 5, 8)}, "tensors must be"),
        ({"query": torch.zeros(1, 2, 5, 8).double()}, "dtypes must be"),
        ({"value": torch.zeros(1, 2, 5, 16)}, "key and value differ"),
        ({"query": torch.zeros(2, 2, 5, 8)}, "differ in batch"),
        ({"query": torch.zeros(1, 3, 5, 8)}, "multiple of key heads"),
        ({"query": torch.zeros(1, 2, 6, 8)}, "more queries than keys"),
        ({"query": torch.zeros(1, 2, 8, 5).mT}, "last strides"),
        (
            {"query": torch.empty_strided((1, 2, 2, 8), (1 << 25, 8, 1 << 23, 1), device="meta")},
            "strides between tokens",
        ),
        ({"scale": -1.0}, "scale must be above 0, got -1.0"),
        ({"window": -1}, "window must be 0 or more, got -1"),
        ({"window": 3, "far_first": 2}, "far_first must not be less than window 3, got 2"),
        ({"softcap": 0.0}, "softcap must be above 0"),
        ({"sinks": torch.zeros(3)}, r"sinks must be \(2,\)"),
        ({"far_query": torch.zeros(1, 2, 5, 8)}, "come together"),
        ({"far_query": torch.zeros(1, 2, 5, 8), "far_key": torch.zeros(1, 2, 5, 8)}, "need a window"),
        ({"far_query": torch.zeros(1, 2, 5, 8), "far_key": torch.zeros(1, 2, 1, 8), "window": 3}, "far_key needs 2"),
        ({"far_query": torch.zeros(1, 2, 4, 8), "far_key": torch.zeros(1, 2, 5, 8), "window": 3}, "do not fit"),
    ],
)
def test_bad_input(change, message):
    tensors = {name: torch.zeros(1, 2, 5, 8) for name in ("query", "key", "value")}
    arguments = {**tensors, "far_query": None, "far_key": None, "scale": 1.0, "window": None, **change}
    with pytest.raises(ValueError, match=message):
        banded(**arguments)


def test_head_dim_must_be_a_multiple_of_eight():
    x = torch.zeros(1, 1, 4, 12)
    with pytest.raises(ValueError, match="multiple of 8"):
        banded(x, x, x, None, None, 1.0, None)


def test_config_whose_tiles_do_not_fit():
    with pytest.raises(ValueError, match="edge_keys must divide block_keys"):
        PrefillConfig(64, 32, 64, 4, 2, 1)
