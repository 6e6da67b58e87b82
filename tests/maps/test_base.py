# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ropewalk.maps.base import EVERYTHING, Band, join_equal
from ropewalk.maps.edges import BEGINNING, PAST_QUERY, Edge
from ropewalk.maps.positions import TRUE_POSITIONS, Capped, Constant, Cyclic, Grouped, Logistic, LogisticGroups, Scaled

edges = st.builds(Edge, st.integers(-1, 12), st.integers(1, 7), st.none() | st.integers(0, 25))
functions = st.one_of(
    st.builds(Grouped, st.integers(1, 7), st.integers(0, 5)),
    st.builds(Scaled, st.sampled_from([1.0, 2.0, 4.0]), st.sampled_from([0.0, 0.5])),
    st.builds(Constant, st.integers(0, 9)),
    st.builds(Capped, st.integers(0, 30)),
    st.builds(Cyclic, st.integers(1, 9), st.integers(0, 5), st.none() | st.integers(0, 9)),
)


@settings(max_examples=300, deadline=None)
@given(edges, st.integers(0, 60))
def test_an_edge_is_its_formula_and_never_falls(edge, query):
    key = max((query - edge.back) // edge.block * edge.block, 0)
    assert edge(query) == (key if edge.cap is None else min(key, edge.cap))
    assert edge(torch.tensor([[query]])).item() == edge(query)
    assert edge(query) <= edge(query + 1)


@pytest.mark.parametrize(
    ("edge", "formula"),
    [
        (BEGINNING, "0"),
        (PAST_QUERY, "m + 1"),
        (Edge(1023), "m - 1023"),
        (Edge(0, 96), "m // 96 * 96"),
        (Edge(96, 96), "(m - 96) // 96 * 96"),
        (Edge(7, 1, 4), "min(m - 7, 4)"),
    ],
    ids=str,
)
def test_an_edge_as_a_person_would_write_it(edge, formula):
    assert edge.formula("m") == formula


@settings(max_examples=600, deadline=None)
@given(edges, edges, functions, functions, st.integers(0, 40), st.integers(1, 120))
def test_largest_relative_position_of_any_band(low, high, query_positions, key_positions, start, length):
    band = Band(low, high, query_positions, key_positions)
    tokens = torch.arange(length)
    relative = query_positions(tokens)[:, None] - key_positions(tokens)
    seen = band.sees(tokens[:, None], tokens) & (tokens >= start)[:, None] & (tokens <= tokens[:, None])
    expected = relative[seen].max().item() if seen.any() else -1
    if high.back >= -1 and high(length - 1) <= length:
        assert max(band.largest_relative_position(length, start), -1) == max(expected, -1)


@pytest.mark.parametrize(("first", "stop"), [(0, None), (0, 5), (3, None), (3, 9)])
def test_a_band_of_distances(first, stop):
    band = Band.at_distances(first, stop)
    tokens = torch.arange(20)
    distance = tokens[:, None] - tokens
    assert torch.equal(band.sees(tokens[:, None], tokens), (distance >= first) & (distance < (stop or 20)))
    assert band.distances == (first, stop)
    assert band.first_query == first


def test_bands_of_other_edges_have_no_distances():
    assert Band(Edge(0, 4), PAST_QUERY).distances is None
    assert Band(BEGINNING, Edge(5, 1, 3)).distances is None


def test_equal_neighbors_become_one_band():
    third = Band.at_distances(5, None, Grouped(2), Grouped(2))
    bands = (
        Band.at_distances(0, 3),
        Band.at_distances(3, 3, Grouped(3), Grouped(3)),
        Band.at_distances(3, 5),
        third,
    )
    assert join_equal(bands) == (Band.at_distances(0, 5), third)
    assert join_equal([Band.at_distances(0, 3), Band.at_distances(3, None)]) == (EVERYTHING,)


def test_bands_that_do_not_meet_stay_apart():
    bands = (Band.at_distances(0, 3), Band(BEGINNING, Edge(2, 1, 4)))
    assert join_equal(bands) == bands
    assert bands[1].key_positions == TRUE_POSITIONS


def test_a_wide_band_costs_no_memory():
    assert Band.at_distances(0, 1 << 45).largest_relative_position(1 << 48) == (1 << 45) - 1


def test_only_true_positions_on_both_sides_are_true():
    assert EVERYTHING.is_true
    assert not Band(BEGINNING, PAST_QUERY, Grouped(2)).is_true
    assert not Band(BEGINNING, PAST_QUERY, TRUE_POSITIONS, Constant(0)).is_true


@pytest.mark.parametrize("length", [1, 5, 6, 30])
def test_a_band_without_a_period_may_go_on_to_the_start_of_the_text(length):
    groups = LogisticGroups(5, 1.0)
    band = Band.at_distances(3, None, Logistic(groups, origin=3, shift=3), Logistic(groups))
    assert band.largest_relative_position(length) == (-1 if length < 4 else 3 + groups_before(length - 4))


def groups_before(token):
    """Index of the group of a token for capacity 5 and rate 1: groups of 1, 2, 3, then 4 tokens."""
    return [0, 1, 1, 2, 2, 2][token] if token < 6 else 3 + (token - 6) // 4
