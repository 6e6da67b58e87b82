"""Position functions: which rotary position a token is given inside a band.

Each is a small hashable value, so that operators can key their tables on it and kernels can read its numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor


class PositionFunction(Protocol):
    """Maps true positions to the positions used for the rotation; never decreasing."""

    @property
    def period(self) -> int:
        """Tokens after which the function repeats itself up to a constant; 0 where it has no period."""
        ...

    def __call__(self, tokens: Tensor) -> Tensor:
        """Positions (int64 or float64, same shape) of the tokens at true positions `tokens` (int64)."""
        ...


@dataclass(frozen=True)
class Grouped:
    """`token // size + shift`: consecutive tokens share a position (SelfExtend, eq. 3)."""

    size: int
    shift: int = 0

    @property
    def period(self) -> int:
        return self.size

    def __call__(self, tokens: Tensor) -> Tensor:
        return torch.div(tokens, self.size, rounding_mode="floor") + self.shift


TRUE_POSITIONS = Grouped(size=1, shift=0)


@dataclass(frozen=True)
class Scaled:
    """`token / factor + shift`, real-valued (Leaky ReRoPE)."""

    factor: float
    shift: float = 0.0

    @property
    def period(self) -> int:
        return 1

    def __call__(self, tokens: Tensor) -> Tensor:
        return tokens.double() / self.factor + self.shift


@dataclass(frozen=True)
class Constant:
    """Every token at the same position (ReRoPE)."""

    position: int

    @property
    def period(self) -> int:
        return 1

    def __call__(self, tokens: Tensor) -> Tensor:
        return torch.full_like(tokens, self.position)


@dataclass(frozen=True)
class LogisticGroups:
    """Index of the group that holds a token, when group sizes follow SELF's logistic curve (arXiv 2505.17296).

    Group j (j = 0, 1, ...) holds `floor(capacity / (1 + (capacity - 1) * exp(-rate * j)))` tokens: sizes start at 1
    and rise to capacity - 1. The size is at least s from group `ln(s (capacity - 1) / (capacity - s)) / rate` on, so the
    table below has one entry a size, whatever the length of the text.
    """

    capacity: int
    rate: float

    @cached_property
    def first_groups(self) -> tuple[int, ...]:
        """First group that holds at least s tokens, for s = 1 .. capacity - 1."""
        return tuple(self._first_group(size) for size in range(1, self.capacity))

    @cached_property
    def first_tokens(self) -> tuple[int, ...]:
        """First token of each group of `first_groups`."""
        tokens = [0]
        for size, (group, following) in enumerate(zip(self.first_groups, self.first_groups[1:], strict=False), start=1):
            tokens.append(tokens[-1] + size * (following - group))
        return tuple(tokens)

    def size(self, group: int) -> int:
        """Tokens in a group. Never `capacity`, which the curve only approaches but rounding would reach."""
        exact = self.capacity / (1 + (self.capacity - 1) * math.exp(-self.rate * group))
        return min(math.floor(exact), self.capacity - 1)

    def _first_group(self, size: int) -> int:
        group = math.ceil(math.log(size * (self.capacity - 1) / (self.capacity - size)) / self.rate)
        # The logarithm is rounded: the definition itself decides at the edge.
        while group > 0 and self.size(group - 1) >= size:
            group -= 1
        while self.size(group) < size:
            group += 1
        return group

    def __call__(self, tokens: Tensor) -> Tensor:
        first_tokens = torch.tensor(self.first_tokens, device=tokens.device)
        first_groups = torch.tensor(self.first_groups, device=tokens.device)
        index = torch.searchsorted(first_tokens, tokens.clamp(min=0), right=True) - 1
        return first_groups[index] + torch.div(tokens - first_tokens[index], index + 1, rounding_mode="floor")


@dataclass(frozen=True)
class Logistic:
    """`groups(token - origin) + shift`: SELF's group index, counted from token `origin`."""

    groups: LogisticGroups
    origin: int = 0
    shift: int = 0

    @property
    def period(self) -> int:
        return 0

    def __call__(self, tokens: Tensor) -> Tensor:
        return self.groups((tokens - self.origin).clamp(min=0)) + self.shift
