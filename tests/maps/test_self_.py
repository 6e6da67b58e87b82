# SPDX-License-Identifier: Apache-2.0
from typing import get_args

import pytest
import torch
from loops import released_group_of

from ropewalk import SELF
from ropewalk.maps import LengthError
from ropewalk.maps.positions import LogisticGroups, ReleasedGroups
from ropewalk.maps.self_ import Grouping

# capacity 5, rate 1: 5 / (1 + 4 exp(-j)) = 1.00, 2.02, 3.24, 4.17, 4.66, ... so groups of 1, 2, 3, 4, 4, ... tokens:
# 0 | 1 2 | 3 4 5 | 6 7 8 9 | 10 11 12 13 | ...
#
# Far keys of query m are at 3 + g(m - 3) - g(n), with g = 0, 1, 1, 2, 2, 2, 3, 3, 3, 3.
ANCHORED = [
    [0],
    [1, 0],
    [2, 1, 0],
    [3, 2, 1, 0],
    [4, 3, 2, 1, 0],
    [4, 3, 3, 2, 1, 0],
    [5, 4, 4, 3, 2, 1, 0],
    [5, 4, 4, 3, 3, 2, 1, 0],
    [5, 4, 4, 3, 3, 3, 2, 1, 0],
    [6, 5, 5, 4, 4, 4, 3, 2, 1, 0],
]
# By distance, past the window of 3: distance 3 alone, 4-5 in twos (m // 2 + 2 - n // 2), 6-8 in threes
# (m // 3 + 3 - n // 3), 9-12 in fours (m // 4 + 4 - n // 4).
BY_DISTANCE = [
    [0],
    [1, 0],
    [2, 1, 0],
    [3, 2, 1, 0],
    [4, 3, 2, 1, 0],
    [4, 4, 3, 2, 1, 0],
    [5, 5, 4, 3, 2, 1, 0],
    [5, 5, 4, 4, 3, 2, 1, 0],
    [5, 5, 5, 5, 4, 3, 2, 1, 0],
    [6, 6, 6, 5, 4, 4, 3, 2, 1, 0],
]


# The same with the authors' table, as their kernel wrote it: g = 0, 0, 1, 1, 2, 2, 2, 3, 3, 3.
RELEASED = [
    [0],
    [1, 0],
    [2, 1, 0],
    [3, 2, 1, 0],
    [3, 3, 2, 1, 0],
    [4, 4, 3, 2, 1, 0],
    [4, 4, 3, 3, 2, 1, 0],
    [5, 5, 4, 4, 3, 2, 1, 0],
    [5, 5, 4, 4, 3, 3, 2, 1, 0],
    [5, 5, 4, 4, 3, 3, 3, 2, 1, 0],
]


@pytest.mark.parametrize(
    ("grouping", "rows"), [("anchored", ANCHORED), ("distance", BY_DISTANCE), ("released", RELEASED)]
)
def test_groups_worked_out_by_hand(grouping, rows):
    expected = [row + [-1] * (10 - len(row)) for row in rows]
    assert SELF(capacity=5, rate=1.0, window=3, grouping=grouping).relative_positions(10).tolist() == expected


def test_released_groups_lag_a_token_behind():
    tokens = torch.arange(100_000)
    lagging = LogisticGroups(33, 0.02)((tokens - 1).clamp(min=0))
    assert torch.equal(ReleasedGroups(33, 0.02)(tokens), lagging)


def test_released_groups_leave_out_sizes_where_the_curve_is_steep():
    """What the authors' kernel wrote for a capacity of 33 and a rate of 0.2, where the formula has 13, 17, 22, ..."""
    tokens = torch.tensor([0, 1, 50, 100, 200, 400, 700, 1000, 2999])
    assert ReleasedGroups(33, 0.2)(tokens).tolist() == [0, 0, 14, 21, 26, 33, 42, 52, 114]
    # With a rate of 4 all groups but the first are of the largest size, and no token is in the first but its own.
    assert ReleasedGroups(33, 4.0)(torch.tensor([0, 1, 32, 33])).tolist() == [0, 2, 2, 3]


@pytest.mark.parametrize(
    ("capacity", "rate"), [(33, 0.02), (33, 0.2), (33, 4.0), (5, 1.0), (2, 0.5), (3, 0.1), (60, 0.5)]
)
def test_released_groups_are_those_of_a_loop_over_passes(capacity, rate):
    tokens = torch.arange(0, 2_000, 7)
    expected = [released_group_of(capacity, rate, token) for token in tokens.tolist()]
    assert ReleasedGroups(capacity, rate)(tokens).tolist() == expected


def test_by_distance_has_one_band_a_group_size():
    bands = SELF(capacity=5, rate=1.0, window=3, grouping="distance").bands
    # Size 1 is the true distance, so it joins the neighbors.
    assert [band.distances for band in bands] == [(0, 4), (4, 6), (6, 9), (9, None)]
    assert [band.query_positions.formula("m") for band in bands] == ["m", "m // 2 + 2", "m // 3 + 3", "m // 4 + 4"]
    assert [band.key_positions.formula("n") for band in bands] == ["n", "n // 2", "n // 3", "n // 4"]


@pytest.mark.parametrize("grouping", get_args(Grouping))
def test_released_defaults_reach_far(grouping):
    released = SELF(capacity=33, rate=0.02, window=1024, grouping=grouping)
    assert released.max_length(4096) > 80_000
    assert released.largest_relative_position(released.max_length(4096)) == 4095


@pytest.mark.parametrize("trained_window", [512, 1024])
def test_for_length_takes_the_smallest_capacity_that_keeps_the_rule(trained_window):
    window = trained_window // 8
    reaches = {c: SELF(capacity=c, window=window).recommended_length(trained_window) for c in range(2, 40)}
    assert list(reaches.values()) == sorted(reaches.values())
    for target_length in {1, trained_window, *(reaches[c] + step for c in (2, 3, 7, 30) for step in (0, 1))}:
        smallest = min(c for c, reach in reaches.items() if reach >= target_length)
        chosen = SELF.for_length(target_length, trained_window)
        assert chosen == SELF(capacity=smallest, window=window)


def test_for_length_says_how_far_it_reaches():
    with pytest.raises(LengthError, match=r"10000 tokens on a trained window of 64: at best SELF\(.*\) reaches \d+ "):
        SELF.for_length(10_000, 64)
