# SPDX-License-Identifier: Apache-2.0
"""How much of something fits into so many tokens, where counting the tokens is what takes long."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

# Every so many guesses one halves what is left; units that are alike need fewer.
_HALVED = 5


def most_that_fit(tokens: Callable[[int], int], limit: int, available: int, guess: int, least: int) -> int:
    """The largest number of units, up to `available`, that are no more than `limit` tokens together; 0 always fits.

    Each guess is what the tokens that are left, or too many, are worth in units so far: where units are alike, the
    second or third is right. Some guesses halve what is left, so that units of any size need few.

    Args:
        tokens: of so many units with all that is around them; more units never have fewer, or nearly so.
        guess: where to begin.
        least: tokens of what is around the units.
    """
    reached, beyond = 0, available + 1
    for turn in count(1):
        if beyond - reached <= 1:
            break
        if turn % _HALVED == 0:
            guess = (reached + beyond) // 2
        guess = min(max(guess, reached + 1), beyond - 1)
        counted = tokens(guess)
        if counted <= limit:
            reached = guess
        else:
            beyond = guess
        if counted == limit:
            break
        step = int((limit - counted) * guess / max(1, counted - least))
        guess += step or (1 if counted < limit else -1)
    return reached
