# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Self

from ropewalk.maps.base import Band, PositionMap, _require, at_least
from ropewalk.maps.edges import BEGINNING, PAST_QUERY, Edge
from ropewalk.maps.positions import Constant, Cyclic


@dataclass(frozen=True)
class DualChunk(PositionMap):
    """Dual Chunk Attention (An et al., ICML 2024, arXiv 2402.17463): key positions begin anew with every chunk.

    With s and w as below, a key n is at `n mod s`. A query m is at `m mod s` for the keys of its own chunk (eq. 2), at
    `min(m mod s + s, s + w - 1)` for those of the chunk before (eq. 7), and at `s + w - 1`, the last position that a
    model trained on s + w tokens knows, for all earlier ones (eq. 5). So the nearest w keys are at their true distance.

    The paper sets w to what the chunk leaves of the trained window c, w = c - s, which makes eq. 7 the minimum above.
    The released code (HKUNLP/ChunkLlama) calls the whole of both `chunk_size` and cuts chunks of `chunk_size -
    local_window`; its cap is one position higher. With its defaults on a window of c tokens it is
    `DualChunk(5 * c // 8, c // 8 + 1)`, which stays below 3/4 of the window.

    Args:
        chunk_size: s, tokens of a chunk.
        window: w, the local window, in tokens; not more than a chunk.
    """

    name: ClassVar[str] = "dual-chunk"
    miniature: ClassVar[Mapping[str, Any]] = {"chunk_size": 4, "window": 2}
    keeps_to_half: ClassVar[bool] = False
    chunk_size: int = field(metadata=at_least(1))
    window: int

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(
            1 <= self.window <= self.chunk_size,
            f"window must be from 1 to the chunk size, {self.chunk_size}, got {self.window}",
        )

    @cached_property
    def bands(self) -> tuple[Band, ...]:
        size, last = self.chunk_size, self.chunk_size + self.window - 1
        chunk, chunk_before, key = Edge(0, size), Edge(size, size), Cyclic(size)
        return (
            Band(chunk, PAST_QUERY),  # within a chunk, counting anew changes no distance
            Band(chunk_before, chunk, Cyclic(size, shift=size, cap=last), key),
            Band(BEGINNING, chunk_before, Constant(last), key),
        )

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(6, 4), cls(4, 1), cls(5, 5), cls(1, 1), cls(7, 3), cls(100, 30), cls(6, 4, start=15)]

    @classmethod
    def large_examples(cls) -> list[Self]:
        return [cls(192, 64), cls(250, 101)]

    @classmethod
    def _for_length(cls, target_length: int, trained_window: int) -> Self:
        """Chunks of three quarters of the trained window, as the paper's section 4.1, whatever the length."""
        size = max(1, 3 * trained_window // 4)
        return cls(size, max(1, trained_window - size))
