# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Self

from ropewalk.maps.base import Band, PositionMap, at_least
from ropewalk.maps.edges import BEGINNING, PAST_QUERY, Edge
from ropewalk.maps.positions import Capped


@dataclass(frozen=True)
class StreamingLLM(PositionMap):
    """StreamingLLM (Xiao et al., ICLR 2024, arXiv 2309.17453): the first keys and the nearest ones are seen.

    Positions are counted among the keys that are seen (section 3.2): the nearest W keep their distance, and the S
    sinks, keys 0 .. S - 1, are seen from position `min(m, S + W - 1)`. So texts of up to S + W tokens are the
    unmodified model's. All is computed from the text's own keys and values: nothing is evicted, and reading a text in
    one go or token by token is the same.

    The released code (mit-han-lab/streaming-llm) counts keys in the cache. Where it evicts after a token, as when
    measuring perplexity, a query sees its own key besides `recent_size` others: W is `recent_size + 1`. Where it evicts
    before, as when chatting, W is `recent_size` for the last token of what comes.

    Args:
        sinks: S, keys at the beginning that every query sees, in tokens.
        window: W, the nearest keys seen, the query's own included, in tokens.
    """

    name: ClassVar[str] = "streaming-llm"
    miniature: ClassVar[Mapping[str, Any]] = {"sinks": 2, "window": 4}
    keeps_to_half: ClassVar[bool] = False
    sinks: int = field(metadata=at_least(0))
    window: int = field(metadata=at_least(1))

    @cached_property
    def bands(self) -> tuple[Band, ...]:
        back = self.window - 1
        near = Band(Edge(back), PAST_QUERY)
        return (near, Band(BEGINNING, Edge(back, cap=self.sinks), Capped(self.sinks + back))) if self.sinks else (near,)

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(4, 4), cls(3, 1), cls(9, 5), cls(0, 4), cls(4, 100), cls(50, 3), cls(2, 5, start=11)]

    @classmethod
    def large_examples(cls) -> list[Self]:
        return [cls(4, 255), cls(130, 257)]

    @classmethod
    def _for_length(cls, target_length: int, trained_window: int) -> Self:
        """Four sinks, and as many near keys as then fit the trained window (table 2: 4 + 4092 for 4096), whatever the
        length."""
        sinks = min(4, trained_window - 1)
        return cls(sinks, trained_window - sinks)
