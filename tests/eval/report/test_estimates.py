# SPDX-License-Identifier: Apache-2.0
import math

import pytest

from ropewalk.eval.report import estimates


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 10, 0, 0.2775), (10, 10, 0.7225, 1), (50, 100, 0.4038, 0.5962), (1, 1, 0.2065, 1)],
)
def test_wilson_against_published_values(successes, count, low, high):
    assert estimates.wilson(successes, count) == pytest.approx((low, high), abs=1e-4)


def test_estimates():
    assert estimates.estimate([], proportion=True) is None
    assert estimates.estimate([2.0, 3.0], proportion=False).interval is None
    some = estimates.estimate([1.0, 2.0, 3.0, 4.0], proportion=False)
    assert some.mean == 2.5
    assert some.interval == pytest.approx((2.5 - 2.054, 2.5 + 2.054), abs=1e-3)  # 3.1824 * 1.2910 / 2


def test_perplexity_is_pooled_over_tokens():
    """Not a mean of perplexities: the longer text counts for more."""
    one = estimates.pooled([2.0, 30.0], [1.0, 10.0])
    assert one.mean == pytest.approx(math.exp(32 / 11))
    assert one.interval is None
    three = estimates.pooled([2.0, 30.0, 9.0], [1.0, 10.0, 3.0])
    assert three.interval[0] < three.mean < three.interval[1]
    alike = estimates.pooled([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert alike.interval == pytest.approx((math.exp(2), math.exp(2)))
    assert estimates.pooled([], []) is None
    assert estimates.pooled([1e6], [1.0]).mean == math.inf


def pairs(both, mine, theirs, neither):
    """Scores of so many examples that both, one or none got right."""
    return [1.0] * (both + mine) + [0.0] * (theirs + neither), (
        [1.0] * both + [0.0] * mine + [1.0] * theirs + [0.0] * neither
    )


@pytest.mark.parametrize(
    ("counts", "low", "high"),
    # The first is of Newcombe's paper; where margins are full the halves are those of Wilson's intervals alone.
    [((36, 12, 2, 0), 0.0569, 0.3404), ((54, 0, 0, 0), -0.0664, 0.0664), ((0, 30, 0, 0), 0.8395, 1.0)],
)
def test_paired_proportions(counts, low, high):
    assert estimates.newcombe(*pairs(*counts)) == pytest.approx((low, high), abs=1e-4)
    mine, theirs = pairs(*counts)
    assert estimates.newcombe(theirs, mine) == pytest.approx((-high, -low), abs=1e-4)


def test_pairs_show_more_than_two_intervals_apart():
    """Hard and easy examples are spread far, but each is a little better."""
    theirs = [float(i) for i in range(20)]
    mine = [value + 0.5 + 0.1 * (i % 2) for i, value in enumerate(theirs)]
    its = estimates.difference(mine, theirs, proportion=False)
    assert its.mean == pytest.approx(0.55)
    assert not its.holds(0)
    alone = [estimates.estimate(values, proportion=False) for values in (mine, theirs)]
    assert alone[0].interval[0] < alone[1].interval[1]
    assert estimates.difference([1.0, 1.0], [0.0, 0.0], proportion=False).holds(0)  # two pairs tell nothing
    assert estimates.difference([], [], proportion=True) is None


def test_every_mean_counts_the_same_in_an_average():
    few = estimates.estimate([0.0, 1.0, 2.0, 3.0], proportion=False)
    many = estimates.estimate([10.0, 12.0] * 20, proportion=False)
    its = estimates.average([few, many])
    assert (its.mean, its.count) == (6.25, 44)
    # Standard errors sqrt(1.6667 / 4) and sqrt(1.0256 / 40); 3.37 degrees of freedom by Satterthwaite, taken as 3.
    half = 3.1824 * math.sqrt(1.6667 / 4 + 1.0256 / 40) / 2
    assert its.interval == pytest.approx((6.25 - half, 6.25 + half), rel=1e-4)
    assert estimates.average([few, estimates.estimate([1.0], proportion=False)]).interval is None
