# SPDX-License-Identifier: Apache-2.0
import math

import numpy
import pytest
import scipy.stats

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
    assert (alike.mean, alike.interval) == (pytest.approx(math.exp(2)), None)
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


def clusters_of(sizes):
    """A name for each value of so many clusters, one after the other."""
    return [f"c{number}" for number, size in enumerate(sizes) for _ in range(size)]


def test_values_that_are_clusters_themselves_are_as_usual():
    values = [0.3, 1.9, 0.4, 2.2, 5.0]
    apart = estimates.estimate(values, False, list("abcde"))
    assert apart == estimates.estimate(values, False)
    theirs = scipy.stats.ttest_1samp(values, 0).confidence_interval()
    assert apart.interval == pytest.approx(tuple(theirs))
    shares = [1.0, 1.0, 0.0, 1.0]
    assert estimates.estimate(shares, True, list("abcd")) == estimates.estimate(shares, True)
    theirs = scipy.stats.binomtest(3, 4).proportion_ci(method="wilson")
    assert estimates.estimate(shares, True).interval == pytest.approx(tuple(theirs))


def test_clusters_of_one_size_tell_as_much_as_their_means():
    means = [1.0, 4.0, 2.5, 3.0]
    values = [mean + off for mean in means for off in (-0.5, 0.0, 0.5)]
    its = estimates.estimate(values, False, clusters_of([3] * 4))
    assert its.interval == pytest.approx(estimates.estimate(means, False).interval)
    assert (its.count, its.clusters) == (12, 4)


def cr2(values, sizes):
    """Standard error and degrees of freedom of a mean, as Bell and McCaffrey have them: by matrices."""
    count, ends = len(values), numpy.cumsum(sizes)
    left = numpy.array(values) - numpy.mean(values)
    hat, square, parts = numpy.full((count, count), 1 / count), 0.0, []
    for begin, end in zip(ends - sizes, ends, strict=True):
        spread, vectors = numpy.linalg.eigh(numpy.eye(end - begin) - hat[begin:end, begin:end])
        adjusted = (vectors * spread**-0.5) @ vectors.T @ numpy.ones(end - begin) / count
        square += (adjusted @ left[begin:end]) ** 2
        parts.append((numpy.eye(count) - hat)[:, begin:end] @ adjusted)
    among = numpy.array(parts) @ numpy.array(parts).T
    return math.sqrt(square), numpy.trace(among) ** 2 / numpy.sum(among**2)


@pytest.mark.parametrize("sizes", [[1, 2, 3, 7], [5] * 6, [20, 1, 1, 1], [2, 9, 4, 4, 1, 1]])
def test_clusters_of_unequal_size_against_matrices(sizes):
    values = numpy.random.default_rng(0).normal(size=sum(sizes)).tolist()
    error, freedom = cr2(values, numpy.array(sizes))
    its = estimates.estimate(values, False, clusters_of(sizes))
    assert its.error == pytest.approx((error**2, freedom))


@pytest.mark.parametrize("share", [0.5, 0.8, 0.95])
@pytest.mark.parametrize(("count", "alike"), [(10, 0.05), (10, 0.6), (80, 0.6)])
def test_shares_in_clusters_hold_the_true_one(share, count, alike):
    """The true share lies in 95% of the intervals, or a few more; in those of values by themselves in far fewer."""
    chance = numpy.random.default_rng(1)
    names, beta = clusters_of([5] * count), (1 - alike) / alike
    found = []
    for _ in range(400):
        its = chance.beta(share * beta, (1 - share) * beta, count).repeat(5)
        values = (chance.random(5 * count) < its).astype(float).tolist()
        found.append([estimates.estimate(values, True, each).holds(share) for each in (names, None)])
    clustered, alone = numpy.mean(found, axis=0)
    assert 0.92 <= clustered <= 1
    assert alone < 0.88 or alike < 0.5


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_means_of_clusters_of_unequal_size_hold_the_true_one(spread):
    chance = numpy.random.default_rng(2)
    sizes = [1, 2, 3, 4, 5, 8, 12, 20]
    names = clusters_of(sizes)
    held = []
    for _ in range(600):
        values = chance.normal(size=sum(sizes)) + numpy.repeat(chance.normal(scale=spread, size=len(sizes)), sizes)
        held.append(estimates.estimate(values.tolist(), False, names).holds(0))
    assert 0.92 <= numpy.mean(held) <= 0.985


def test_differences_in_clusters_hold_the_true_one():
    """Where both methods find what is easy; and where both are the same, one experiment in twenty tells otherwise.

    The mean of what is spread as beta(1/2, 1/2) is 1/2, that of its root 2 / pi.
    """
    chance = numpy.random.default_rng(3)
    names = clusters_of([5] * 16)
    held, told = [], []
    for _ in range(400):
        easy = chance.beta(0.5, 0.5, 16).repeat(5)
        theirs, mine, same = ((chance.random(80) < one).astype(float).tolist() for one in (easy, easy**0.5, easy))
        held.append(estimates.difference(mine, theirs, True, names).holds(2 / math.pi - 0.5))
        told.append(not estimates.difference(same, theirs, True, names).holds(0))
    assert 0.92 <= numpy.mean(held) <= 0.995
    assert numpy.mean(told) <= 0.08


