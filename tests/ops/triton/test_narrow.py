# SPDX-License-Identifier: Apache-2.0
"""The kernel for bands with an end against attention in float64: on a GPU where there is one, otherwise interpreted."""

from __future__ import annotations

import pytest
import torch
import triton_interpreter  # noqa: F401
from tensors import DEVICE, random_rotary, random_tensors
from torch.testing import assert_close

from ropewalk.maps import SELF, Band
from ropewalk.maps.positions import Grouped
from ropewalk.ops import Rotary
from ropewalk.ops.rotary import rerotated
from ropewalk.ops.triton import narrow
from ropewalk.ops.triton.narrow import NarrowConfig
from ropewalk.ops.triton.narrow_keys import Narrow
from ropewalk.testing.budget import within_budget

# The smallest tiles have the most edges.
SMALL = NarrowConfig(16, 16, warps=4, stages=2)
# Of 4, 13 and 31 keys: less than a tile, almost one, and more.
MIDDLE = (
    Band.at_distances(5, 9, Grouped(2, 3), Grouped(2)),
    Band.at_distances(9, 22, Grouped(3, 4), Grouped(3)),
    Band.at_distances(22, 53, Grouped(7, 9), Grouped(7)),
)
OTHERS = (Band.at_distances(0, 5), Band.at_distances(53, None, Grouped(4, 6), Grouped(4)))


def tensors(batch, heads, key_heads, queries, keys, head_dim, dtype=torch.float32):
    return random_tensors(batch, heads, key_heads, queries, keys, head_dim, dtype, DEVICE)


def rotary_of(dim, **kind):
    return random_rotary(dim, device=DEVICE, **kind)


def attend(query, key, value, bands, rotary, output, lse, scale, softcap=None, **options):
    return narrow.attend(Narrow(query, key, value, bands, rotary, output, lse, scale, softcap), **options)


def exact(query, key, value, bands, rotary, scale, softcap=None):
    """Output and log-sum-exp of attention to the keys of some bands, by definition, in float64."""
    groups, keys = query.shape[1] // key.shape[1], key.shape[2]
    past = keys - query.shape[2]
    query, key, value = query.double(), key.double(), value.double()
    tokens = torch.arange(keys, device=DEVICE)
    scores = query.new_full((*query.shape[:3], keys), -torch.inf)
    for band in bands:
        turned = rerotated(query, band.query_positions, past, rotary)
        turned_keys = rerotated(key, band.key_positions, 0, rotary).repeat_interleave(groups, 1)
        found = turned @ turned_keys.mT * scale
        if softcap is not None:
            found = softcap * torch.tanh(found / softcap)
        scores = torch.where(band.sees(tokens[past:, None], tokens), found, scores)
    weights = torch.softmax(scores, -1).nan_to_num()  # rows without keys
    return weights @ value.repeat_interleave(groups, 1), scores.logsumexp(-1)


def both_passes(query, key, value, rotary, middle=MIDDLE, others=OTHERS, scale=0.25, softcap=None, **options):
    """The kernel's output after an exact main pass, which is rounded as a kernel's is, and the exact one of both."""
    main, lse = exact(query, key, value, others, rotary, scale, softcap)
    output, lse = main.to(query.dtype), lse.float()
    options = {"config": SMALL, **options}
    result = attend(query, key, value, middle, rotary, output, lse, scale, softcap, **options)
    assert result is output
    return result, exact(query, key, value, (*others, *middle), rotary, scale, softcap)[0]


