# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Self

from ropewalk.maps.base import EVERYTHING, Band, LengthError, PositionMap


@dataclass(frozen=True)
class Identity(PositionMap):
    """Every key at its true distance: the unmodified model."""

    name: ClassVar[str] = "identity"
    keeps_to_half: ClassVar[bool] = False

    @cached_property
    def bands(self) -> tuple[Band, ...]:
        return (EVERYTHING,)

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(), cls(start=7)]

    @classmethod
    def _for_length(cls, target_length: int, trained_window: int) -> Self:
        """The identity, up to the trained window itself: eq. 5 is a rule for maps, not for the unmodified model."""
        if target_length > trained_window:
            raise LengthError(
                f"Identity reaches {trained_window} tokens, the trained window itself, not {target_length}: "
                "choose another map"
            )
        return cls()
