# SPDX-License-Identifier: Apache-2.0
"""Scaling of the queries for retrieval far past the trained window."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ropewalk.maps.numbers import whole

QueryScalingKind = Literal["log-n", "yarn"]


@dataclass(frozen=True)
class QueryScaling:
    """Factor that multiplies the query at true position m, on a model trained on L tokens.

    "log-n" (arXiv 2202.12172): `max(1, log(m + 1) / log(L))`; "yarn" (arXiv 2309.00071): `(0.1 ln(m / L) + 1)^2` for
    m > L, else 1. Both are 1 inside the trained window.
    """

    kind: QueryScalingKind
    trained_window: int

    def __post_init__(self) -> None:
        if self.kind not in get_args(QueryScalingKind):
            raise ValueError(f"query scaling must be one of {', '.join(get_args(QueryScalingKind))}, got {self.kind!r}")
        object.__setattr__(self, "trained_window", whole("trained_window", self.trained_window, at_least=2))

    def __call__(self, tokens: Tensor) -> Tensor:
        """Factors (float32) for queries at true positions `tokens`, same shape."""
        tokens = tokens.double()
        if self.kind == "log-n":
            factors = torch.log(tokens + 1) / math.log(self.trained_window)
        else:
            factors = (0.1 * torch.log((tokens / self.trained_window).clamp(min=1)) + 1) ** 2
        return factors.clamp(min=1).float()
