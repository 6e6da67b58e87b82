# SPDX-License-Identifier: Apache-2.0
"""Generic tests: they run over every registered map by themselves, on the examples that its class gives."""

import json
import re
from dataclasses import replace
from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import RULES, table

from ropewalk.maps import (
    MAPS,
    SELF,
    DualChunk,
    Identity,
    Infinite,
    LeakyReRoPE,
    LengthError,
    LMInfinite,
    PositionMap,
    ReRoPE,
    SelfExtend,
    SlidingWindow,
    StreamingLLM,
    from_dict,
)
from ropewalk.testing.maps import example_maps, large_maps

EXAMPLES = list(chain(*example_maps().values()))
LENGTHS = (1, 2, 3, 4, 5, 9, 10, 24, 41)

over_examples = pytest.mark.parametrize("position_map", EXAMPLES, ids=str)
over_looped = pytest.mark.parametrize("position_map", [m for m in EXAMPLES if m.name in RULES], ids=str)
# Maps that let far keys share positions: what their papers say of distances.
over_grouping = pytest.mark.parametrize("position_map", [m for m in EXAMPLES if m.keeps_to_half], ids=str)
over_maps = pytest.mark.parametrize("kind", MAPS.values(), ids=MAPS)

starts = st.sampled_from([0, 0, 1, 5, 17, 60])
windows = st.integers(1, 45)
maps = st.one_of(
    st.builds(Identity, start=starts),
    st.builds(SelfExtend, st.integers(1, 12), windows, start=starts),
    st.builds(ReRoPE, windows, start=starts),
    st.builds(LeakyReRoPE, st.floats(1, 9), windows, start=starts),
    st.builds(
        SELF, st.integers(2, 12), st.floats(0.01, 5), windows, st.sampled_from(["anchored", "distance"]), start=starts
    ),
    st.integers(1, 45).flatmap(lambda size: st.builds(DualChunk, st.just(size), st.integers(1, size), start=starts)),
    st.builds(StreamingLLM, st.integers(0, 45), windows, start=starts),
    st.builds(LMInfinite, st.integers(0, 45), windows, start=starts),
    st.builds(SlidingWindow, windows, start=starts),
    st.builds(Infinite, windows, start=starts),
)


def expected(position_map: PositionMap, length: int) -> torch.Tensor:
    return torch.tensor(table(position_map, length), dtype=torch.float64)


@over_maps
def test_every_registered_map_has_examples_of_its_own_kind(kind):
    examples = example_maps()[kind.name]
    assert examples
    assert all(type(example) is kind for example in [*examples, *kind.large_examples()])


