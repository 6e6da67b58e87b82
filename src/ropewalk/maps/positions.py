# SPDX-License-Identifier: Apache-2.0
"""Position functions: which rotary position a token is given inside a band.

Each is a small hashable value, so that operators can key their tables on it and kernels can read its numbers.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from ropewalk.maps.numbers import UNBOUNDED as UNBOUNDED


class PositionFunction(ABC):
    """Maps true positions to the positions used for the rotation. A value: frozen, hashable, equal by its numbers."""

    # Whether the pairs of dimensions of a token have positions of their own: a call then gives (..., pairs).
    by_pair: ClassVar[bool] = False

    @property
    @abstractmethod
    def period(self) -> int:
        """Tokens after which the function repeats itself up to a constant, between its turns.

        0 where there is no such number: good for a function that never falls, in bands that go on to the first key.
        """

    @property
    def turns(self) -> tuple[int, ...]:
        """Tokens from which on the function goes on otherwise than before; few functions have any."""
        return ()

    @property
    def step(self) -> int:
        """It rises at no other tokens than multiples of this."""
        return 1

    @property
    def cycle(self) -> int:
        """It falls at no other tokens than multiples of this; 0 where it never does."""
        return 0

    @abstractmethod
    def formula(self, token: str) -> str:
        """The function of a token called `token`, as a person would write it: `m // 8 + 896`."""

    @abstractmethod
    def __call__(self, tokens: Tensor) -> Tensor:
        """Positions (int64 or float64, same shape) of the tokens at true positions `tokens` (int64)."""

    def lowest(self, first: Tensor, stop: Tensor) -> Tensor:
        """Lowest position among the tokens `first .. stop - 1`, elementwise; anything where there are none."""
        return self(first)  # of a function that never falls


@dataclass(frozen=True)
class Grouped(PositionFunction):
    """`token // size + shift`: consecutive tokens share a position (SelfExtend, eq. 3)."""

    size: int
    shift: int = 0

    @property
    def period(self) -> int:
        return self.size

    @property
    def step(self) -> int:
        return self.size

    def formula(self, token: str) -> str:
        return _plus(token if self.size == 1 else f"{token} // {self.size}", self.shift)

    def __call__(self, tokens: Tensor) -> Tensor:
        return torch.div(tokens, self.size, rounding_mode="floor") + self.shift


TRUE_POSITIONS = Grouped(size=1, shift=0)


@dataclass(frozen=True)
class Scaled(PositionFunction):
    """`token / factor + shift`, real-valued (Leaky ReRoPE)."""

    factor: float
    shift: float = 0.0

    @property
    def period(self) -> int:
        return 1

    def formula(self, token: str) -> str:
        return _plus(token if self.factor == 1 else f"{token} / {self.factor:g}", self.shift)

    def __call__(self, tokens: Tensor) -> Tensor:
        return tokens.double() / self.factor + self.shift


@dataclass(frozen=True)
class Constant(PositionFunction):
    """Every token at the same position (ReRoPE)."""

    position: int

    @property
    def period(self) -> int:
        return 1

    def formula(self, token: str) -> str:
        return f"{self.position}"

    def __call__(self, tokens: Tensor) -> Tensor:
        return torch.full_like(tokens, self.position)


@dataclass(frozen=True)
class Capped(PositionFunction):
    """`min(token, cap)`: true positions up to `cap`, at which all further tokens are (StreamingLLM)."""

    cap: int

    @property
    def period(self) -> int:
        return 1

    @property
    def turns(self) -> tuple[int, ...]:
        return (self.cap,)

    def formula(self, token: str) -> str:
        return f"min({token}, {self.cap})"

    def __call__(self, tokens: Tensor) -> Tensor:
        return tokens.clamp(max=self.cap)


@dataclass(frozen=True)
class Cyclic(PositionFunction):
    """`min(token mod size + shift, cap)`: positions that begin anew with every chunk (Dual Chunk Attention).

    Args:
        size: tokens of a chunk.
        shift: position of a chunk's first token.
        cap: the largest position; None for any.
    """

    size: int
    shift: int = 0
    cap: int | None = None

    @property
    def period(self) -> int:
        return self.size

    @property
    def cycle(self) -> int:
        return self.size

    def formula(self, token: str) -> str:
        position = _plus(f"{token} mod {self.size}", self.shift)
        return position if self.cap is None else f"min({position}, {self.cap})"

    def __call__(self, tokens: Tensor) -> Tensor:
        positions = torch.remainder(tokens, self.size) + self.shift
        return positions if self.cap is None else positions.clamp(max=self.cap)

    def lowest(self, first: Tensor, stop: Tensor) -> Tensor:
        next_chunk = torch.div(first + self.size - 1, self.size, rounding_mode="floor") * self.size
        return self(torch.where(next_chunk < stop, next_chunk, first))


@dataclass(frozen=True)
class LogisticGroups:
    """Index of the group that holds a token, when group sizes follow SELF's logistic curve (arXiv 2505.17296).

    Group j (j = 0, 1, ...) holds `floor(capacity / (1 + (capacity - 1) * exp(-rate * j)))` tokens: sizes start at 1
    and rise to capacity - 1. The size is at least s from group `ln(s (capacity - 1) / (capacity - s)) / rate` on, so
    the table has one entry for each size that occurs, whatever the length of the text.
    """

    capacity: int
    rate: float

    @property
    def sizes(self) -> tuple[int, ...]:
        """The group sizes that occur, rising."""
        return self._table[0]

    @property
    def first_groups(self) -> tuple[int, ...]:
        """First group of each of `sizes`."""
        return self._table[1]

    @property
    def first_tokens(self) -> tuple[int, ...]:
        """First token of each of `first_groups`."""
        return self._table[2]

    def size(self, group: int) -> int:
        """Tokens in a group. Never `capacity`, which the curve only approaches but rounding would reach."""
        exact = self.capacity / (1 + (self.capacity - 1) * math.exp(-self.rate * group))
        return min(math.floor(exact), self.capacity - 1)

    @cached_property
    def _table(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        size, group, token = 1, 0, 0
        rows = [(size, group, token)]
        while size < self.capacity - 1:
            estimate = math.ceil(min(self._crossing(size + 1), UNBOUNDED))
            if token + size * (estimate - group) >= UNBOUNDED:
                break
            following = self._first_group(size + 1, estimate)
            token += size * (following - group)
            size, group = self.size(following), following
            rows.append((size, group, token))
        sizes, first_groups, first_tokens = zip(*rows, strict=True)
        return sizes, first_groups, first_tokens

    def _crossing(self, size: int) -> float:
        """Where the curve, of a real argument, reaches `size`."""
        return math.log(size * (self.capacity - 1) / (self.capacity - size)) / self.rate

    def _first_group(self, size: int, estimate: int) -> int:
        group = estimate
        # The logarithm is rounded: the definition itself decides at the edge.
        while group > 0 and self.size(group - 1) >= size:
            group -= 1
        while self.size(group) < size:
            group += 1
        return group

    @cached_property
    def _tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """What a call looks up, made once: token where the next size begins, size, shift."""
        sizes, first_groups, first_tokens = (torch.tensor(column, device="cpu") for column in self._table)
        return first_tokens[1:], sizes, first_groups * sizes - first_tokens

    def __call__(self, tokens: Tensor) -> Tensor:
        ends, sizes, shifts = (table.to(tokens.device) for table in self._tensors)
        row = torch.searchsorted(ends, tokens, right=True)
        # Among groups of one size the index is a plain floor division, shifted to meet the groups before.
        return torch.div(tokens + shifts[row], sizes[row], rounding_mode="floor")


@dataclass(frozen=True)
class ReleasedGroups(LogisticGroups):
    """The group index as SELF's own kernel counts it (logistic.cu of the authors' code, as of November 2026).

    Token n has the index that `LogisticGroups` gives token n - 1, and the first token 0. Where some size has no group,
    or the next one has none, the kernel passes the size over: its groups get no tokens, and all that follow begin that
    much earlier. Here `first_groups` are the indices of `first_tokens`, and each further index is that of `sizes`
    tokens.
    """

    @cached_property
    def _table(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        last = self.capacity - 1
        # The last group of each size; none is 0, and the largest size has no last one.
        ends = [-1, *(math.ceil(min(self._crossing(size + 1), UNBOUNDED)) - 1 for size in range(1, last))]
        counts = [end - before for before, end in pairwise(ends)]
        token, rows = 0, []
        for size, count in enumerate(counts, start=1):
            goes_on_for_ever = ends[size] >= UNBOUNDED - 1
            # The kernel takes the largest size for one that has a group.
            if count > 0 and (size == last - 1 or counts[size] > 0 or goes_on_for_ever):
                rows.append((size, ends[size - 1], token))
                token += size * count
            if goes_on_for_ever or token >= UNBOUNDED:
                break
        else:
            rows.append((last, ends[last - 1], token))
        sizes, first_groups, first_tokens = zip(*rows, strict=True)
        return sizes, first_groups, first_tokens

    @cached_property
    def _tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        sizes, first_groups, first_tokens = (torch.tensor(column, device="cpu") for column in self._table)
        return first_tokens[1:], sizes, (first_groups + 1) * sizes - first_tokens - 1

    def __call__(self, tokens: Tensor) -> Tensor:
        # The kernel writes no index for token 0.
        return super().__call__(tokens) * (tokens > 0)


@dataclass(frozen=True)
class Logistic(PositionFunction):
    """`groups(token - origin) + shift`: SELF's group index, counted from token `origin`."""

    groups: LogisticGroups
    origin: int = 0
    shift: int = 0

    @property
    def period(self) -> int:
        return 0

    def formula(self, token: str) -> str:
        return _plus(f"group({_plus(token, -self.origin)})", self.shift)

    def __call__(self, tokens: Tensor) -> Tensor:
        return self.groups((tokens - self.origin).clamp(min=0)) + self.shift


def _plus(term: str, shift: float) -> str:
    if shift == 0:
        return term
    return f"{term} {'+' if shift > 0 else '-'} {abs(shift):.10g}"
