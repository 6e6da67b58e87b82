# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Self

from ropewalk.maps.base import Band, PositionMap, at_least


@dataclass(frozen=True)
class SlidingWindow(PositionMap):
    """Only the nearest `window` keys are seen, at their true distance: a sliding-window layer's own attention.

    Args:
        window: keys seen, the query's own included, in tokens.
    """

    name: ClassVar[str] = "sliding-window"
    miniature: ClassVar[Mapping[str, Any]] = {"window": 4}
    keeps_to_half: ClassVar[bool] = False
    window: int = field(metadata=at_least(1))

    @cached_property
    def bands(self) -> tuple[Band, ...]:
        return (Band.at_distances(0, self.window),)

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(4), cls(1), cls(100), cls(5, start=9)]

    @classmethod
    def large_examples(cls) -> list[Self]:
        return [cls(255)]

    @classmethod
    def _for_length(cls, target_length: int, trained_window: int) -> Self:
        """The trained window, whatever the length."""
        return cls(trained_window)
