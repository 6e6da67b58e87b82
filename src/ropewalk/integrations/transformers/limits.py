# SPDX-License-Identifier: Apache-2.0
"""Lengths that a map reaches on a model, and what happens to a text past them."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass, field

import torch

from ropewalk.maps import LengthError, PositionMap, SelfExtend
from ropewalk.ops.layout import Step


@dataclass
class Limits:
    """Lengths that maps can reach on a model: those of the one that reaches least. The warning of eq. 5 is given once.

    Attributes:
        position_map: that one.
    """

    maps: tuple[PositionMap, ...]
    trained_window: int
    enforced: bool
    position_map: PositionMap = field(init=False)
    max_length: int | float = field(init=False)
    recommended_length: int | float = field(init=False)
    _warned: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.position_map = min(self.maps, key=lambda one: one.max_length(self.trained_window))
        self.max_length = self.position_map.max_length(self.trained_window)
        self.recommended_length = min(one.recommended_length(self.trained_window) for one in self.maps)

    def check(self, length: int) -> None:
        """Raises LengthError past eq. 4 and warns once past eq. 5."""
        if length > self.max_length and self.enforced:
            raise LengthError(
                f"a text of {length} tokens is past what {self.position_map} can reach on a trained window of "
                f"{self.trained_window}: {self.max_length} tokens (eq. 4). {self._suggestion(length)}"
            )
        if length > self.recommended_length and not self._warned:
            self._warned = True
            warnings.warn(
                f"a text of {length} tokens uses relative positions past half the trained window of "
                f"{self.trained_window}, which are less well trained: {self.position_map} is recommended up to "
                f"{self.recommended_length} tokens (eq. 5). {self._suggestion(length)}",
                stacklevel=_frames_of_libraries() + 1,
            )

    def check_step(self, step: Step, slots: int) -> None:
        """The same for one token a row among `slots` key slots, without waiting for the device.

        A length that only the device knows, in a static cache that the text can outgrow the map in, is checked there
        against eq. 4: a failed assertion of the device, which CUDA does not recover from, and never a wrong answer. The
        warning of eq. 5 would need the host, so it comes at the next call of several tokens.
        """
        if step.tokens is not None:
            self.check(step.tokens)
        elif self.enforced and slots > self.max_length and not step.limits_checked:
            step.limits_checked = True
            assert step.lengths is not None
            tokens = step.lengths if step.first_slots is None else step.lengths - step.first_slots
            torch._assert_async(
                (tokens <= self.max_length).all(),
                f"a text is past what {self.position_map} can reach on a trained window of {self.trained_window}: "
                f"{self.max_length} tokens (eq. 4)",
            )

    def _suggestion(self, length: int) -> str:
        for kind in (type(self.position_map), SelfExtend):
            try:
                suggested = kind.for_length(length, self.trained_window)
            except LengthError:
                continue
            if suggested != self.position_map:
                return f"{suggested} would do."
        return "None keeps it inside half the trained window (eq. 5)."


def _frames_of_libraries() -> int:
    """Frames between the caller's and the first that is not a library's: where a warning should point."""
    count, frame = 0, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in (
        "ropewalk",
        "transformers",
        "torch",
    ):
        count, frame = count + 1, frame.f_back
    return count
