from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Self, get_args

from ropewalk.maps.base import Band, PositionMap, _require, default_window, join_equal
from ropewalk.maps.positions import Grouped, Logistic, LogisticGroups

Grouping = Literal["anchored", "distance"]

# Past this a larger capacity hardly changes a text that any model of today can hold.
_LARGEST_CAPACITY = 1 << 14


@dataclass(frozen=True)
class SELF(PositionMap):
    """SELF (Dang et al. 2025, arXiv 2505.17296): far keys share positions in groups that grow along a logistic curve.

    Group j holds `floor(C / (1 + (C - 1) exp(-r j)))` tokens, from 1 up to C - 1.

    Args:
        capacity: C, one more than the largest group size.
        rate: r, the growth rate of the curve.
        window: W, the neighbor window, in tokens.
        grouping: "anchored" counts groups from the start of the text, as the authors' prefill does: the far key n of
            query m is at `W + g(m - W) - g(n)`. "distance" lets the group size grow with the distance from the query,
            the idea as published: one band a group size.
    """

    name: ClassVar[str] = "self"
    capacity: int = 33
    rate: float = 0.02
    window: int = 1024
    grouping: Grouping = "anchored"

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.capacity >= 2, f"capacity must be 2 or more, got {self.capacity}")
        _require(self.rate > 0, f"rate must be more than 0, got {self.rate}")
        _require(self.window >= 1, f"window must be 1 or more, got {self.window}")
        _require(
            self.grouping in get_args(Grouping),
            f"grouping must be one of {', '.join(get_args(Grouping))}, got {self.grouping!r}",
        )

    @property
    def groups(self) -> LogisticGroups:
        """The group table."""
        return LogisticGroups(self.capacity, self.rate)

    @property
    def bands(self) -> tuple[Band, ...]:
        near = Band(0, self.window)
        if self.grouping == "anchored":
            query_positions = Logistic(self.groups, origin=self.window, shift=self.window)
            return (near, Band(self.window, None, query_positions, Logistic(self.groups)))
        return join_equal((near, *self._bands_by_size()))

    def _bands_by_size(self) -> list[Band]:
        first_tokens = self.groups.first_tokens
        stops = [self.window + token for token in first_tokens[1:]]
        bands = []
        for size, (group, token, stop) in enumerate(
            zip(self.groups.first_groups, first_tokens, [*stops, None], strict=True), start=1
        ):
            first = self.window + token
            # The band starts at the group index that the curve has reached there.
            shift = self.window + group - first // size
            bands.append(Band(first, stop, Grouped(size, shift), Grouped(size)))
        return bands

    @classmethod
    def for_length(cls, target_length: int, trained_window: int) -> Self:
        """The smallest capacity that meets eq. 5, with the published rate and an eighth of the window as neighbors."""
        window = default_window(trained_window)

        def meets(capacity: int) -> bool:
            return cls(capacity=capacity, window=window).recommended_length(trained_window) >= target_length

        capacity = 2
        while capacity < _LARGEST_CAPACITY and not meets(capacity):
            capacity *= 2
        if meets(capacity):  # a larger capacity never shortens the reach: bisect
            low = capacity // 2
            while capacity - low > 1:
                middle = (low + capacity) // 2
                low, capacity = (low, middle) if middle >= 2 and meets(middle) else (middle, capacity)
        return cls(capacity=capacity, window=window)._check_length(target_length, trained_window)
