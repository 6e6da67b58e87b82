# SPDX-License-Identifier: Apache-2.0
"""Means, differences, and how far they may be off by chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import mul
from statistics import NormalDist, fmean

_Z = NormalDist().inv_cdf(0.975)
# By so many standard errors more than half an interval a true difference must be off for four of five to find it.
_POWER = NormalDist().inv_cdf(0.8)
# Fewer clusters than this tell nothing of how far they spread, and where fewer hold all successes, or all failures, so
# do the others.
_LEAST = 3

Interval = tuple[float, float]
# Names of what was sampled that each value is one of, such as a book or a document; None where each is by itself.
Clusters = Sequence[str] | None


@dataclass(frozen=True)
class Estimate:
    """A mean of `count` values, and its 95% confidence interval; None where there are too few values for one, or all
    are alike.

    Attributes:
        clusters: what was sampled: of values that share a document, the documents.
        quantile: standard errors in half the interval.
        error: square of the standard error, and its degrees of freedom; None as above. For averages of means.
    """

    mean: float
    count: int
    clusters: int
    interval: Interval | None
    quantile: float = _Z
    error: tuple[float, float] | None = None

    def holds(self, value: float) -> bool:
        """Whether it may be this by chance; where that is not known, it may."""
        return self.interval is None or self.interval[0] <= value <= self.interval[1]


def estimate(values: Sequence[float], proportion: bool, clusters: Clusters = None) -> Estimate | None:
    """Of no values None.

    The standard error is that of clusters (Bell and McCaffrey, Survey Methodology 28, 2002: CR2 and its degrees of
    freedom; Miller, arXiv 2411.00640, section 2.2), which of values that are clusters themselves is the usual one.

    Args:
        proportion: each value is 0 or 1.
    """
    if not values:
        return None
    sums, counts = _by_cluster(clusters, values, [1.0] * len(values))
    mean, error = _ratio(sums, counts)
    interval = _proportion(mean, _effective(sums, counts), counts) if proportion else _from_student(mean, error)
    return Estimate(mean, len(values), len(sums), interval, _quantile(error), error)


def difference(
    mine: Sequence[float], theirs: Sequence[float], proportion: bool, clusters: Clusters = None
) -> Estimate | None:
    """Mean difference of pairs, one of each; of none None.

    The interval is Student's of the differences, by clusters, as Miller advises for evaluations (arXiv 2411.00640,
    sections 2.2 and 4), or `newcombe`'s where all is 0 or 1.
    """
    apart = [my - their for my, their in zip(mine, theirs, strict=True)]
    its = estimate(apart, False, clusters)
    if its is None or not proportion:
        return its
    # Newcombe's own has no degrees of freedom.
    quantile = _Z if its.clusters == its.count else its.quantile
    return replace(its, interval=newcombe(mine, theirs, clusters), quantile=quantile)


def average(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of means, each of which counts as much as any other, however many values it is of.

    The interval is that of a stratified mean, with Satterthwaite's degrees of freedom (Cochran, Sampling Techniques,
    1977, section 5.4).
    """
    mean = fmean(one.mean for one in estimates)
    its = Estimate(mean, sum(one.count for one in estimates), sum(one.clusters for one in estimates), None)
    errors = [one.error for one in estimates if one.error is not None]
    square = math.fsum(error for error, _ in errors)
    if len(errors) < len(estimates) or square == 0:
        return its
    freedom = square**2 / math.fsum(error**2 / its for error, its in errors)
    error = square / len(errors) ** 2, max(2, math.floor(freedom))
    return replace(its, interval=_from_student(mean, error), quantile=_quantile(error))


