# SPDX-License-Identifier: Apache-2.0
"""One rule for the numbers that people, files and other libraries hand over."""

from __future__ import annotations

import math
from numbers import Integral, Real

# Longer than any text: what would begin past this many tokens never begins.
UNBOUNDED = 1 << 48


def whole(name: str, value: object, at_least: int = -UNBOUNDED, at_most: int = UNBOUNDED) -> int:
    """`value` as a plain int: whole numbers of any library are taken, booleans and floats are not.

    Raises:
        ValueError: it is no whole number, or not from `at_least` to `at_most`; the message calls it `name`.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    number = int(value)
    if number < at_least:
        raise ValueError(f"{name} must be {at_least} or more, got {number}")
    if number > at_most:
        raise ValueError(f"{name} must be at most {at_most}, got {number}")
    return number


def real(name: str, value: object, at_least: float = -math.inf) -> float:
    """`value` as a plain float, or as the int that it is.

    Raises:
        ValueError: it is no number, not finite, too large for a float or less than `at_least`; the message calls it
            `name`.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name} must be a number, got {value!r}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} must be a finite number, got {value}")
    if number < at_least:
        raise ValueError(f"{name} must be {at_least} or more, got {value}")
    return int(value) if isinstance(value, Integral) and abs(number) < UNBOUNDED else number
