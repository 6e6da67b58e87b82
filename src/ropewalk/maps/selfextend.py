from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Self

from ropewalk.maps.base import Band, PositionMap, _require, default_window, join_equal
from ropewalk.maps.positions import Grouped


@dataclass(frozen=True)
class SelfExtend(PositionMap):
    """SelfExtend (Jin et al., ICML 2024, arXiv 2401.01325): far keys share positions in groups of constant size.

    Keys nearer than `window` keep their distance. Farther ones are at `m // G + W - W // G - n // G`, which continues at
    W where G divides W.

    Args:
        group_size: G, tokens that share a position in the far band; 1 is the unmodified model.
        window: W, the neighbor window, in tokens.
    """

    name: ClassVar[str] = "selfextend"
    group_size: int
    window: int

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.group_size >= 1, f"group_size must be 1 or more, got {self.group_size}")
        _require(self.window >= 1, f"window must be 1 or more, got {self.window}")

    @property
    def bands(self) -> tuple[Band, ...]:
        shift = self.window - self.window // self.group_size
        far = Band(self.window, None, Grouped(self.group_size, shift), Grouped(self.group_size))
        return join_equal((Band(0, self.window), far))

    @classmethod
    def for_length(cls, target_length: int, trained_window: int) -> Self:
        """An eighth of the trained window as neighbors, and the smallest group size that then meets eq. 5.

        The window is rounded down to a multiple of the group size, so that the bands meet without a jump.
        """
        window = default_window(trained_window)
        reach = trained_window / 2 - window
        group_size = max(1, math.ceil((target_length - window) / reach)) if reach > 0 else 1
        while True:
            chosen = cls(group_size, max(window // group_size, 1) * group_size)
            if chosen.recommended_length(trained_window) >= target_length:
                return chosen
            if group_size >= trained_window:  # one group no longer fits the window
                return chosen._check_length(target_length, trained_window)
            group_size += 1
