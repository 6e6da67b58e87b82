# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Self

from ropewalk.maps.base import Band, PositionMap, at_least, default_window, join_equal
from ropewalk.maps.positions import TRUE_POSITIONS, PositionFunction, Scaled


@dataclass(frozen=True)
class LeakyReRoPE(PositionMap):
    """Leaky ReRoPE (Su 2023): distances past `window` grow `factor` times slower, without rounding.

    Far keys are at `(m - n) / k + W - W / k`, a real number.

    Args:
        factor: k, how much slower far distances grow; 1 is the unmodified model.
        window: W, the neighbor window, in tokens.
    """

    name: ClassVar[str] = "leaky-rerope"
    miniature: ClassVar[Mapping[str, Any]] = {"factor": 2, "window": 4}
    factor: float = field(metadata=at_least(1))
    window: int = field(metadata=at_least(1))

    @cached_property
    def bands(self) -> tuple[Band, ...]:
        query: PositionFunction = Scaled(self.factor, self.window - self.window / self.factor)
        key: PositionFunction = Scaled(self.factor)
        if self.factor == 1:
            query = key = TRUE_POSITIONS
        return join_equal((Band.at_distances(0, self.window), Band.at_distances(self.window, None, query, key)))

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(2, 4), cls(2.5, 3), cls(1, 4), cls(3, 100), cls(1.5, 5, start=9)]

    @classmethod
    def large_examples(cls) -> list[Self]:
        return [cls(3.7, 255)]

    @classmethod
    def _for_length(cls, target_length: int, trained_window: int) -> Self:
        """An eighth of the trained window as neighbors, and the smallest whole factor that then meets eq. 5."""
        window = default_window(trained_window)
        reach = trained_window / 2 - window  # 0 or less only for windows of one and two tokens
        factor = max(1, math.floor((target_length - 1 - window) / reach)) if reach > 0 else 1
        while reach > 0 and not cls(factor, window).meets_rule(target_length, trained_window):
            factor += 1
        return cls(factor, window)
