# SPDX-License-Identifier: Apache-2.0
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import group_of, group_size

from ropewalk.maps.positions import Capped, Constant, Cyclic, Grouped, Logistic, LogisticGroups, Scaled

# (capacity, rate): the released defaults, the evaluation script's, and curves that are slow, steep or finely cut.
CURVES = [(33, 0.02), (16, 0.02), (2, 0.5), (5, 1.0), (1000, 0.5), (4096, 3.0), (7, 1e-6), (3, 40.0)]


@pytest.mark.parametrize(
    ("groups", "sizes", "expected"),
    [
        # 5 / (1 + 4 exp(-j)) = 1.00, 2.02, 3.24, 4.17, 4.66, ...
        (LogisticGroups(5, 1.0), [1, 2, 3, 4, 4, 4], [0, 1, 1, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5]),
        # 3 / (1 + 2 exp(-j/2)) = 1.00, 1.36, 1.73, 2.07, 2.36, ...
        (LogisticGroups(3, 0.5), [1, 1, 1, 2, 2, 2], [0, 1, 2, 3, 3, 4, 4, 5, 5, 6]),
        # 8 / (1 + 7 exp(-4j)) = 1.00, 7.09, 7.98, ...: most sizes never occur
        (LogisticGroups(8, 4.0), [1, 7, 7], [0, 1, 1, 1, 1, 1, 1, 1, 2]),
    ],
)
def test_groups_worked_out_by_hand(groups, sizes, expected):
    assert [groups.size(group) for group in range(len(sizes))] == sizes
    assert groups(torch.arange(len(expected))).tolist() == expected


@pytest.mark.parametrize(("capacity", "rate"), CURVES)
def test_sizes_never_reach_the_capacity(capacity, rate):
    groups = LogisticGroups(capacity, rate)
    # Far along, the quotient is rounded to the capacity itself.
    for group in (*range(100), 10**3, 10**4, 10**6, 10**9, 10**12, 10**15):
        assert 1 <= groups.size(group) <= capacity - 1
    assert max(groups.sizes) <= capacity - 1
    assert groups.size(10**15) == capacity - 1


@pytest.mark.parametrize(("capacity", "rate"), CURVES)
def test_table_says_where_each_size_begins(capacity, rate):
    groups = LogisticGroups(capacity, rate)
    for size, group, token in zip(groups.sizes, groups.first_groups, groups.first_tokens, strict=True):
        assert group_size(capacity, rate, group) == size
        assert group == 0 or group_size(capacity, rate, group - 1) < size
        assert groups(torch.tensor([token])).item() == group
        assert token == 0 or groups(torch.tensor([token - 1])).item() == group - 1


@pytest.mark.parametrize(("capacity", "rate"), CURVES)
def test_the_last_size_is_capacity_less_one_forever(capacity, rate):
    groups = LogisticGroups(capacity, rate)
    size, group, token = groups.sizes[-1], groups.first_groups[-1], groups.first_tokens[-1]
    assert size == capacity - 1
    far = 1 << 33
    expected = group + torch.div(torch.arange(far, far + 3 * size) - token, size, rounding_mode="floor")
    assert torch.equal(groups(torch.arange(far, far + 3 * size)), expected)


@settings(max_examples=80, deadline=None)
@given(st.integers(2, 300), st.floats(1e-3, 20))
def test_closed_form_equals_the_loop(capacity, rate):
    expected = []
    group = 0
    while len(expected) < 400:
        expected.extend([group] * group_size(capacity, rate, group))
        group += 1
    found = LogisticGroups(capacity, rate)(torch.arange(len(expected)))
    assert found.tolist() == expected
    assert found[399].item() == group_of(capacity, rate, 399)


@pytest.mark.parametrize("rate", [1e-300, 1e-18, 1e-12, 1e300])
def test_rates_out_of_all_proportion_end(rate):
    assert LogisticGroups(33, rate)(torch.tensor([0, 1])).tolist() == [0, 1]


def test_a_million_positions_are_fast():
    groups, tokens = LogisticGroups(33, 0.02), torch.arange(1_000_000)
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        groups(tokens)
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 0.5  # milliseconds; the bound is for a machine shared with others


def test_any_shape_and_order_of_tokens():
    groups = LogisticGroups(5, 1.0)
    assert groups(torch.tensor([[9, 0], [3, 10]])).tolist() == [[3, 0], [2, 4]]
    assert Logistic(groups, origin=4, shift=100)(torch.tensor([0, 4, 5, 10])).tolist() == [100, 100, 101, 103]


@pytest.mark.parametrize(
    ("function", "formula"),
    [
        (Grouped(1), "m"),
        (Grouped(8), "m // 8"),
        (Grouped(8, 896), "m // 8 + 896"),
        (Grouped(8, -3), "m // 8 - 3"),
        (Scaled(8.0), "m / 8"),
        (Scaled(2.5, 614.4), "m / 2.5 + 614.4"),
        (Scaled(1.0), "m"),
        (Constant(1024), "1024"),
        (Logistic(LogisticGroups(5, 1.0)), "group(m)"),
        (Logistic(LogisticGroups(5, 1.0), origin=512, shift=512), "group(m - 512) + 512"),
    ],
)
def test_formulas(function, formula):
    assert function.formula("m") == formula


@pytest.mark.parametrize(
    "function",
    [
        Grouped(1),
        Grouped(3, 5),
        Scaled(2.5, 1.0),
        Constant(4),
        Capped(20),
        Cyclic(6),
        Cyclic(6, 6, 9),
        Logistic(LogisticGroups(5, 1.0), 4, 4),
    ],
    ids=str,
)
def test_functions_rise_and_fall_where_they_say(function):
    tokens = torch.arange(1, 60)
    steps = function(tokens) - function(tokens - 1)
    assert (tokens[steps > 0] % function.step == 0).all()
    falls = tokens[steps < 0]
    assert (falls % function.cycle == 0).all() if function.cycle else not falls.numel()


@pytest.mark.parametrize("function", [Grouped(3, 5), Scaled(2.5, 1.0), Constant(4)])
def test_functions_repeat_after_their_period(function):
    tokens = torch.arange(50)
    steps = (function(tokens + function.period) - function(tokens)).double()
    torch.testing.assert_close(steps, steps[:1].expand(50))
