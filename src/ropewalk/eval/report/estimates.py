# SPDX-License-Identifier: Apache-2.0
"""Means, differences, and how far they may be off by chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist, fmean, variance

_Z = NormalDist().inv_cdf(0.975)
# Fewer values than this tell nothing of how far they spread.
_LEAST = 3

Interval = tuple[float, float]


@dataclass(frozen=True)
class Estimate:
    """A mean of `count` values, and its 95% confidence interval; None where there are too few values for one.

    Attributes:
        error: square of the standard error, and its degrees of freedom; None as above. For averages of means.
    """

    mean: float
    count: int
    interval: Interval | None
    error: tuple[float, int] | None = None

    def holds(self, value: float) -> bool:
        """Whether it may be this by chance; where that is not known, it may."""
        return self.interval is None or self.interval[0] <= value <= self.interval[1]


def estimate(values: Sequence[float], proportion: bool) -> Estimate | None:
    """Of no values None.

    Args:
        proportion: each value is 0 or 1.
    """
    if not values:
        return None
    count, mean, error = len(values), fmean(values), _error(values)
    interval = wilson(round(sum(values)), count) if proportion else _from_student(mean, error)
    return Estimate(mean, count, interval, error)


def difference(mine: Sequence[float], theirs: Sequence[float], proportion: bool) -> Estimate | None:
    """Mean difference of pairs, one of each; of none None.

    The interval is Student's of the differences, as Miller advises for evaluations (arXiv 2411.00640, section 4), or
    `newcombe`'s where all is 0 or 1.
    """
    apart = [my - their for my, their in zip(mine, theirs, strict=True)]
    its = estimate(apart, proportion=False)
    return replace(its, interval=newcombe(mine, theirs)) if its is not None and proportion else its


def average(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of means, each of which counts as much as any other, however many values it is of.

    The interval is that of a stratified mean, with Satterthwaite's degrees of freedom (Cochran, Sampling Techniques,
    1977, section 5.4).
    """
    mean, count = fmean(one.mean for one in estimates), sum(one.count for one in estimates)
    errors = [one.error for one in estimates if one.error is not None]
    square = math.fsum(error for error, _ in errors)
    if len(errors) < len(estimates) or square == 0:
        return Estimate(mean, count, None)
    freedom = square**2 / math.fsum(error**2 / its for error, its in errors)
    return Estimate(mean, count, _from_student(mean, (square / len(errors) ** 2, max(2, math.floor(freedom)))))


def pooled(sums: Sequence[float], weights: Sequence[float]) -> Estimate | None:
    """exp(sum of the sums / sum of the weights): perplexity over all tokens of several texts. Of none None.

    The interval is that of a ratio of sums over texts (Cochran, Sampling Techniques, 1977, section 6.3).
    """
    if not sums:
        return None
    count, weight = len(sums), math.fsum(weights)
    ratio = math.fsum(sums) / weight
    if count < _LEAST:
        return Estimate(_exp(ratio), count, None)
    left = math.fsum((one - ratio * its) ** 2 for one, its in zip(sums, weights, strict=True))
    half = _student(count - 1) * math.sqrt(count / (count - 1) * left) / weight
    return Estimate(_exp(ratio), count, (_exp(ratio - half), _exp(ratio + half)))


def wilson(successes: int, count: int) -> Interval:
    """95% score interval of a proportion (E. B. Wilson, JASA 22, 1927; Brown, Cai and DasGupta, 2001, eq. 4).

    Unlike the mean and its standard error it stays within 0 and 1, and has a width where all or none succeeded.
    """
    share, square = successes / count, _Z**2
    middle = (share + square / (2 * count)) / (1 + square / count)
    half = _Z / (1 + square / count) * math.sqrt(share * (1 - share) / count + square / (4 * count**2))
    # At the ends exactly 0 and 1, but for rounding.
    return 0.0 if successes == 0 else middle - half, 1.0 if successes == count else middle + half


def newcombe(mine: Sequence[float], theirs: Sequence[float]) -> Interval:
    """95% interval of the difference of two proportions of the same examples, from both score intervals and how much
    the two go together (R. G. Newcombe, Statistics in Medicine 17, 1998, pages 2635 to 2650, method 10).

    Unlike Student's it has a width where both gave the same on every example.
    """
    count = len(mine)
    both = sum(my == their == 1 for my, their in zip(mine, theirs, strict=True))
    my_sum, their_sum = round(sum(mine)), round(sum(theirs))
    mine_alone, theirs_alone = my_sum - both, their_sum - both
    neither = count - both - mine_alone - theirs_alone
    (my_low, my_high), (their_low, their_high) = wilson(my_sum, count), wilson(their_sum, count)
    my_share, their_share = my_sum / count, their_sum / count
    margins = my_sum * (count - my_sum) * their_sum * (count - their_sum)
    product = both * neither - mine_alone * theirs_alone
    correlation = (max(product - count / 2, 0) if product > 0 else product) / math.sqrt(margins) if margins else 0.0

    def half(my_end: float, their_end: float) -> float:
        mine, theirs = abs(my_share - my_end), abs(their_share - their_end)
        return math.sqrt(max(mine**2 - 2 * correlation * mine * theirs + theirs**2, 0.0))

    apart = my_share - their_share
    return apart - half(my_low, their_high), apart + half(my_high, their_low)


def _error(values: Sequence[float]) -> tuple[float, int] | None:
    if len(values) < _LEAST:
        return None
    return variance(values) / len(values), len(values) - 1


def _from_student(mean: float, error: tuple[float, int] | None) -> Interval | None:
    if error is None:
        return None
    half = _student(error[1]) * math.sqrt(error[0])
    return mean - half, mean + half


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def _student(freedom: float) -> float:
    """97.5% point of Student's t."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 0.975))
