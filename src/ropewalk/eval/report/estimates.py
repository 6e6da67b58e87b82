"""Means, and how far they may be off by chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

_Z = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Estimate:
    """A mean of `count` values, and its 95% confidence interval; None where there are too few values for one."""

    mean: float
    count: int
    interval: tuple[float, float] | None

    def overlaps(self, other: Estimate) -> bool:
        """Whether the intervals have a point in common, or one is not known."""
        if self.interval is None or other.interval is None:
            return True
        return self.interval[0] <= other.interval[1] and other.interval[0] <= self.interval[1]


def estimate(values: Sequence[float], proportion: bool) -> Estimate | None:
    """Of no values None.

    Args:
        proportion: each value is 0 or 1.
    """
    if not values:
        return None
    count, mean = len(values), fmean(values)
    if proportion:
        return Estimate(mean, count, wilson(round(sum(values)), count))
    if count < 3:
        return Estimate(mean, count, None)
    half = _student(count - 1) * stdev(values) / math.sqrt(count)
    return Estimate(mean, count, (mean - half, mean + half))


def pooled(sums: Sequence[float], weights: Sequence[float]) -> Estimate | None:
    """exp(sum of the sums / sum of the weights): perplexity over all tokens of several texts. Of none None.

    The interval is that of a ratio of sums over texts (Cochran, Sampling Techniques, 1977, section 6.3).
    """
    if not sums:
        return None
    count, weight = len(sums), math.fsum(weights)
    ratio = math.fsum(sums) / weight
    if count < 3:
        return Estimate(math.exp(ratio), count, None)
    left = math.fsum((one - ratio * its) ** 2 for one, its in zip(sums, weights, strict=True))
    half = _student(count - 1) * math.sqrt(count / (count - 1) * left) / weight
    return Estimate(math.exp(ratio), count, (math.exp(ratio - half), math.exp(ratio + half)))


def wilson(successes: int, count: int) -> tuple[float, float]:
    """95% score interval of a proportion (E. B. Wilson, JASA 22, 1927; Brown, Cai and DasGupta, 2001, eq. 4).

    Unlike the mean and its standard error it stays within 0 and 1, and has a width where all or none succeeded.
    """
    share, square = successes / count, _Z**2
    middle = (share + square / (2 * count)) / (1 + square / count)
    half = _Z / (1 + square / count) * math.sqrt(share * (1 - share) / count + square / (4 * count**2))
    # At the ends exactly 0 and 1, but for rounding.
    return 0.0 if successes == 0 else middle - half, 1.0 if successes == count else middle + half


def _student(freedom: float) -> float:
    """97.5% point of Student's t (Abramowitz and Stegun, 26.7.5); 1% low at two degrees of freedom, exact above."""
    z = _Z
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + math.fsum(term / freedom**power for power, term in enumerate(terms, start=1))
