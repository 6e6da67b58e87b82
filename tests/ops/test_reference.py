# SPDX-License-Identifier: Apache-2.0
"""What only the reference takes so far: positions of tokens and of pairs, ALiBi, a map a head, pages, keys of 8 bits.

The other implementations say so, and "auto" serves it by the reference.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from random_maps import Bands
from tensors import FAST, explicit, random_rotary, random_tensors, relative, rotated
from torch.testing import assert_close

from ropewalk.maps import SELF, Band, DualChunk, Identity, LeakyReRoPE, SelfExtend, SlidingWindow, StreamingLLM
from ropewalk.maps.edges import BEGINNING, PAST_QUERY, Edge
from ropewalk.maps.positions import PositionFunction
from ropewalk.maps.query_scaling import QueryScaling
from ropewalk.ops import Layout, Pages, Positions, attention

MAPS = [
    Identity(),
    SelfExtend(3, 8),
    SelfExtend(3, 8, start=20),
    SELF(5, 0.3, 8, "distance"),
    SlidingWindow(9),
    DualChunk(6, 4),
    StreamingLLM(3, 7),
]
over_maps = pytest.mark.parametrize("position_map", MAPS, ids=str)


def doubles(*shape):
    return [x.double() for x in random_tensors(*shape)]


# Positions of tokens

over_positions = pytest.mark.parametrize("impl", ["reference", "blocks"])


@over_maps
@over_positions
def test_a_thinned_cache_is_the_full_one_restricted_to_its_keys(position_map, impl):
    """Each row lost slots of its own; the tokens that are left are where they were."""
    rotary, tokens = random_rotary(12), torch.arange(40)
    q, k, v = doubles(2, 4, 2, 9, 40, 16)
    kept = torch.stack([torch.cat((torch.randperm(31)[:17].sort().values, tokens[31:])) for _ in range(2)])
    full = relative(position_map, 40)[-9:]
    expected = [
        explicit(q[row : row + 1], k[row : row + 1, :, kept[row]], v[row : row + 1, :, kept[row]],
                 full[:, kept[row]], rotary)
        for row in range(2)
    ]  # fmt: skip
    q, k = rotated(q, rotary, tokens[-9:]), rotated(k, rotary, tokens)
    k, v = (torch.stack([x[row, :, kept[row]] for row in range(2)]) for x in (k, v))
    positions = Positions(tokens[-9:].expand(2, -1), kept)
    output = attention(q, k, v, position_map, rotary, positions=positions, impl=impl)
    assert_close(output, torch.cat(expected), rtol=0, atol=2e-5)


@over_maps
@over_positions
def test_positions_that_are_the_slots(position_map, impl):
    rotary, tokens = random_rotary(16), torch.arange(40).expand(3, -1)
    q, k, v = random_tensors(3, 4, 2, 9, 40, 16)
    expected = attention(q, k, v, position_map, rotary, impl="reference")
    for axis_of_pair in (None, torch.tensor([0, 1, 2, 0, 1, 2, 2, 1])):
        at = tokens if axis_of_pair is None else tokens[..., None].expand(-1, -1, 3)
        positions = Positions(at[:, -9:], at, axis_of_pair)
        output = attention(q, k, v, position_map, rotary, positions=positions, impl=impl)
        assert_close(output, expected, rtol=0, atol=2e-6)


@over_positions
def test_positions_in_padded_rows(impl):
    """Positions are those of slots; a slot without a token may have any."""
    rotary, mask = random_rotary(16), torch.ones(2, 40).bool()
    mask[0, :5], mask[1, 10:20] = False, False
    q, k, v = random_tensors(2, 4, 2, 9, 40, 16)
    slots = torch.arange(40).expand(2, -1)
    layout, scaling = Layout(9, 40, key_mask=mask), QueryScaling("log-n", 16)
    positions = Positions((slots[:, -9:] + 3).clone(), torch.where(mask, slots + 3, -1000))
    output = attention(
        q, k, v, SelfExtend(3, 8), rotary, layout=layout, positions=positions, query_scaling=scaling, impl=impl
    )
    for row in range(2):
        one, keys = slice(row, row + 1), slots[row : row + 1, mask[row]] + 3
        alone = attention(
            q[one] * scaling(slots[row, -9:] + 3)[:, None], k[one][:, :, mask[row]], v[one][:, :, mask[row]],
            SelfExtend(3, 8), rotary, positions=Positions(keys[:, -9:], keys),
        )  # fmt: skip
        assert_close(output[one], alone, rtol=0, atol=1e-6)


@over_maps
@over_positions
def test_positions_on_axes(position_map, impl):
    """As in M-RoPE: each axis is mapped by itself, true where a key is ahead on it; the first says what is seen."""
    rotary, tokens = random_rotary(12), torch.arange(40)
    q, k, v = doubles(1, 4, 2, 9, 40, 16)
    axes = torch.stack((tokens, tokens // 4, tokens % 4 + 20), dim=-1)
    axis_of_pair = torch.tensor([0, 2, 1, 1, 0, 2])
    relatives = []
    for axis in axes.T:
        distance = axis[-9:, None] - axis
        mapped = replace(position_map, start=0).relative_to(axis[-9:, None], axis).double()
        true = (mapped < 0) | (distance < 0) | (tokens[-9:, None] < position_map.start)
        relatives.append(torch.where(true, distance.double(), mapped))
    by_pair = torch.stack([relatives[axis] for axis in axis_of_pair], dim=-1)
    hidden = relative(position_map, 40)[-9:].isnan()
    expected = explicit(q, k, v, by_pair.masked_fill(hidden[..., None], torch.nan), rotary)
    at = axes[:, axis_of_pair]  # (tokens, pairs)
    turn = torch.exp(1j * at * rotary.inverse_frequencies.double())

    def turned(x, turn):
        pairs = torch.complex(x[..., :6], x[..., 6:12]) * turn
        return torch.cat((pairs.real, pairs.imag, x[..., 12:]), dim=-1)

    q, k = turned(q, turn[-9:]), turned(k, turn)
    positions = Positions(axes[None, -9:], axes[None], axis_of_pair)
    output = attention(q, k, v, position_map, rotary, positions=positions, impl=impl)
    assert_close(output, expected, rtol=0, atol=2e-5)


# Positions by rotary dimension


@dataclass(frozen=True)
class Slowed(PositionFunction):
    """Every pair turns at a speed of its own: `token / (1 + pair)`."""

    by_pair: ClassVar[bool] = True
    period: ClassVar[int] = 1
    pairs: int

    def formula(self, token):
        return f"{token} / (1 + pair)"

    def __call__(self, tokens):
        return tokens[..., None] / (1.0 + torch.arange(self.pairs))


def test_functions_by_pair():
    position_map = Bands((Band(Edge(7), PAST_QUERY), Band(BEGINNING, Edge(7), Slowed(6), Slowed(6))))
    assert position_map.by_pair
    rotary, tokens = random_rotary(12), torch.arange(40)
    q, k, v = doubles(2, 4, 2, 9, 40, 16)
    distance = (tokens[-9:, None] - tokens)[..., None].double().expand(-1, -1, 6)
    by_pair = torch.where(distance < 8, distance, distance / torch.arange(1, 7))
    expected = explicit(q, k, v, by_pair.masked_fill(distance < 0, torch.nan), rotary)
    q, k = rotated(q, rotary, tokens[-9:]), rotated(k, rotary, tokens)
    assert_close(attention(q, k, v, position_map, rotary), expected, rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match="slopes need one position a token"):
        attention(q, k, v, position_map, rotary, slopes=torch.ones(4))


# Slopes


@over_maps
def test_slopes(position_map):
    """ALiBi of relative positions, beside a rotary embedding and without one."""
    tokens, slopes = torch.arange(40), torch.tensor([0.5, 0.25, 0.0, -0.125])
    distances = relative(position_map, 40)[-9:]
    bias = -slopes.double()[:, None, None] * distances.nan_to_num()
    for rotary in (random_rotary(12), random_rotary(0)):
        q, k, v = doubles(2, 4, 2, 9, 40, 16)
        expected = explicit(q, k, v, distances, rotary, bias)
        q, k = rotated(q, rotary, tokens[-9:]), rotated(k, rotary, tokens)
        output = attention(q, k, v, position_map, rotary, slopes=slopes)
        assert_close(output, expected, rtol=0, atol=2e-5)


def test_slopes_of_positions():
    q, k, v = doubles(1, 2, 1, 3, 5, 8)
    at = torch.tensor([[0, 3, 4, 10, 11]])
    distance = (at[0, -3:, None] - at[0]).double().masked_fill(torch.arange(5) > torch.arange(2, 5)[:, None], torch.nan)
    slopes = torch.tensor([0.5, 0.1], dtype=torch.float64)
    expected = explicit(q, k, v, distance, random_rotary(0), -slopes[:, None, None] * distance.nan_to_num())
    output = attention(q, k, v, Identity(), None, slopes=slopes, positions=Positions(at[:, -3:], at))
    assert_close(output, expected, rtol=0, atol=1e-6)


def test_slopes_take_part_in_gradients():
    q, k, v = random_tensors(1, 2, 1, 9, 9, 8)
    slopes = torch.tensor([0.5, 0.1], requires_grad=True)
    attention(q, k, v, SelfExtend(3, 4), None, slopes=slopes).sum().backward()
    assert (slopes.grad != 0).all()


# A map a head


def test_a_map_for_each_key_head():
    maps = [SelfExtend(3, 8), DualChunk(6, 4), SlidingWindow(9)]
    q, k, v = random_tensors(2, 6, 3, 9, 40, 16)
    rotary, mask = random_rotary(16), torch.ones(2, 40).bool()
    mask[0, :5] = False
    options = {"sinks": torch.randn(6), "slopes": torch.rand(6), "key_scale": torch.rand(3, 1, 1)}
    for layout in (None, Layout(9, 40, key_mask=mask)):
        output = attention(q, k, v, maps, rotary, layout=layout, **options)
        for head, position_map in enumerate(maps):
            alone, both = slice(head, head + 1), slice(2 * head, 2 * head + 2)
            of_head = {name: x[both] if len(x) == 6 else x[alone] for name, x in options.items()}
            expected = attention(
                q[:, both], k[:, alone], v[:, alone], position_map, rotary, layout=layout, impl="reference", **of_head
            )
            assert_close(output[:, both], expected, rtol=0, atol=1e-6)


def test_one_map_for_all_heads_is_no_map_a_head():
    """Every implementation takes it."""
    q, k, v = random_tensors(1, 4, 2, 9, 24, 16)
    expected = attention(q, k, v, SelfExtend(3, 8), random_rotary(16), impl="reference")
    for impl in ("reference", "blocks", "flash"):
        output = attention(q, k, v, [SelfExtend(3, 8)] * 2, random_rotary(16), impl=impl)
        assert_close(output, expected, rtol=0, atol=5e-6)


# Pages


def paged(texts, page, heads, key_heads, head_dim):
    """Random texts of (queries, tokens) and one store of pages, in shuffled order, that holds them: the texts alone as
    query, key, value, and the call's own three tensors and `Pages`. What no text has is NaN."""
    alone = [random_tensors(1, heads, key_heads, queries, tokens, head_dim) for queries, tokens in texts]
    counts = [-(-tokens // page) for _, tokens in texts]
    order = iter(torch.randperm(sum(counts) + 3).tolist())
    stores = [torch.full((sum(counts) + 3, key_heads, page, head_dim), torch.nan) for _ in range(2)]
    table = torch.full((len(texts), max(counts) + 1), 1 << 20, dtype=torch.int32)
    for text, ((_, *key_and_value), (_, tokens)) in enumerate(zip(alone, texts, strict=True)):
        for number, begin in enumerate(range(0, tokens, page)):
            place = table[text, number] = next(order)
            for store, x in zip(stores, key_and_value, strict=True):
                piece = x[0, :, begin : begin + page]
                store[place, :, : piece.shape[1]] = piece
    queries, tokens = torch.tensor(texts).T
    starts = torch.cat((torch.zeros(1, dtype=torch.int64), queries.cumsum(0)))
    return alone, [torch.cat([q for q, _, _ in alone], dim=2), *stores], Pages(table, tokens, starts)


@over_maps
@pytest.mark.parametrize("page", [1, 4, 16])
def test_texts_in_pages_equal_each_alone(position_map, page):
    """Prefill, a chunk, decode, a text without queries, and one that fills its pages, in one call."""
    texts = [(7, 7), (5, 33), (1, 21), (0, 9), (1, 1), (16, 16)]
    alone, tensors, pages = paged(texts, page, 4, 2, 16)
    rotary = random_rotary(16)
    options = {"sinks": torch.randn(4), "slopes": torch.rand(4), "query_scaling": QueryScaling("log-n", 8)}
    for given in ({}, options):
        output = attention(*tensors, position_map, rotary, pages=pages, **given)
        assert output.shape == tensors[0].shape
        expected = [attention(*text, position_map, rotary, impl="reference", **given) for text in alone]
        assert_close(output, torch.cat(expected, dim=2), rtol=0, atol=1e-6)


def test_texts_may_share_pages():
    """Two questions about one document."""
    q, k, v = random_tensors(1, 4, 2, 6, 12, 16)
    pages = Pages(torch.tensor([[0, 1, 2], [0, 1, 3]]), torch.tensor([12, 11]), torch.tensor([0, 3, 6]))
    stores = [torch.cat([x.view(2, 3, 4, 16).transpose(0, 1), torch.randn(1, 2, 4, 16)]) for x in (k, v)]
    output = attention(q, *stores, SelfExtend(3, 4), random_rotary(16), pages=pages)
    first = attention(q[:, :, :3], k, v, SelfExtend(3, 4), random_rotary(16), impl="reference")
    k, v = (torch.cat((x[:, :, :8], store[3:, :, :3]), dim=2) for x, store in zip((k, v), stores, strict=True))
    second = attention(q[:, :, 3:], k, v, SelfExtend(3, 4), random_rotary(16), impl="reference")
    assert_close(output, torch.cat((first, second), dim=2), rtol=0, atol=1e-6)


# Keys and values of 8 bits


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (2, 1, 1), (1, 2, 20, 1), (3, 2, 20, 16)], ids=str)
def test_keys_and_values_with_scales(dtype, shape):
    q, k, v = random_tensors(3, 4, 2, 9, 20, 16)
    small_k, small_v = ((20 * x).abs().clamp(max=120).to(dtype) for x in (k, v))
    scales = {"key_scale": torch.rand(shape) / 20, "value_scale": torch.rand(shape) / 20}
    true_k, true_v = small_k.float() * scales["key_scale"], small_v.float() * scales["value_scale"]
    mask = torch.ones(3, 20).bool()
    mask[1, :4], mask[2, 3:7] = False, False
    for layout in (None, Layout(9, 20, key_mask=mask)):
        for query in (q, q.bfloat16(), q.double()):
            output = attention(query, small_k, small_v, SelfExtend(3, 8), random_rotary(16), layout=layout, **scales)
            tensors = query.double(), true_k.double(), true_v.double()
            expected = attention(*tensors, SelfExtend(3, 8), random_rotary(16), layout=layout, impl="reference")
            assert output.dtype == query.dtype
            tolerance = 2 * torch.finfo(query.dtype).eps if query.dtype == torch.bfloat16 else 5e-6
            assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)