@over_looped
def test_relative_positions_equal_the_loops(position_map):
    for length in LENGTHS:
        found = position_map.relative_positions(length)
        assert found.shape == (length, length)
        torch.testing.assert_close(found.double(), expected(position_map, length), rtol=0, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(maps, st.integers(1, 60))
def test_relative_positions_equal_the_loops_for_any_parameters(position_map, length):
    found = position_map.relative_positions(length).double()
    torch.testing.assert_close(found, expected(position_map, length), rtol=0, atol=1e-9)


@over_examples
def test_relative_positions_are_whole_unless_the_map_is_real_valued(position_map):
    dtype = position_map.relative_positions(6).dtype
    tokens = torch.arange(6)
    functions = [function for band in position_map.bands for function in (band.query_positions, band.key_positions)]
    real_valued = any(function(tokens).is_floating_point() for function in functions)
    assert dtype == (torch.float64 if real_valued else torch.int64)


@over_examples
def test_relative_positions_are_those_of_the_bands_pair_by_pair(position_map):
    found = position_map.relative_positions(30)
    for m in range(30):
        for n in range(m + 1):
            band = next((b for b in position_map.bands if b.low(m) <= n < b.high(m)), None)
            if m < position_map.start:
                position = m - n
            elif band is None:
                position = -1
            else:
                position = (band.query_positions(torch.tensor(m)) - band.key_positions(torch.tensor(n))).item()
            assert found[m, n] == pytest.approx(position, abs=1e-9)


@over_examples
def test_relative_to_gives_any_part_of_the_matrix(position_map):
    queries, keys = torch.tensor([3, 11, 23]), torch.tensor([0, 2, 11, 20])
    part = position_map.relative_to(queries[:, None], keys)
    assert torch.equal(part, position_map.relative_positions(24)[queries][:, keys])


@over_examples
def test_bands_hold_every_key_once_and_nearest_first(position_map):
    queries, keys = torch.arange(41)[:, None], torch.arange(41)
    seen = torch.stack([band.sees(queries, keys) for band in position_map.bands]).long()
    if position_map.sees_everything:
        assert torch.equal(seen.sum(0), (keys <= queries).long())
    assert seen.sum(0).max() == 1
    assert seen[0].diagonal().all(), "the nearest band holds every query's own key"
    # Of two keys of a query, the nearer one is never in the farther band.
    numbers = torch.where(seen.any(0), seen.argmax(0), -1)
    for m in range(41):
        of_query = numbers[m][numbers[m] >= 0]
        assert (of_query.diff() <= 0).all()


@over_examples
def test_neighbors_keep_their_distance_and_a_token_is_at_zero_from_itself(position_map):
    relative = position_map.relative_positions(20)
    window = getattr(position_map, "window", 1)
    for m in range(20):
        for n in range(max(0, m - window + 1), m + 1):
            assert relative[m, n] == m - n or (isinstance(position_map, Infinite) and relative[m, n] == -1)


@over_grouping
def test_relative_positions_never_decrease_with_distance(position_map):
    # Where the group size grows with the distance, groups of the next size may begin one position back.
    step_back = 1 if isinstance(position_map, SELF) and position_map.grouping == "distance" else 0
    relative = position_map.relative_positions(41)
    for m in range(41):
        outwards = relative[m, : m + 1].flip(0)
        assert (outwards.diff() >= -step_back).all()


@over_grouping
def test_relative_positions_never_exceed_the_distance_by_more_than_one(position_map):
    # One, where the group size does not divide the first distance of a band.
    tokens = torch.arange(41)
    assert (position_map.relative_positions(41) <= (tokens[:, None] - tokens).clamp(min=-1) + 1).all()


@over_examples
def test_queries_before_start_keep_true_distances(position_map):
    tokens = torch.arange(30)
    distance = (tokens[:, None] - tokens).clamp(min=-1).double()
    late = replace(position_map, start=12).relative_positions(30).double()
    assert torch.equal(late[:12], distance[:12])
    assert torch.equal(late[12:], replace(position_map, start=0).relative_positions(30)[12:].double())


@over_examples
def test_largest_relative_position_is_the_matrix_maximum(position_map):
    for length in LENGTHS:
        largest = position_map.relative_positions(length).max().item()
        assert position_map.largest_relative_position(length) == pytest.approx(largest, abs=1e-9)


@pytest.mark.parametrize("position_map", large_maps(), ids=str)
def test_largest_relative_position_of_a_large_map_is_the_matrix_maximum(position_map):
    largest = [position_map.relative_positions(length).max().item() for length in (1, 300, 700)]
    assert [position_map.largest_relative_position(n) for n in (1, 300, 700)] == pytest.approx(largest, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(maps, st.integers(1, 60))
def test_largest_relative_position_is_the_matrix_maximum_for_any_parameters(position_map, length):
    largest = expected(position_map, length).max().item()
    assert position_map.largest_relative_position(length) == pytest.approx(largest, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(maps.filter(lambda m: not isinstance(m, LeakyReRoPE)), st.integers(1, 30))
def test_lengths_are_the_last_that_fit(position_map, trained_window):
    """Eq. 4 and eq. 5 against the maximum of the whole matrix, for every length up to 50."""
    relative = expected(position_map, 50)
    reached = [relative[:length, :length].max().item() for length in range(1, 51)]
    fitting = sum(position <= trained_window - 1 for position in reached)
    recommended = sum(position < trained_window / 2 for position in reached) if position_map.keeps_to_half else fitting
    assert min(position_map.max_length(trained_window), 50) == fitting
    assert min(position_map.recommended_length(trained_window), 50) == recommended


@over_examples
@pytest.mark.parametrize("trained_window", [1, 2, 16, 31])
def test_longest_texts_stay_inside_and_one_token_more_does_not(position_map, trained_window):
    longest = position_map.max_length(trained_window)
    recommended = position_map.recommended_length(trained_window)
    assert recommended <= longest
    if longest < float("inf"):
        assert position_map.largest_relative_position(longest) <= trained_window - 1
        assert position_map.largest_relative_position(longest + 1) > trained_window - 1
    if recommended < float("inf"):
        assert recommended == 0 or position_map.meets_rule(recommended, trained_window)
        assert not position_map.meets_rule(recommended + 1, trained_window)


@over_maps
@pytest.mark.parametrize("trained_window", [1, 2, 3, 16, 129, 2048])
@pytest.mark.parametrize("target_length", [1, 2, 3, 40, 127, 300, 4096, 30_000])
def test_for_length_keeps_the_rule_or_says_that_it_cannot(kind, target_length, trained_window):
    chosen, refusal = None, None
    try:
        chosen = kind.for_length(target_length, trained_window)
    except LengthError as error:
        refusal = str(error)
    if chosen is None:
        assert str(target_length) in refusal
        assert str(trained_window) in refusal
    elif chosen.is_identity and target_length <= trained_window:
        pass  # the unmodified model inside its own window
    else:
        assert type(chosen) is kind
        assert chosen.recommended_length(trained_window) >= target_length
        limit = trained_window / 2 if kind.keeps_to_half else trained_window
        assert chosen.largest_relative_position(target_length) < limit


@over_examples
def test_to_dict_is_plain_data_and_round_trips(position_map):
    data = position_map.to_dict()
    assert data["map"] == position_map.name
    assert from_dict(json.loads(json.dumps(data))) == position_map


@over_examples
def test_str_is_the_call_that_makes_the_map(position_map):
    assert eval(str(position_map), {kind.__name__: kind for kind in MAPS.values()}) == position_map


@over_maps
def test_miniature_shows_what_the_map_does_within_ten_tokens(kind):
    miniature = replace(example_maps()[kind.name][0], **kind.miniature)
    relative = miniature.relative_positions(10)
    is_shown = relative[9].tolist() != list(range(9, -1, -1))
    assert kind is Identity or is_shown, f"{kind.name}: choose a miniature that ten tokens can show"


@over_examples
def test_maps_are_frozen_and_hashable(position_map):
    assert hash(position_map) == hash(replace(position_map))
    with pytest.raises(AttributeError):
        position_map.start = 3


@over_examples
def test_formulas_name_the_token(position_map):
    for band in position_map.bands:
        query, key = band.query_positions.formula("m"), band.key_positions.formula("n")
        assert not re.search(r"\bn\b", query)
        assert not re.search(r"\bm\b", key)
        assert band.is_true == (query == "m" and key == "n")


@pytest.mark.parametrize(
    "position_map",
    [SelfExtend(1, 4), LeakyReRoPE(1, 4), LeakyReRoPE(1.0, 4), SELF(2, 0.3, 3), SELF(2, 0.3, 3, "distance")],
    ids=str,
)
def test_maps_that_change_nothing_equal_the_identity(position_map):
    assert position_map.is_identity
    assert position_map.bands == Identity().bands
    assert torch.equal(position_map.relative_positions(30), Identity().relative_positions(30))
    assert position_map.max_length(64) == 64


@pytest.mark.parametrize("position_map", [SelfExtend(2, 4), LeakyReRoPE(2, 4), SELF(3, 0.3, 3), ReRoPE(4)], ids=str)
def test_other_maps_are_not_the_identity(position_map):
    assert not position_map.is_identity


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SelfExtend(0, 4), r"group_size must be .*got 0"),
        (lambda: SelfExtend(2, -1), r"window must be .*got -1"),
        (lambda: SelfExtend(2, 4, start=-3), r"start must be .*got -3"),
        (lambda: SELF(capacity=1), r"capacity must be .*got 1"),
        (lambda: SELF(capacity=1 << 15), r"capacity must be at most 16384, got 32768"),
        (lambda: SELF(rate=0.0), r"rate must be .*got 0\.0"),
        (lambda: SELF(rate=float("nan")), r"rate must be .*got nan"),
        (lambda: SELF(rate=float("inf")), r"rate must be .*got inf"),
        (lambda: SELF(window=-1), r"window must be .*got -1"),
        (lambda: SELF(grouping="logistic"), r"grouping must be .*anchored, distance.*got 'logistic'"),
        (lambda: ReRoPE(0), r"window must be .*got 0"),
        (lambda: LeakyReRoPE(0.5, 4), r"factor must be .*got 0\.5"),
        (lambda: LeakyReRoPE(float("inf"), 4), r"factor must be .*got inf"),
        (lambda: LeakyReRoPE(2, 0), r"window must be .*got 0"),
        (lambda: DualChunk(0, 1), r"chunk_size must be .*got 0"),
        (lambda: DualChunk(4, 5), r"window must be from 1 to the chunk size, 4, got 5"),
        (lambda: DualChunk(4, 0), r"window must be from 1 .*got 0"),
        (lambda: StreamingLLM(-1, 4), r"sinks must be .*got -1"),
        (lambda: StreamingLLM(4, 0), r"window must be .*got 0"),
        (lambda: LMInfinite(-1, 4), r"sinks must be .*got -1"),
        (lambda: LMInfinite(4, 0), r"window must be .*got 0"),
        (lambda: SlidingWindow(0), r"window must be .*got 0"),
        (lambda: Infinite(0), r"window must be .*got 0"),
        (lambda: SelfExtend(2, 4).max_length(0), r"trained_window must be .*got 0"),
        (lambda: SelfExtend(2, 4).recommended_length(-1), r"trained_window must be .*got -1"),
    ],
)
def test_parameters_out_of_range_are_named_with_their_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()