def pooled(sums: Sequence[float], weights: Sequence[float], clusters: Clusters = None) -> Estimate | None:
    """exp(sum of the sums / sum of the weights): perplexity over all tokens of several texts. Of none None.

    The interval is that of a ratio of sums over texts, or over clusters of them, as that of `estimate`.
    """
    if not sums:
        return None
    count = len(sums)
    sums, weights = _by_cluster(clusters, sums, weights)
    ratio, error = _ratio(sums, weights)
    interval = _from_student(ratio, error)
    interval = interval and (_exp(interval[0]), _exp(interval[1]))
    return Estimate(_exp(ratio), count, len(sums), interval, _quantile(error))


def power(its: Estimate, apart: float, ratio: bool) -> tuple[float, float] | None:
    """What a difference can tell: the least true one that four of five such experiments would tell from none; and of
    how many examples, sampled as these were, they would tell one of `apart`. None where its interval is not known.

    Args:
        ratio: it is one, and so is `apart`.
    """
    if its.interval is None or (ratio and not 0 < its.interval[0] <= its.interval[1] < math.inf):
        return None
    low, high = map(math.log, its.interval) if ratio else its.interval
    error = (high - low) / 2 / its.quantile
    least, sought = (its.quantile + _POWER) * error, math.log(apart) if ratio else apart
    return math.exp(least) if ratio else least, its.count * ((its.quantile + _POWER) * error / sought) ** 2


def wilson(successes: float, count: float, quantile: float = _Z) -> Interval:
    """95% score interval of a proportion (E. B. Wilson, JASA 22, 1927; Brown, Cai and DasGupta, 2001, eq. 4).

    Unlike the mean and its standard error it stays within 0 and 1, and has a width where all or none succeeded.
    """
    share, square = successes / count, quantile**2
    middle = (share + square / (2 * count)) / (1 + square / count)
    half = quantile / (1 + square / count) * math.sqrt(share * (1 - share) / count + square / (4 * count**2))
    # At the ends exactly 0 and 1, but for rounding.
    return 0.0 if successes == 0 else middle - half, 1.0 if successes == count else middle + half


def newcombe(mine: Sequence[float], theirs: Sequence[float], clusters: Clusters = None) -> Interval:
    """95% interval of the difference of two proportions of the same examples, from both score intervals and how much
    the two go together (R. G. Newcombe, Statistics in Medicine 17, 1998, pages 2635 to 2650, method 10; the same of
    the intervals of clusters: G. Y. Zou and A. Donner, Statistics in Medicine 27, 2008).

    Unlike Student's it has a width where both gave the same on every example.
    """
    my_sums, their_sums, counts = _by_cluster(clusters, mine, theirs, [1.0] * len(mine))
    my_share, their_share = fmean(mine), fmean(theirs)
    ours, others = _effective(my_sums, counts), _effective(their_sums, counts)
    # Where one tells nothing of how alike those of a cluster are, the other does.
    my_low, my_high = _proportion(my_share, ours or others, counts)
    their_low, their_high = _proportion(their_share, others or ours, counts)
    together = _phi(mine, theirs) if len(counts) == len(mine) else _correlation(my_sums, their_sums, counts)

    def half(my_end: float, their_end: float) -> float:
        mine, theirs = abs(my_share - my_end), abs(their_share - their_end)
        return math.sqrt(max(mine**2 - 2 * together * mine * theirs + theirs**2, 0.0))

    apart = my_share - their_share
    return apart - half(my_low, their_high), apart + half(my_high, their_low)


def _phi(mine: Sequence[float], theirs: Sequence[float]) -> float:
    """Newcombe's, which is nearer to 0 than the correlation itself."""
    count = len(mine)
    both = sum(my == their == 1 for my, their in zip(mine, theirs, strict=True))
    my_sum, their_sum = round(sum(mine)), round(sum(theirs))
    mine_alone, theirs_alone = my_sum - both, their_sum - both
    margins = my_sum * (count - my_sum) * their_sum * (count - their_sum)
    product = both * (count - both - mine_alone - theirs_alone) - mine_alone * theirs_alone
    return (max(product - count / 2, 0) if product > 0 else product) / math.sqrt(margins) if margins else 0.0


