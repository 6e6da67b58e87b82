# SPDX-License-Identifier: Apache-2.0
"""What every position map has: bands, relative positions, and the lengths it can reach."""

from __future__ import annotations

import dataclasses
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ropewalk.maps.edges import BEGINNING, PAST_QUERY, Edge
from ropewalk.maps.numbers import UNBOUNDED, real, whole
from ropewalk.maps.positions import TRUE_POSITIONS, PositionFunction

# How a parameter is checked, by its type as the class writes it.
_RULES: dict[Any, Callable[..., int | float]] = {int: whole, "int": whole, float: real, "float": real}
_LIMITS = "ropewalk.limits"


def at_least(least: int) -> dict[str, Any]:
    """Metadata of a map's parameter (`dataclasses.field`) that must be this or more."""
    return {_LIMITS: {"at_least": least}}


class LengthError(ValueError):
    """A length that a position map cannot reach within the model's trained window."""


@dataclass(frozen=True)
class Band:
    """The keys `low(m) <= n < high(m)` of a query m, and the positions that query and keys are rotated with.

    `score(m, n) = s * <R(query_positions(m)) q_m, R(key_positions(n)) k_n>` with un-rotated q and k.
    """

    low: Edge
    high: Edge
    query_positions: PositionFunction = TRUE_POSITIONS
    key_positions: PositionFunction = TRUE_POSITIONS

    @classmethod
    def at_distances(
        cls,
        first: int,
        stop: int | None,
        query_positions: PositionFunction = TRUE_POSITIONS,
        key_positions: PositionFunction = TRUE_POSITIONS,
    ) -> Self:
        """The keys at distance `first <= m - n < stop`; `stop = None` means all remaining ones."""
        low = BEGINNING if stop is None else Edge(back=stop - 1)
        return cls(low, Edge(back=first - 1), query_positions, key_positions)

    @property
    def distances(self) -> tuple[int, int | None] | None:
        """`first` and `stop` of `at_distances`; None for a band of other edges."""
        if not self.high.is_diagonal or not (self.low.is_diagonal or self.low.is_beginning):
            return None
        return self.high.back + 1, None if self.low.is_beginning else self.low.back + 1

    @property
    def is_true(self) -> bool:
        """Whether the band keeps the model's own rotation."""
        return self.query_positions == TRUE_POSITIONS == self.key_positions

    @property
    def functions(self) -> tuple[PositionFunction, PositionFunction]:
        """`query_positions` and `key_positions`."""
        return self.query_positions, self.key_positions

    @property
    def is_narrow(self) -> bool:
        """Whether it is a diagonal strip that ends before the first key."""
        return self.low.is_diagonal and self.high.is_diagonal

    @property
    def first_query(self) -> int:
        """The first query that sees a key."""
        return max(self.high.reaches(1), 0)

    def sees(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Whether queries see keys through the band, at true positions (int64, broadcast)."""
        return (keys >= self.low(queries)) & (keys < self.high(queries))

    def largest_relative_position(self, length: int, start: int = 0) -> float:
        """Largest relative position in a text of `length` tokens over queries from `start` on; -1 for an empty band."""
        first = max(self.first_query, start)
        if first >= length:
            return -1
        queries = torch.cat([*self._telling_queries(first, length)])
        low, high = self.low(queries), self.high(queries)
        relative = self.query_positions(queries) - self.key_positions.lowest(low, high)
        return torch.where(low < high, relative, -1).max().item()

    def _telling_queries(self, first: int, stop: int) -> Iterator[Tensor]:
        """Of the queries `first .. stop - 1`, some that hold one with the largest relative position.

        Between two turns all repeats itself with one period, up to a drift: the first and the last period tell. Within
        one, only a query's position may fall, or its lowest key position rise: the queries before such ones tell.
        """
        turns = {first, stop, *self.low.turns(), *self.high.turns(), *self.query_positions.turns}
        if self.high.cap is not None and not self.low.is_beginning:
            turns.add(self.low.reaches(self.high.cap))
        if not self.low.is_beginning:
            turns |= {self.low.reaches(key) for key in self.key_positions.turns}
        period = math.lcm(
            self.low.block, self.high.block, self.query_positions.period or 1, self.key_positions.period or 1
        )
        for begin, end in pairwise(sorted(turn for turn in turns if first <= turn <= stop)):
            for lower, upper in (begin, min(begin + period, end)), (max(begin, end - period), end):
                yield torch.tensor([upper - 1], device="cpu")
                if cycle := self.query_positions.cycle:
                    yield _queries_before(0, cycle, lower, upper)
                if not self.low.is_beginning:
                    # A high edge that rests while the low one moves may also leave the band empty.
                    rise = self.key_positions.step if self.low.block == self.high.block == 1 else self.low.block
                    yield _queries_before(self.low.back, rise, lower, upper)


def _queries_before(first: int, step: int, lower: int, upper: int) -> Tensor:
    """The queries of `lower .. upper - 1` that come right before `first`, or any number of `step` from it."""
    following = lower + 1 + (first - lower - 1) % step
    return torch.arange(following, max(following, upper + 1), step, device="cpu") - 1


EVERYTHING = Band(BEGINNING, PAST_QUERY)


@dataclass(frozen=True)
class PositionMap(ABC):
    """A rule that gives every (query, key) pair a relative position inside the model's trained window.

    `start`: queries at true positions before `start` keep true distances, so everything before it is the unmodified
    model's. The default 0 is the papers'.
    """

    name: ClassVar[str]
    # Parameters that make a map of this kind legible as a matrix of ten tokens, for figures and examples.
    miniature: ClassVar[Mapping[str, Any]] = {}
    # Whether the rule of eq. 5 is asked of it. It is a rule for maps that let far tokens share positions: only the
    # lower half of the positions is trained well enough for those.
    keeps_to_half: ClassVar[bool] = True
    start: int = field(default=0, kw_only=True, metadata=at_least(0))

    def __post_init__(self) -> None:
        for parameter in dataclasses.fields(self):
            if rule := _RULES.get(parameter.type):
                limits = parameter.metadata.get(_LIMITS, {})
                object.__setattr__(self, parameter.name, rule(parameter.name, getattr(self, parameter.name), **limits))

    @classmethod
    def examples(cls) -> list[Self]:
        """Maps of this kind for texts of a few dozen tokens, which the tests run.

        They hold what is easily got wrong: sizes that do not divide each other, windows larger than the text, a late
        `start`.
        """
        return [cls(**cls.miniature)]

    @classmethod
    def large_examples(cls) -> list[Self]:
        """Likewise for texts of a thousand tokens: windows larger than the blocks that implementations work in."""
        return []

    @property
    @abstractmethod
    def bands(self) -> tuple[Band, ...]:
        """The bands of queries from `start` on, nearest first; no key is in two. A key in none is not seen.

        The nearest holds every query's own key, and no key is after its query: `check` refuses others.
        """

    def check(self) -> None:
        """Refuses bands that break the rules, as those of a map of somebody's own may. Looks once.

        Raises:
            ValueError: says which band, and at which query.
        """
        if (problem := self._problem) is not None:
            raise ValueError(f"{self} has bands that no attention can follow: {problem}")

    @cached_property
    def _problem(self) -> str | None:
        return bands_problem(self.bands, self.start)

    def bands_by_query(self, first: int, stop: int) -> list[tuple[int, int, tuple[Band, ...]]]:
        """Runs of the queries at true positions `first .. stop - 1` that share their bands: first, stop, bands."""
        start = min(max(self.start, first), stop)
        before = [(first, start, (EVERYTHING,))] if first < start else []
        after = [(start, stop, self.bands)] if start < stop or not before else []
        return before + after

    @classmethod
    def for_length(cls, target_length: int, trained_window: int) -> Self:
        """The map of this kind for texts of `target_length` tokens on a model trained on `trained_window`.

        Its largest relative position stays below half the trained window (SelfExtend, eq. 5), or, where that rule is
        not asked of the map, inside the window.

        Raises:
            LengthError: no map of this kind reaches `target_length`.
            ValueError: a length that is no whole number, or below 1, or longer than any text.
        """
        if inspect.isabstract(cls):
            raise ValueError(f"{cls.__name__} is no kind of map of its own: name one, such as SelfExtend")
        target_length = whole("target_length", target_length, at_least=1)
        trained_window = whole("trained_window", trained_window, at_least=1)
        return cls._for_length(target_length, trained_window)._check_length(target_length, trained_window)

    @classmethod
    @abstractmethod
    def _for_length(cls, target_length: int, trained_window: int) -> Self:
        """What a map of this kind has to say to `for_length`, which has checked the lengths and checks the result."""

    @property
    def is_identity(self) -> bool:
        """Whether every key keeps its true distance."""
        return all(band.is_true for band in self.bands) and self.sees_everything

    @property
    def sees_everything(self) -> bool:
        """Whether every key up to the query's own is in a band."""
        edges = [PAST_QUERY, *(edge for band in self.bands for edge in (band.high, band.low)), BEGINNING]
        return all(before == after for before, after in zip(edges[::2], edges[1::2], strict=True))

    @cached_property
    def by_pair(self) -> bool:
        """Whether the pairs of rotary dimensions of a token have positions of their own in some band."""
        return any(function.by_pair for band in self.bands for function in band.functions)

    def relative_positions(self, length: int) -> Tensor:
        """Relative position of every pair, shape (length, length): row m is the query, column n the key.

        int64, or float64 for maps with real-valued positions. Pairs that do not attend (the future, and keys that the
        map hides) are -1.

        Raises:
            ValueError: a length that no text has.
        """
        tokens = torch.arange(whole("length", length, at_least=0), device="cpu")
        return self.relative_to(tokens[:, None], tokens)

    def relative_to(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Relative position of queries and keys at true positions (int64, broadcast); dtype and -1 as in the matrix."""
        distance = queries - keys
        relative: Tensor = torch.full_like(distance, -1)
        for band in self.bands:
            mapped = band.query_positions(queries) - band.key_positions(keys)
            relative = torch.where(band.sees(queries, keys), mapped, relative)
        before_start = (queries < self.start) & (distance >= 0)
        return torch.where(before_start, distance.to(relative.dtype), relative)

    def largest_relative_position(self, length: int) -> float:
        """Largest relative position used anywhere in a text of `length` tokens; -1 where there are none.

        Raises:
            ValueError: a length that no text has.
        """
        length = whole("length", length, at_least=0)
        before_start = min(length, self.start) - 1
        return max(before_start, *(band.largest_relative_position(length, self.start) for band in self.bands))

    def max_length(self, trained_window: int) -> int | float:
        """Longest text whose relative positions all stay inside the trained window (SelfExtend, eq. 4).

        `math.inf` where the map never leaves the window.

        Raises:
            ValueError: a window that no model has.
        """
        trained_window = whole("trained_window", trained_window, at_least=1)
        return self._longest(lambda position: position <= trained_window - 1)

    def recommended_length(self, trained_window: int) -> int | float:
        """Longest text whose relative positions stay below half the trained window (SelfExtend, eq. 5).

        `max_length` for maps that the rule is not asked of.

        Raises:
            ValueError: a window that no model has.
        """
        trained_window = whole("trained_window", trained_window, at_least=1)
        return self._longest(lambda position: self._keeps_rule(position, trained_window))

    def meets_rule(self, length: int, trained_window: int) -> bool:
        """Whether a text of `length` tokens keeps the rule of eq. 5, as those up to `recommended_length` do.

        Raises:
            ValueError: a length that no text has, or a window that no model has.
        """
        trained_window = whole("trained_window", trained_window, at_least=1)
        return self._keeps_rule(self.largest_relative_position(length), trained_window)

    def _keeps_rule(self, position: float, trained_window: int) -> bool:
        return position < trained_window / 2 if self.keeps_to_half else position <= trained_window - 1

    def _longest(self, fits: Callable[[float], bool]) -> int | float:
        """Largest length whose largest relative position `fits`, by bisection: it never falls as the text grows."""
        if fits(self.largest_relative_position(UNBOUNDED)):
            return math.inf
        reached, beyond = 0, 1
        while fits(self.largest_relative_position(beyond)):
            reached, beyond = beyond, 2 * beyond
        while beyond - reached > 1:
            middle = (reached + beyond) // 2
            if fits(self.largest_relative_position(middle)):
                reached = middle
            else:
                beyond = middle
        return reached

    def __str__(self) -> str:
        """The call that makes this map, without defaults that do not matter."""
        parameters = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        start = parameters.pop("start")
        if start:
            parameters["start"] = start
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in parameters.items())})"

    def to_dict(self) -> dict[str, Any]:
        """The map as plain data: `{"map": name, field: value, ...}`."""
        return {"map": self.name, **dataclasses.asdict(self)}

    def _check_length(self, target_length: int, trained_window: int) -> Self:
        """This map, if it reaches `target_length`."""
        if not self.meets_rule(target_length, trained_window):
            raise LengthError(
                f"{type(self).__name__} cannot reach a target length of {target_length} tokens on a trained window of "
                f"{trained_window}: at best {self} reaches {self.recommended_length(trained_window)} "
                f"(eq. {5 if self.keeps_to_half else 4})"
            )
        return self


def bands_problem(bands: object, start: int) -> str | None:
    """What is wrong with the bands of a map: looked for at the queries where edges change how they move, and at those
    around them. None where nothing is found.

    Args:
        start: the first query that sees through them.
    """
    if not isinstance(bands, tuple) or not bands or not all(isinstance(band, Band) for band in bands):
        return f"bands must be a tuple of bands, one or more, got {bands!r}"
    edges = [edge for band in bands for edge in (band.low, band.high)]
    if any(edge.block < 1 for edge in edges):
        return "an edge must have a block of 1 token or more"
    turns = {turn + more * edge.block for edge in edges for turn in edge.turns() for more in (0, 1, 2)}
    near = {query + more for query in turns for more in (-1, 0, 1)}
    near |= {start + query for query in (*near, *range(64), 1 << 20)}
    if all(edge.is_diagonal or edge.is_beginning for edge in edges):
        # Their order is the same for every query that has all of them before it, and no other where some are at key 0.
        near = {start, max(near)}
    for query in sorted(query for query in near if query >= start):
        end = query + 1
        for number, band in enumerate(bands, start=1):
            low, high = band.low(query), band.high(query)
            keys = f"keys {low} to {high - 1}" if low < high else "no key"
            if number == 1 and not low <= query < high:
                return f"the first does not hold query {query}'s own key, but {keys}"
            if low < high:
                if high > end:
                    after = "the query" if number == 1 else "a band before it"
                    return f"number {number} holds {keys} of query {query}, past {after}"
                end = low
    return None


def join_equal(bands: Iterable[Band]) -> tuple[Band, ...]:
    """The same bands, with neighbors that share both position functions made one, and those left out that no distance
    is in."""
    joined: list[Band] = []
    for band in bands:
        if band.is_narrow and band.low.back <= band.high.back:
            continue
        last = joined[-1] if joined else None
        if last and last.low == band.high and replace(last, low=band.low, high=band.high) == band:
            joined[-1] = replace(last, low=band.low)
        else:
            joined.append(band)
    return tuple(joined)


def default_window(trained_window: int) -> int:
    """Neighbor window that `for_length` starts from: an eighth of the trained window."""
    return max(1, trained_window // 8)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
