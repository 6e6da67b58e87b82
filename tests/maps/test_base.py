import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ropewalk.maps import Band
from ropewalk.maps.base import join_equal
from ropewalk.maps.positions import TRUE_POSITIONS, Constant, Grouped, Logistic, LogisticGroups


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 20), st.integers(1, 25), st.integers(1, 9), st.integers(0, 40), st.integers(1, 70))
def test_largest_relative_position_of_a_band_with_an_end(first, width, size, start, length):
    """Texts that end before, inside and after the band."""
    stop = first + width
    band = Band(first, stop, Grouped(size, shift=3), Grouped(size))
    positions = [m // size + 3 - n // size for m in range(start, length) for n in range(m + 1) if first <= m - n < stop]
    assert band.largest_relative_position(length, start) == max(positions, default=-1)


def test_a_band_past_the_text_is_empty():
    assert Band(10, None).largest_relative_position(10) == -1
    assert Band(10, None).largest_relative_position(11) == 10


def test_a_wide_band_costs_no_memory():
    assert Band(0, 1 << 45).largest_relative_position(1 << 48) == (1 << 45) - 1


def test_only_true_positions_on_both_sides_are_true():
    assert Band(0, 4).is_true
    assert not Band(0, 4, Grouped(2)).is_true
    assert not Band(0, 4, TRUE_POSITIONS, Constant(0)).is_true


def test_join_equal_merges_neighbors_and_drops_what_is_empty():
    groups = Logistic(LogisticGroups(5, 1.0))
    bands = [Band(0, 4), Band(4, 4, Grouped(2)), Band(4, 7), Band(7, None, groups, groups)]
    assert join_equal(bands) == (Band(0, 7), Band(7, None, groups, groups))
    assert join_equal([Band(0, 7), Band(7, None)]) == (Band(0, None),)


@pytest.mark.parametrize("length", [1, 5, 6, 30])
def test_a_band_without_a_period_may_go_on_to_the_start_of_the_text(length):
    groups = LogisticGroups(5, 1.0)
    band = Band(3, None, Logistic(groups, origin=3, shift=3), Logistic(groups))
    assert band.largest_relative_position(length) == (-1 if length < 4 else 3 + groups_before(length - 4))


def groups_before(token):
    """Index of the group of a token for capacity 5 and rate 1: groups of 1, 2, 3, then 4 tokens."""
    return [0, 1, 1, 2, 2, 2][token] if token < 6 else 3 + (token - 6) // 4