def _correlation(mine: Sequence[float], theirs: Sequence[float], counts: Sequence[float]) -> float:
    """Of two shares, from how they go together over the clusters."""
    if len(counts) < _LEAST:
        return 0.0
    total = math.fsum(counts)
    lefts = []
    for sums in (mine, theirs):
        share = math.fsum(sums) / total
        lefts.append([(one - share * its) / math.sqrt(1 - its / total) for one, its in zip(sums, counts, strict=True)])
    squares = _dot(lefts[0], lefts[0]) * _dot(lefts[1], lefts[1])
    return _dot(*lefts) / math.sqrt(squares) if squares else 0.0


def _effective(sums: Sequence[float], counts: Sequence[float]) -> tuple[float, float] | None:
    """So many values would, each by itself, tell as much of a share as the clusters do, and standard errors in half
    its interval: Rao and Scott's effective count (Biometrics 48, 1992) with Student's t (Dean and Pagano, Journal of
    Survey Statistics and Methodology 3, 2015). None where successes, or failures, are in so few clusters that their
    spread tells nothing."""
    count = math.fsum(counts)
    if len(counts) == count:
        return count, _Z
    share, error = _ratio(sums, counts)
    mixed = min(sum(one > 0 for one in sums), sum(one < its for one, its in zip(sums, counts, strict=True)))
    if error is None or mixed < _LEAST:
        return None
    return share * (1 - share) / max(error[0], share * (1 - share) / count), _student(error[1])


def _proportion(share: float, effective: tuple[float, float] | None, counts: Sequence[float]) -> Interval:
    """The score interval of an effective count; where that is not known, the values of a cluster count as one."""
    count, quantile = effective or (math.fsum(counts) ** 2 / _dot(counts, counts), _Z)
    return wilson(share * count, count, quantile)


def _by_cluster(clusters: Clusters, *columns: Sequence[float]) -> list[list[float]]:
    """The sums of each column, a cluster each."""
    if clusters is None:
        return [list(column) for column in columns]
    places = {name: place for place, name in enumerate(dict.fromkeys(clusters))}
    sums = [[0.0] * len(places) for _ in columns]
    for place, *values in zip(map(places.__getitem__, clusters), *columns, strict=True):
        for column, value in zip(sums, values, strict=True):
            column[place] += value
    return sums


def _ratio(sums: Sequence[float], weights: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """The sum of the sums over that of the weights, of clusters; the square of its standard error, and its degrees of
    freedom, which of clusters of one weight are one less than there are."""
    total = math.fsum(weights)
    ratio = math.fsum(sums) / total
    if len(sums) < _LEAST:
        return ratio, None
    shares = [weight / total for weight in weights]
    # What is left of 1, also of a weight beside which the others are lost in rounding.
    rests = [max(1 - share, 1e-9) for share in shares]
    square = math.fsum(((one - ratio * its) / total) ** 2 / rest
                       for one, its, rest in zip(sums, weights, rests, strict=True))  # fmt: skip
    parts = [share**2 / rest for share, rest in zip(shares, rests, strict=True)]
    spread = _dot(shares, shares) + max(math.fsum(parts) ** 2 - _dot(parts, parts), 0.0)
    return ratio, (square, max(1.0, 1 / spread))


def _dot(one: Sequence[float], other: Sequence[float]) -> float:
    return math.fsum(map(mul, one, other))


def _from_student(mean: float, error: tuple[float, float] | None) -> Interval | None:
    """None too where all are alike, but for rounding: that they are here does not say that others are."""
    if error is None or error[0] <= (1e-9 * mean) ** 2:
        return None
    half = _quantile(error) * math.sqrt(error[0])
    return mean - half, mean + half


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def _quantile(error: tuple[float, float] | None) -> float:
    return _Z if error is None else _student(error[1])


def _student(freedom: float) -> float:
    """97.5% point of Student's t."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 0.975))
