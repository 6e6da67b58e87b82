# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Self

from ropewalk.maps.base import Band, PositionMap, at_least, default_window, join_equal
from ropewalk.maps.positions import Grouped


@dataclass(frozen=True)
class SelfExtend(PositionMap):
    """SelfExtend (Jin et al., ICML 2024, arXiv 2401.01325): far keys share positions in groups of constant size.

    Keys nearer than `window` keep their distance. Farther ones are at `m // G + W - W // G - n // G`, which continues
    at W where G divides W.

    Args:
        group_size: G, tokens that share a position in the far band; 1 is the unmodified model.
        window: W, the neighbor window, in tokens; 0 groups near keys too, as the paper's figure 2 does.
    """

    name: ClassVar[str] = "selfextend"
    miniature: ClassVar[Mapping[str, Any]] = {"group_size": 2, "window": 4}
    group_size: int = field(metadata=at_least(1))
    window: int = field(metadata=at_least(0))

    @cached_property
    def bands(self) -> tuple[Band, ...]:
        shift = self.window - self.window // self.group_size
        far = Band.at_distances(self.window, None, Grouped(self.group_size, shift), Grouped(self.group_size))
        near = (Band.at_distances(0, self.window),) if self.window else ()
        return join_equal((*near, far))

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(2, 4), cls(3, 5), cls(4, 3), cls(1, 4), cls(5, 1), cls(3, 0), cls(4, 100), cls(3, 4, start=9)]

    @classmethod
    def large_examples(cls) -> list[Self]:
        return [cls(8, 256), cls(7, 300)]

    @classmethod
    def _for_length(cls, target_length: int, trained_window: int) -> Self:
        """An eighth of the trained window as neighbors, and the smallest group size that then meets eq. 5.

        The window is rounded down to a multiple of the group size, so that the bands meet without a jump.
        """
        window = default_window(trained_window)
        # Larger groups than this, which the neighbor window would have to hold, reach less far again.
        largest = trained_window // 4 + 1
        cls(largest, largest)._check_length(target_length, trained_window)
        # Positions reach target_length / group_size at least.
        smallest = max(1, 2 * target_length // (trained_window + 2))
        for size in range(smallest, largest):
            choice = max(window // size, 1) * size
            # Where the last query sees the first key; in numbers alone, as there may be very many sizes.
            last = target_length - 1
            if 2 * (last if last < choice else last // size + choice - choice // size) < trained_window:
                return cls(size, choice)
        return cls(largest, largest)
