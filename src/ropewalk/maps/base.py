"""What every position map has: bands, relative positions, and the lengths it can reach."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ropewalk.maps.positions import TRUE_POSITIONS, UNBOUNDED, PositionFunction


class LengthError(ValueError):
    """A length that a position map cannot reach within the model's trained window."""


@dataclass(frozen=True)
class Band:
    """The keys at distance `first <= m - n < stop` from a query m, and the positions they are rotated with.

    `score(m, n) = s * <R(query_positions(m)) q_m, R(key_positions(n)) k_n>` with un-rotated q and k.
    `stop = None` means all remaining keys. In a band with an end both functions have a period and the same slope.
    """

    first: int
    stop: int | None
    query_positions: PositionFunction = TRUE_POSITIONS
    key_positions: PositionFunction = TRUE_POSITIONS

    @property
    def is_true(self) -> bool:
        """Whether the band keeps the model's own rotation."""
        return self.query_positions == TRUE_POSITIONS == self.key_positions

    def largest_relative_position(self, length: int, start: int = 0) -> float:
        """Largest relative position in a text of `length` tokens over queries from `start` on; -1 for an empty band."""
        first_query = max(self.first, start)
        if first_query >= length:
            return -1
        if self.stop is None:
            queries = torch.tensor([length - 1])  # both functions never decrease: the last query and the first key
        else:
            # While key 0 is inside, the last such query is the farthest; after that, one period shows all there is, and
            # the distance grows only where the query's position steps up.
            first_query = max(first_query, min(self.stop, length) - 1)
            step = self.query_positions.period
            stop = min(length, first_query + math.lcm(step, self.key_positions.period))
            queries = torch.tensor([first_query, *range(-(-first_query // step) * step, stop, step)])
        keys = torch.zeros_like(queries) if self.stop is None else (queries - self.stop + 1).clamp(min=0)
        return (self.query_positions(queries) - self.key_positions(keys)).max().item()


@dataclass(frozen=True)
class PositionMap(ABC):
    """A rule that gives every (query, key) pair a relative position inside the model's trained window.

    `start`: queries at true positions before `start` keep true distances, so everything before it is the unmodified
    model's. The default 0 is the papers'.
    """

    name: ClassVar[str]
    # Parameters that make a map of this kind legible as a matrix of ten tokens, for figures and examples.
    miniature: ClassVar[Mapping[str, Any]] = {}
    start: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        for parameter in dataclasses.fields(self):
            value = getattr(self, parameter.name)
            if parameter.type == "int":
                _require(isinstance(value, int), f"{parameter.name} must be a whole number, got {value!r}")
        _require(self.start >= 0, f"start must be 0 or more, got {self.start}")

    @property
    @abstractmethod
    def bands(self) -> tuple[Band, ...]:
        """The bands of queries from `start` on, nearest first; together they hold every key the query may see."""

    def bands_by_query(self, first: int, stop: int) -> list[tuple[int, int, tuple[Band, ...]]]:
        """Runs of the queries at true positions `first .. stop - 1` that share their bands: first, stop, bands."""
        start = min(max(self.start, first), stop)
        before = [(first, start, (Band(0, None),))] if first < start else []
        after = [(start, stop, self.bands)] if start < stop or not before else []
        return before + after

    @classmethod
    @abstractmethod
    def for_length(cls, target_length: int, trained_window: int) -> Self:
        """The map of this kind for texts of `target_length` tokens on a model trained on `trained_window`.

        Its largest relative position stays below half the trained window (SelfExtend, eq. 5).

        Raises:
            LengthError: no map of this kind reaches `target_length`.
        """

    @property
    def is_identity(self) -> bool:
        """Whether every key keeps its true distance."""
        return all(band.is_true for band in self.bands) and self.bands[-1].stop is None

    def relative_positions(self, length: int) -> Tensor:
        """Relative position of every pair, shape (length, length): row m is the query, column n the key.

        int64, or float64 for maps with real-valued positions. Pairs that do not attend (the future) are -1.
        """
        tokens = torch.arange(length)
        return self.relative_to(tokens[:, None], tokens)

    def relative_to(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Relative position of queries and keys at true positions (int64, broadcast); dtype and -1 as in the matrix."""
        distance = queries - keys
        relative: Tensor = torch.full_like(distance, -1)
        for band in self.bands:
            mapped = band.query_positions(queries) - band.key_positions(keys)
            inside = distance >= band.first
            if band.stop is not None:
                inside &= distance < band.stop
            relative = torch.where(inside, mapped, relative)
        before_start = (queries < self.start) & (distance >= 0)
        return torch.where(before_start, distance.to(relative.dtype), relative)

    def largest_relative_position(self, length: int) -> float:
        """Largest relative position used anywhere in a text of `length` tokens."""
        before_start = min(length, self.start) - 1
        return max(before_start, *(band.largest_relative_position(length, self.start) for band in self.bands))

    def max_length(self, trained_window: int) -> int | float:
        """Longest text whose relative positions all stay inside the trained window (SelfExtend, eq. 4).

        `math.inf` where the map never leaves the window.
        """
        _require_window(trained_window)
        return self._longest(lambda position: position <= trained_window - 1)

    def recommended_length(self, trained_window: int) -> int | float:
        """Longest text whose relative positions stay below half the trained window (SelfExtend, eq. 5)."""
        _require_window(trained_window)
        return self._longest(lambda position: position < trained_window / 2)

    def meets_rule(self, length: int, trained_window: int) -> bool:
        """Whether a text of `length` tokens keeps the rule of eq. 5, as those up to `recommended_length` do."""
        _require_window(trained_window)
        return self.largest_relative_position(length) < trained_window / 2

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
        """This map, if it meets eq. 5 for `target_length`."""
        if self.recommended_length(trained_window) < target_length:
            raise LengthError(
                f"{type(self).__name__} cannot reach a target length of {target_length} tokens on a trained window of "
                f"{trained_window}: at best {self} reaches {self.recommended_length(trained_window)} (eq. 5)"
            )
        return self


def join_equal(bands: Iterable[Band]) -> tuple[Band, ...]:
    """The same bands, with neighbors that share both position functions made one and empty ones left out."""
    joined: list[Band] = []
    for band in bands:
        if band.stop is not None and band.stop <= band.first:
            continue
        if joined and (joined[-1].query_positions, joined[-1].key_positions) == (
            band.query_positions,
            band.key_positions,
        ):
            joined[-1] = dataclasses.replace(joined[-1], stop=band.stop)
        else:
            joined.append(band)
    return tuple(joined)


def default_window(trained_window: int) -> int:
    """Neighbor window that `for_length` starts from: an eighth of the trained window."""
    return max(1, trained_window // 8)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_window(trained_window: int) -> None:
    _require(trained_window >= 1, f"trained_window must be 1 or more, got {trained_window}")
