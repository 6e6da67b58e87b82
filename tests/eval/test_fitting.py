# SPDX-License-Identifier: Apache-2.0
import random

import pytest

from ropewalk.eval.fitting import most_that_fit


def sums_of(units, around):
    """Tokens of so many of the units, and the numbers that were asked for."""
    asked = []

    def tokens(number):
        asked.append(number)
        return around + sum(units[:number])

    return tokens, asked


@pytest.mark.parametrize("guess", [0, 1, 32, 10_000])
@pytest.mark.parametrize("limit", [7, 8, 50, 500, 5000, 10**6])
@pytest.mark.parametrize("seed", range(4))
def test_it_is_the_largest_number_that_fits(seed, limit, guess):
    units = [random.Random(f"{seed} {i}").randint(1, 1 + 20 * seed) for i in range(300)]
    tokens, _ = sums_of(units, around=7)
    expected = max(number for number in range(len(units) + 1) if 7 + sum(units[:number]) <= limit)
    assert most_that_fit(tokens, limit, len(units), guess, least=7) == expected


@pytest.mark.parametrize("limit", [1024, 16384, 131072])
def test_units_that_are_alike_are_counted_a_few_times(limit):
    units = [23] * limit
    tokens, asked = sums_of(units, around=60)
    assert most_that_fit(tokens, limit, len(units), 32, least=60) == (limit - 60) // 23
    assert len(asked) <= 4
    # The first, which is far off, is not counted at length.
    assert asked[0] == 32


@pytest.mark.parametrize(
    ("units", "limit"),
    [(list(range(3000)), 10**6), ([1] * 1000 + [1000] * 1000, 2 * 10**5), ([1000] * 1000 + [1] * 1000, 10**6 + 500)],
    ids=["growing", "small then large", "large then small"],
)
def test_units_of_any_size_need_few(units, limit):
    tokens, asked = sums_of(units, around=5)
    number = most_that_fit(tokens, limit, len(units), 32, least=5)
    assert 5 + sum(units[:number]) <= limit < 5 + sum(units[: number + 1])
    assert len(asked) < 40


def test_nothing_is_there():
    tokens, asked = sums_of([], around=5)
    assert most_that_fit(tokens, 10, 0, 32, least=5) == 0
    assert asked == []
