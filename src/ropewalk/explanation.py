# SPDX-License-Identifier: Apache-2.0
"""What a position map does to a text of a given length, in numbers and in words."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from ropewalk.maps import Band, LengthError, PositionMap
from ropewalk.maps.edges import PAST_QUERY

Verdict = Literal["unmodified", "recommended", "possible", "too long"]


@dataclass(frozen=True)
class BandSummary:
    """One band that the text reaches: the keys n of a query m, and both positions, as formulas.

    `first` and `stop`: its distances `first <= m - n < stop` (a `stop` of None: all farther); both None for a band of
    other edges than diagonals.
    """

    keys: str
    first: int | None
    stop: int | None
    query_position: str
    key_position: str


@dataclass(frozen=True)
class Explanation:
    """A position map, a trained window and a text length (tokens), and what comes of them.

    `max_length` (eq. 4) and `recommended_length` (eq. 5) are in tokens, `math.inf` where every length will do.
    `verdict` is "unmodified" (nothing is re-mapped), "recommended" (eq. 5 holds), "possible" (only eq. 4 holds) or
    "too long"; `advice` says the same in a sentence or two, with a better map of the kind where there is one.
    """

    position_map: PositionMap
    trained_window: int
    length: int
    bands: tuple[BandSummary, ...]
    largest_relative_position: float
    max_length: int | float
    recommended_length: int | float
    verdict: Verdict
    advice: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; a length without limit is None."""
        return {
            "map": self.position_map.to_dict(),
            "trained_window": self.trained_window,
            "length": self.length,
            "bands": [vars(band) for band in self.bands],
            "largest_relative_position": self.largest_relative_position,
            "max_length": _finite_or_none(self.max_length),
            "recommended_length": _finite_or_none(self.recommended_length),
            "verdict": self.verdict,
            "advice": self.advice,
        }


def explain(position_map: PositionMap, trained_window: int, length: int) -> Explanation:
    """What `position_map` does to a text of `length` tokens on a model trained on `trained_window`.

    Raises:
        ValueError: a length below 1.
    """
    if length < 1:
        raise ValueError(f"length must be 1 or more, got {length}")
    largest = position_map.largest_relative_position(length)
    longest = position_map.max_length(trained_window)
    recommended = position_map.recommended_length(trained_window)
    verdict = _verdict(position_map, trained_window, length, longest, recommended)
    return Explanation(
        position_map=position_map,
        trained_window=trained_window,
        length=length,
        bands=tuple(_summary(band) for band in position_map.bands if band.first_query < length),
        largest_relative_position=largest,
        max_length=longest,
        recommended_length=recommended,
        verdict=verdict,
        advice=_advice(verdict, position_map, trained_window, length, largest, longest),
    )


def _summary(band: Band) -> BandSummary:
    end = "<= m" if band.high == PAST_QUERY else f"< {band.high.formula('m')}"
    first, stop = band.distances or (None, None)
    positions = band.query_positions.formula("m"), band.key_positions.formula("n")
    return BandSummary(f"{band.low.formula('m')} <= n {end}", first, stop, *positions)


def _verdict(
    position_map: PositionMap, trained_window: int, length: int, longest: int | float, recommended: int | float
) -> Verdict:
    if length > longest:
        return "too long"
    if length <= max(_unmodified_length(position_map), position_map.start):
        return "unmodified"
    return "recommended" if length <= recommended else "possible"


def _advice(
    verdict: Verdict, position_map: PositionMap, trained_window: int, length: int, largest: float, longest: int | float
) -> str:
    match verdict:
        case "unmodified":
            return "Nothing is re-mapped at this length: the model reads this text as it always did."
        case "recommended":
            if not position_map.keeps_to_half:
                return f"Good: no relative position leaves the trained window.{_hidden(position_map)}"
            return "Good: the text stays in the lower half of the trained window, which the model knows best."
        case "possible":
            finding = (
                f"Possible, but past the rule of eq. 5: relative positions up to {number(largest)} lie in the upper "
                "half of the trained window, which the model knows less well."
            )
        case "too long":
            finding = (
                f"Too long: relative positions up to {number(largest)} lie outside the trained window, "
                f"which ends at {number(trained_window - 1)}. This map can hold {number(longest)} tokens."
            )
    better = _recommended_map(position_map, trained_window, length)
    return f"{finding} {better} would keep the rule." if better else finding


def _recommended_map(position_map: PositionMap, trained_window: int, length: int) -> PositionMap | None:
    """A map of the same kind, with the same `start` and choices of words, that keeps eq. 5 at this length, if any."""
    kept = {field.name: getattr(position_map, field.name) for field in fields(position_map)}
    kept = {name: value for name, value in kept.items() if name == "start" or isinstance(value, str)}
    try:
        better = replace(type(position_map).for_length(length, trained_window), **kept)
    except LengthError:
        return None
    return better if better.meets_rule(length, trained_window) else None


def number(value: float) -> str:
    """A length or position for people: thousands separated, at most two decimals, "no limit" for infinity."""
    if math.isinf(value):
        return "no limit"
    return f"{value:,.2f}".rstrip("0").rstrip(".") if value % 1 else f"{value:,.0f}"


def _unmodified_length(position_map: PositionMap) -> float:
    """Tokens of the longest text in which no query sees a re-mapped key or misses one; infinity for the identity."""
    first = min((band.first_query for band in position_map.bands if not band.is_true), default=math.inf)
    farthest = position_map.bands[-1].low
    return first if farthest.is_beginning else min(first, farthest.reaches(1))


def _hidden(position_map: PositionMap) -> str:
    return "" if position_map.sees_everything else " Keys that are in none of its bands are not seen."


def first_far_distance(position_map: PositionMap, query: int) -> float:
    """Smallest distance at which keys of the query at position `query` are re-mapped; infinity where none is."""
    far = [band for band in position_map.bands if not band.is_true and band.low(query) < band.high(query)]
    return min((query + 1 - band.high(query) for band in far), default=math.inf)


def _finite_or_none(value: float) -> float | None:
    return None if math.isinf(value) else value
