"""Launches that cost the host little.

Triton looks at every argument of every call; a step of decoding has microseconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def multiples_of_16(numbers: Iterable[int]) -> bool:
    """Whether all are: of strides and addresses, what lets a kernel read sixteen bytes at a time."""
    together = 0
    for number in numbers:
        together |= number
    return together % 16 == 0


class Launch:
    """One kernel, launched many times with arguments of one kind.

    What Triton finds out about the arguments of the first call has to hold for all: the device, which are None, types
    (a whole number is no float), whether numbers and addresses are multiples of 16. A kernel's own annotations say how
    wide its whole numbers are.

    Args:
        kernel: a function under `triton.jit` whose last parameters are `constants`, in that order.
        options: of the compiler.
    """

    def __init__(self, kernel: Any, constants: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        self._kernel = kernel
        self._constants = dict(constants)
        self._options = dict(options)
        self._values = tuple(constants.values())
        self._compiled: Any = None

    def __call__(self, grid: tuple[int, int, int], *arguments: Any) -> None:
        """Launches on the current device and stream."""
        if self._compiled is None:
            # Stays None in the interpreter.
            self._compiled = self._kernel[grid](*arguments, **self._constants, **self._options)
        else:
            self._compiled[grid](*arguments, *self._values)
