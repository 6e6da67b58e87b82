# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Self

from ropewalk.maps.base import Band, PositionMap, at_least
from ropewalk.maps.edges import PAST_QUERY, Edge


@dataclass(frozen=True)
class Infinite(PositionMap):
    """The baseline "Infinite" of SelfExtend (arXiv 2401.01325, appendix B): a query sees its own block alone.

    Positions are counted anew in each block, which changes no distance within it: every block is a text of its own to
    the unmodified model.

    Args:
        window: w, tokens of a block.
    """

    name: ClassVar[str] = "infinite"
    miniature: ClassVar[Mapping[str, Any]] = {"window": 4}
    keeps_to_half: ClassVar[bool] = False
    window: int = field(metadata=at_least(1))

    @cached_property
    def bands(self) -> tuple[Band, ...]:
        return (Band(Edge(0, self.window), PAST_QUERY),)

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(4), cls(1), cls(7), cls(100), cls(5, start=12)]

    @classmethod
    def large_examples(cls) -> list[Self]:
        return [cls(192), cls(257)]

    @classmethod
    def _for_length(cls, target_length: int, trained_window: int) -> Self:
        """Blocks of the trained window, whatever the length."""
        return cls(trained_window)
