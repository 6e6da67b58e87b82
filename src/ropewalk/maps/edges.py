# SPDX-License-Identifier: Apache-2.0
"""Edges: where the keys that a query sees through a band begin and end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor


@dataclass(frozen=True)
class Edge:
    """The key `min(cap, floor((m - back) / block) * block)` for the query at position m; 0 where that is below 0.

    It never falls as m grows, so a tile of queries and keys is wholly before an edge, wholly past it, or on it.

    Args:
        back: tokens that the edge lies behind the query; -1 is the key after the query's own.
        block: the edge moves in steps of so many tokens; 1 is a diagonal.
        cap: the last key that the edge moves to; None for any.
    """

    back: int = 0
    block: int = 1
    cap: int | None = None

    @property
    def is_diagonal(self) -> bool:
        """Whether it keeps its distance from every query."""
        return self.block == 1 and self.cap is None

    @property
    def is_beginning(self) -> bool:
        """Whether it is the first key for every query."""
        return self.cap == 0

    @overload
    def __call__(self, queries: int) -> int: ...
    @overload
    def __call__(self, queries: Tensor) -> Tensor: ...
    def __call__(self, queries: int | Tensor) -> int | Tensor:
        """The edge of queries at true positions `queries`: a number, or int64 of any shape."""
        if isinstance(queries, int):
            key = max(queries - self.back, 0) // self.block * self.block
            return key if self.cap is None else min(key, self.cap)
        keys = torch.div((queries - self.back).clamp(min=0), self.block, rounding_mode="floor") * self.block
        return keys if self.cap is None else keys.clamp(max=self.cap)

    def turns(self) -> Iterator[int]:
        """The queries from which on it moves otherwise than before: it leaves key 0, or comes to rest at `cap`."""
        if not self.is_beginning:
            yield self.back + self.block
            if self.cap is not None:
                yield self.reaches(self.cap)

    def reaches(self, key: int) -> int:
        """The first query whose edge is at `key` or past it, were there no cap."""
        return self.back - -key // self.block * self.block

    def formula(self, query: str) -> str:
        """The edge of a query called `query`, as a person would write it: `m - 1023`, `m // 96 * 96`, `4`."""
        if self.is_beginning:
            return "0"
        where = query if self.back == 0 else f"{query} {'-' if self.back > 0 else '+'} {abs(self.back)}"
        if self.block != 1:
            where = f"{where if self.back == 0 else f'({where})'} // {self.block} * {self.block}"
        return where if self.cap is None else f"min({where}, {self.cap})"


BEGINNING = Edge(cap=0)
PAST_QUERY = Edge(back=-1)
