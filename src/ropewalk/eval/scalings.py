# SPDX-License-Identifier: Apache-2.0
"""The baselines that scale a model's rotary frequencies, each with the factor that is usual for a length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

if TYPE_CHECKING:
    from ropewalk.integrations.transformers.rope_scaling import ScalingKind

# Trained windows: past so many, frequencies are too slow for the measurement that says whether a model rotates by them.
_LARGEST = 1024


@dataclass(frozen=True)
class RopeScaling:
    """Other rotary frequencies, by transformers' own rope parameters.

    Args:
        factor: how many times the trained window the text may be long, as rope parameters have it; from 1 to 1024.
    """

    name: ClassVar[ScalingKind]
    factor: float

    def __post_init__(self) -> None:
        number = isinstance(self.factor, int | float) and not isinstance(self.factor, bool)
        if not (number and 1 <= self.factor <= _LARGEST):
            raise ValueError(f"factor of {self.name} must be a number from 1 to {_LARGEST}, got {self.factor!r}")
        object.__setattr__(self, "factor", float(self.factor))

    @classmethod
    def for_length(cls, target_length: int, trained_window: int) -> Self:
        """The longest text's length in trained windows, at least 1."""
        return cls(max(1.0, target_length / trained_window))


class Linear(RopeScaling):
    """Position interpolation: every frequency divided by the factor (Chen et al. 2023, arXiv 2306.15595)."""

    name = "linear"


class NTK(RopeScaling):
    """NTK-aware scaling: the base times factor^(d / (d - 2)), with d the rotated dimensions of a head. Fast frequencies
    stay nearly as they are, the slowest is divided by the factor (bloc97 2023, a post; discussed in arXiv 2309.00071).
    """

    name = "ntk"

    @classmethod
    def for_length(cls, target_length: int, trained_window: int) -> Self:
        """Twice the length in trained windows where it is more than one, else 1.

        Only the slowest frequency is divided by the whole factor. Others that do not turn once in the trained window
        get less, so with the length alone they would reach angles that were never trained. The YaRN paper says
        likewise that the factor has to be set higher than the length asks for.
        """
        return cls(2 * target_length / trained_window if target_length > trained_window else 1.0)


class DynamicNTK(RopeScaling):
    """NTK-aware scaling that grows with the text: none up to the trained window L, and for n > L tokens by
    `factor * n / L - (factor - 1)` (emozilla 2023, a post; discussed in arXiv 2309.00071)."""

    name = "dynamic-ntk"


class YaRN(RopeScaling):
    """Slow frequencies interpolated, fast ones kept, and attention sharpened (Peng et al. 2023, arXiv 2309.00071)."""

    name = "yarn"


SCALINGS: tuple[type[RopeScaling], ...] = (Linear, NTK, DynamicNTK, YaRN)
