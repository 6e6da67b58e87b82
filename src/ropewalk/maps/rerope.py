# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Self

from ropewalk.maps.base import Band, PositionMap, at_least
from ropewalk.maps.positions import Constant


@dataclass(frozen=True)
class ReRoPE(PositionMap):
    """ReRoPE (Su 2023): every key at distance `window` or more is at distance `window`.

    Args:
        window: W, the neighbor window, in tokens.
    """

    name: ClassVar[str] = "rerope"
    miniature: ClassVar[Mapping[str, Any]] = {"window": 4}
    window: int = field(metadata=at_least(1))

    @cached_property
    def bands(self) -> tuple[Band, ...]:
        return (
            Band.at_distances(0, self.window),
            Band.at_distances(self.window, None, Constant(self.window), Constant(0)),
        )

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(4), cls(1), cls(100), cls(3, start=8)]

    @classmethod
    def large_examples(cls) -> list[Self]:
        return [cls(257)]

    @classmethod
    def _for_length(cls, target_length: int, trained_window: int) -> Self:
        """A quarter of the trained window, whatever the length: the map has no other parameter."""
        return cls(max(1, trained_window // 4))