@pytest.mark.parametrize("alike", [0.1, 0.6])
def test_differences_to_a_method_that_finds_nothing_hold_the_true_one(alike):
    chance = numpy.random.default_rng(6)
    names, beta = clusters_of([5] * 20), (1 - alike) / alike
    held = []
    for _ in range(400):
        its = chance.beta(0.3 * beta, 0.7 * beta, 20).repeat(5)
        mine = (chance.random(100) < its).astype(float).tolist()
        held.append(estimates.difference(mine, [0.0] * 100, True, names).holds(0.3))
    assert 0.92 <= numpy.mean(held) <= 0.995


def test_ratios_over_books_hold_the_true_one():
    chance = numpy.random.default_rng(4)
    held = []
    for _ in range(400):
        books = chance.normal(0.1, 0.05, 15)
        windows = books.repeat(4) + chance.normal(scale=0.02, size=60)
        weights = chance.integers(200, 300, 60)
        its = estimates.pooled((windows * weights).tolist(), weights.tolist(), clusters_of([4] * 15))
        held.append(its.holds(math.exp(0.1)))
    assert 0.92 <= numpy.mean(held) <= 0.985


@pytest.mark.parametrize("right", [0.0, 1.0])
def test_all_right_or_all_wrong_tells_no_more_than_the_clusters(right):
    its = estimates.estimate([right] * 50, True, clusters_of([5] * 10))
    assert its.interval == estimates.wilson(10 * right, 10)
    # One that is otherwise, or those of two clusters, do not make it surer.
    for few in (1, 5, 10):
        values = [1 - right] * few + [right] * (50 - few)
        other = estimates.estimate(values, True, clusters_of([5] * 10)).interval
        assert other[1] - other[0] >= its.interval[1] - its.interval[0]
    alike = estimates.difference([right] * 50, [right] * 50, True, clusters_of([5] * 10))
    assert (alike.mean, alike.holds(0.2), alike.holds(0.5)) == (0, True, False)


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_values_that_are_all_alike_do_not_say_that_others_are(value):
    its = estimates.estimate([value] * 30, False)
    assert (its.interval, its.holds(0.5)) == (None, True)
    none = estimates.difference([value] * 30, [value] * 30, False)
    assert (none.mean, none.interval) == (0, None)
    # In an average with others it is one mean that is known.
    other = estimates.estimate([0.1, 0.2, 0.3, 0.4], False)
    assert estimates.average([its, other]).interval is not None


def test_one_cluster_tells_nothing_of_others():
    assert estimates.estimate([1.0, 2.0, 4.0], False, ["a"] * 3).interval is None
    assert estimates.pooled([1.0, 2.0, 4.0], [1.0] * 3, ["a"] * 3).interval is None
    assert estimates.estimate([1.0, 1.0, 0.0], True, ["a"] * 3).interval == pytest.approx(estimates.wilson(2 / 3, 1))
    assert estimates.difference([2.0, 3.0, 4.0], [0.0] * 3, False, ["a"] * 3).holds(0)
    assert estimates.difference([1.0] * 3, [0.0] * 3, True, ["a"] * 3).holds(0)


def test_a_cluster_beside_which_others_are_lost():
    for weights in ([1e12, 1.0, 1.0], [1.0, 1e-12, 1e-12]):
        its = estimates.pooled([2 * weights[0], weights[1], 3 * weights[2]], weights, list("abc"))
        assert its.mean == pytest.approx(math.exp(2))
        assert its.holds(its.mean)


@pytest.mark.parametrize("apart", [0.5, 0.2])
def test_the_power_that_is_told_is_the_one_there_is(apart):
    """Of experiments of as many examples as it says, four of five tell the difference; of such as were asked, the least
    one that it says."""
    chance = numpy.random.default_rng(5)

    def asked(count, true):
        values = chance.normal(true, 1.0, count)
        return estimates.difference(values.tolist(), [0.0] * count, False)

    first = asked(60, 0.0)
    least, enough = estimates.power(first, apart, ratio=False)
    assert least == pytest.approx(2.86 / math.sqrt(60), rel=0.2)  # 2.00 + 0.84 standard errors
    for count, true in ((round(enough), apart), (60, least)):
        told = numpy.mean([not asked(count, true).holds(0) for _ in range(600)])
        assert 0.65 < told < 0.92  # the spread is that of one experiment


def test_power_is_not_known_where_the_spread_is_not():
    assert estimates.power(estimates.estimate([1.0, 2.0], False), 0.05, ratio=False) is None
    assert estimates.power(estimates.estimate([0.0] * 9, False), 0.05, ratio=False) is None
    assert estimates.power(estimates.pooled([1e6, 1.0, 3.0], [1.0] * 3), 1.05, ratio=True) is None