def check(*arguments, **options):
    output, expected = both_passes(*arguments, **options)
    assert_close(output.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("keys", [1, 5, 6, 9, 10, 22, 23, 53, 54, 90])
def test_lengths_around_the_edges_of_bands(keys):
    rotary = rotary_of(16)
    for queries in {1, min(keys, 19), min(keys, 55)}:
        check(*tensors(1, 2, 1, queries, keys, 16), rotary)


@pytest.mark.parametrize(("chunk", "keys"), [(1, 12), (7, 70), (16, 70), (33, 70)])
def test_chunks_of_queries(chunk, keys):
    for queries in {keys, min(keys, 41)}:
        check(*tensors(1, 2, 1, queries, keys, 16), rotary_of(16), chunk=chunk)


def test_rows_whose_keys_are_rerotated_one_by_one(monkeypatch):
    monkeypatch.setattr("ropewalk.ops.triton.narrow_keys._VIEW_BYTES", 1)
    check(*tensors(3, 2, 1, 20, 60, 16), rotary_of(16))


@pytest.mark.parametrize(
    ("heads", "key_heads", "rows"), [(2, 2, 16), (6, 2, 16), (4, 1, 64), (16, 2, 64), (20, 1, 16), (20, 1, 64)]
)
def test_heads_that_share_keys(heads, key_heads, rows):
    """One, three, four and eight to a key head; twenty do not fit a tile of 16 rows."""
    check(*tensors(1, heads, key_heads, 17, 60, 16), rotary_of(16), config=NarrowConfig(rows, 32, 4, 2))


@pytest.mark.parametrize(
    ("head_dim", "dim", "kind"),
    [(8, 8, {}), (24, 24, {}), (24, 16, {}), (40, 8, {"offset": 16}), (24, 16, {"interleaved": True, "offset": 8})],
    ids=str,
)
def test_kinds_of_rotary(head_dim, dim, kind):
    check(*tensors(1, 2, 1, 33, 60, head_dim), rotary_of(dim, **kind))


def test_without_rotary():
    check(*tensors(1, 2, 1, 33, 60, 24), Rotary.none())


def test_softcap():
    check(*tensors(1, 2, 1, 33, 60, 16), rotary_of(16), softcap=1.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [32, 80])
def test_budget(dtype, head_dim):
    position_map, rotary = SELF(9, 0.3, 30, "distance"), rotary_of(32, base=1e4)
    near, *middle, far = position_map.bands
    assert len(middle) > 2
    q, k, v = tensors(1, 3, 1, 110, 140, head_dim, dtype)
    output, _ = both_passes(q, k, v, rotary, tuple(middle), (near, far), head_dim**-0.5, config=None)
    assert within_budget(output, q, k, v, position_map, rotary) is None


def test_a_main_pass_that_saw_nothing():
    """Queries before the first band are left alone, and those whose lse is -inf take the bands' own result."""
    q, k, v = tensors(1, 2, 1, 40, 40, 16)
    rotary, main = rotary_of(16), torch.zeros(1, 2, 40, 16, device=DEVICE)
    main[:, :, :5] = 7
    result = attend(q, k, v, MIDDLE, rotary, main, torch.full((1, 2, 40), -torch.inf, device=DEVICE), 0.25,
                     config=NarrowConfig(32, 16, 4, 1))  # fmt: skip
    assert (result[:, :, :5] == 7).all()
    assert_close(result[:, :, 5:].double(), exact(q, k, v, MIDDLE, rotary, 0.25)[0][:, :, 5:], rtol=0, atol=1e-5)


def test_keys_that_no_query_sees_may_be_anything():
    q, k, v = tensors(1, 2, 1, 9, 80, 16)
    rotary = rotary_of(16)
    main, lse = exact(q, k, v, OTHERS, rotary, 0.25)
    expected = attend(q, k, v, MIDDLE, rotary, main.float(), lse.float(), 0.25, config=SMALL)
    for x in (k, v):
        x[:, :, : 71 - 52] = torch.nan
        x[:, :, 80 - 5 :] = torch.nan
    assert torch.equal(attend(q, k, v, MIDDLE, rotary, main.float(), lse.float(), 0.25, config=SMALL), expected)


def test_strides():
    q, k, v = tensors(2, 2, 2, 12, 60, 24)
    rotary = rotary_of(16)
    main, lse = (x.float() for x in exact(q, k, v, OTHERS, rotary, 0.25))
    expected = attend(q, k, v, MIDDLE, rotary, main.clone(), lse, 0.25, config=SMALL)

    def as_tokens_first(x):
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    def padded(x):
        return torch.nn.functional.pad(x, (3, 2), value=torch.nan)[..., 3:-2]

    for change in (as_tokens_first, padded):
        q_, k_, v_, main_ = map(change, (q, k, v, main.clone()))
        lse_ = change(lse)
        assert torch.equal(attend(q_, k_, v_, MIDDLE, rotary, main_, lse_, 0.25, config=SMALL), expected)


def test_same_call_twice_is_identical():
    q, k, v = tensors(1, 3, 1, 30, 90, 64, torch.bfloat16)
    first, second = (both_passes(q, k, v, rotary_of(64))[0] for _ in range(2))
    assert torch.equal(first, second)
