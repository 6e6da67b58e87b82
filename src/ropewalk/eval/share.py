"""What one of several processes does of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """What one of several processes does: every `count`-th example, from `index` on, so that all have as long texts."""

    index: int = 0
    count: int = 1

    def of(self, examples: Sequence[T]) -> list[T]:
        return list(examples[self.index :: self.count])

    def __str__(self) -> str:
        return f"process {self.index + 1} of {self.count}"


ALL = Share()
