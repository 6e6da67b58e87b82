# SPDX-License-Identifier: Apache-2.0
"""Launches that cost the host little.

Triton looks at every argument of every call; a step of decoding has microseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
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
        self._named = {**constants, **options}
        # To be given after the arguments.
        self.constants = tuple(constants.values())
        self._compiled: Any = None

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        """What launches on the current device and stream: `launch[grid](*arguments, *launch.constants)`."""
        return partial(self._compile, grid) if self._compiled is None else self._compiled[grid]

    def _compile(self, grid: tuple[int, ...], *arguments: Any) -> None:
        """The first launch, which compiles. `_compiled` stays None in the interpreter."""
        tensors = arguments[: len(arguments) - len(self.constants)]
        self._compiled = self._kernel[grid](*tensors, **self._named)