def test_scales_of_pages():
    alone, (q, k, v), pages = paged([(7, 7), (5, 13)], 4, 4, 2, 16)
    scale = torch.rand(k.shape[0], 1, 1, 1)
    output = attention(
        q, k / scale, v / scale, SelfExtend(3, 4), random_rotary(16), pages=pages, key_scale=scale, value_scale=scale
    )
    expected = [attention(*text, SelfExtend(3, 4), random_rotary(16), impl="reference") for text in alone]
    assert_close(output, torch.cat(expected, dim=2), rtol=0, atol=1e-5)


# The others


def one_extra(name):
    """A call that needs something: its map and its options."""
    at = torch.arange(8)[None]
    return {
        "positions of tokens": (Identity(), {"positions": Positions(at, at)}),
        r"slopes \(ALiBi\)": (Identity(), {"slopes": torch.ones(2)}),
        "maps that differ by head": ([Identity(), SelfExtend(2, 4)], {}),
        "positions that differ by rotary dimension": (
            Bands((Band(Edge(3), PAST_QUERY), Band(BEGINNING, Edge(3), Slowed(4), Slowed(4)))),
            {},
        ),
        "keys and values with scales": (Identity(), {"value_scale": torch.ones(())}),
        "pages": (
            Identity(),
            {"pages": Pages(torch.tensor([[0]]), torch.tensor([8]), torch.tensor([0, 8]))},
        ),
    }[name]


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize(
    "name",
    [
        "maps that differ by head",
        "positions that differ by rotary dimension",
        "keys and values with scales",
        "pages",
    ],
)
def test_the_others_say_what_they_lack(name, impl, caplog):
    position_map, options = one_extra(name)
    tensors = random_tensors(1, 2, 2, 8, 8, 8)
    with pytest.raises(ValueError, match=f"impl={impl!r} does not take {name}; 'reference' would"):
        attention(*tensors, position_map, random_rotary(8), impl=impl, **options)
    expected = attention(*tensors, position_map, random_rotary(8), impl="reference", **options)
    assert torch.equal(attention(*tensors, position_map, random_rotary(8), **options), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_slopes_of_positions_that_are_no_whole_numbers(dtype):
    q, k, v = random_tensors(1, 2, 2, 12, 12, 8)
    position_map, slopes = LeakyReRoPE(2.5, 3), torch.tensor([0.5, 0.1])
    output = attention(*(x.to(dtype) for x in (q, k, v)), position_map, None, slopes=slopes)
    distance = position_map.relative_positions(12)
    scores = q.to(dtype).double() @ k.to(dtype).double().mT * 8**-0.5 - slopes.double()[:, None, None] * distance
    expected = scores.masked_fill(distance < 0, -torch.inf).softmax(-1) @ v.to(dtype).double()
    assert_close(output.double(), expected, rtol=0, atol=1e-2 if dtype == torch.bfloat16 else 1e-6)
