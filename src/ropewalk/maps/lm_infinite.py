# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Self

from ropewalk.maps.base import Band, PositionMap, at_least
from ropewalk.maps.edges import BEGINNING, PAST_QUERY, Edge
from ropewalk.maps.positions import Constant


@dataclass(frozen=True)
class LMInfinite(PositionMap):
    """LM-Infinite (Han et al., NAACL 2024, arXiv 2308.16137): the first keys and the nearest ones are seen.

    The nearest W keys keep their distance; keys 0 .. S - 1 that are farther are at distance W, all of them
    (section 4.1, `min(d, W)`). The released code (Glaciohound/LM-Infinite) does the same with W as its `local_branch`
    and `limit_distance`, S as its `global_branch`. Its choice of further middle keys in some layers, by their scores
    (`top_k_attention`), is no position map, and not here.

    Args:
        sinks: S, keys at the beginning that every query sees, in tokens.
        window: W, the nearest keys seen, the query's own included, and the distance limit, in tokens.
    """

    name: ClassVar[str] = "lm-infinite"
    miniature: ClassVar[Mapping[str, Any]] = {"sinks": 2, "window": 4}
    keeps_to_half: ClassVar[bool] = False
    sinks: int = field(metadata=at_least(0))
    window: int = field(metadata=at_least(1))

    @cached_property
    def bands(self) -> tuple[Band, ...]:
        back = self.window - 1
        near = Band(Edge(back), PAST_QUERY)
        far = Band(BEGINNING, Edge(back, cap=self.sinks), Constant(self.window), Constant(0))
        return (near, far) if self.sinks else (near,)

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(4, 4), cls(3, 1), cls(9, 5), cls(0, 4), cls(4, 100), cls(50, 3), cls(2, 5, start=11)]

    @classmethod
    def large_examples(cls) -> list[Self]:
        return [cls(10, 255), cls(130, 257)]

    @classmethod
    def _for_length(cls, target_length: int, trained_window: int) -> Self:
        """Ten sinks and the trained window less one, whatever the length.

        The paper takes 10 to 100 sinks (10 in its examples of use) and W as the trained window L. Distance L is the
        first that the model was not trained on, so W is one less here.
        """
        return cls(10, max(1, trained_window - 1))
