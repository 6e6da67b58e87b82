# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass
from typing import ClassVar, Literal

from ropewalk.maps import Band, PositionMap
from ropewalk.maps.positions import Constant, Grouped


@dataclass(frozen=True)
class Theirs(PositionMap):
    """Keys past `reach` share positions in pairs, and all past `horizon` share one.

    Args:
        reach: tokens that keep their distance.
        horizon: tokens that are told apart, in multiples of `reach`.
        ending: whether keys past the horizon are seen. All but for experiments should keep them.
    """

    name: ClassVar[str] = "theirs"
    miniature: ClassVar = {"reach": 2, "horizon": 3}
    reach: int
    horizon: int = 8
    ending: Literal["kept", "hidden"] = "kept"

    @property
    def bands(self):
        reach, horizon = self.reach, self.reach * self.horizon
        pairs = Band.at_distances(reach, horizon, Grouped(2, reach - reach // 2), Grouped(2))
        last = Band.at_distances(horizon, None, Constant(horizon), Constant(0))
        return (Band.at_distances(0, reach), pairs, last)[: 3 if self.ending == "kept" else 2]

    @classmethod
    def _for_length(cls, target_length, trained_window):
        return cls(max(1, trained_window // 32))
