# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal, Self, get_args

from ropewalk.maps.base import EVERYTHING, Band, PositionMap, _require, at_least, default_window, join_equal
from ropewalk.maps.numbers import whole
from ropewalk.maps.positions import Grouped, Logistic, LogisticGroups, ReleasedGroups

Grouping = Literal["anchored", "distance", "released"]

# Past this a larger capacity hardly changes a text that any model of today can hold, and the table of groups grows.
_LARGEST_CAPACITY = 1 << 14


@dataclass(frozen=True)
class SELF(PositionMap):
    """SELF (Dang et al. 2025, arXiv 2505.17296): far keys share positions in groups that grow along a logistic curve.

    Group j holds `floor(C / (1 + (C - 1) exp(-r j)))` tokens, from 1 up to C - 1.

    Args:
        capacity: C, one more than the largest group size.
        rate: r, the growth rate of the curve.
        window: W, the neighbor window, in tokens.
        grouping: what the groups follow, the text or the distance. "anchored" counts them from the start of the text:
            the far key n of query m is at `W + g(m - W) - g(n)`. "released" is the prefill of the authors' code, the
            same but for its table of groups, which lags a token behind: g(n - 1) in the place of g(n), and larger
            differences where the curve is steep (`ReleasedGroups`). "distance" lets the group size grow with the
            distance from the query, the idea as published: one band a group size.
    """

    name: ClassVar[str] = "self"
    miniature: ClassVar[Mapping[str, Any]] = {"capacity": 5, "rate": 1.0, "window": 3}
    capacity: int = 33
    rate: float = 0.02
    window: int = field(default=1024, metadata=at_least(1))
    grouping: Grouping = "anchored"

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("capacity", self.capacity, at_least=2, at_most=_LARGEST_CAPACITY)
        _require(self.rate > 0, f"rate must be more than 0, got {self.rate}")
        _require(
            self.grouping in get_args(Grouping),
            f"grouping must be one of {', '.join(get_args(Grouping))}, got {self.grouping!r}",
        )

    @cached_property
    def groups(self) -> LogisticGroups:
        """The group table."""
        kind = ReleasedGroups if self.grouping == "released" else LogisticGroups
        return kind(self.capacity, self.rate)

    @cached_property
    def bands(self) -> tuple[Band, ...]:
        near = Band.at_distances(0, self.window)
        if self.grouping == "distance":
            return join_equal((near, *self._bands_by_size()))
        if self.grouping == "anchored" and self.groups.sizes == (1,):
            return (EVERYTHING,)
        query_positions = Logistic(self.groups, origin=self.window, shift=self.window)
        return (near, Band.at_distances(self.window, None, query_positions, Logistic(self.groups)))

    def _bands_by_size(self) -> Iterator[Band]:
        firsts = [self.window + token for token in self.groups.first_tokens]
        for size, group, first, stop in zip(
            self.groups.sizes, self.groups.first_groups, firsts, [*firsts[1:], None], strict=True
        ):
            # The band starts at the group index that the curve has reached there.
            shift = self.window + group - first // size
            yield Band.at_distances(first, stop, Grouped(size, shift), Grouped(size))

    @classmethod
    def examples(cls) -> list[Self]:
        groupings: tuple[Grouping, ...] = get_args(Grouping)
        curves = [(5, 1.0, 3), (9, 0.3, 6), (4, 50.0, 1), (2, 0.5, 3), (33, 0.2, 5)]
        maps = [cls(*curve, grouping) for curve in curves for grouping in groupings]
        return [*maps, cls(33, 0.02, 100), *(cls(6, 0.7, 4, grouping, start=11) for grouping in groupings)]

    @classmethod
    def large_examples(cls) -> list[Self]:
        return [cls(9, 0.05, 100), cls(9, 0.05, 100, "distance"), cls(9, 0.05, 100, "released")]

    @classmethod
    def _for_length(cls, target_length: int, trained_window: int) -> Self:
        """The smallest capacity that meets eq. 5, with the published rate and an eighth of the window as neighbors."""
        window = default_window(trained_window)

        def meets(capacity: int) -> bool:
            return cls(capacity=capacity, window=window).meets_rule(target_length, trained_window)

        # A larger capacity never shortens the reach, so the first that meets the rule is found by bisection.
        capacity = 2 + bisect_left(range(2, _LARGEST_CAPACITY), True, key=meets)
        return cls(capacity=capacity, window=window)
