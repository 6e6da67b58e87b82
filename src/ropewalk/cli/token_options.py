# SPDX-License-Identifier: Apache-2.0
"""Options that are numbers of tokens."""

from __future__ import annotations

from typing import Any

import typer

from ropewalk.cli.errors import UserError
from ropewalk.maps.positions import UNBOUNDED
from ropewalk.token_counts import tokens


def token_option(*declared: str, help: str, **more: Any) -> Any:
    """An option that takes 4096 or 16k."""
    return typer.Option(*declared, parser=_parsed, metavar="TOKENS", help=help, **more)


def check_tokens(option: str, value: int, at_least: int = 1, at_most: int = UNBOUNDED) -> None:
    """Refuses a number of tokens that no text has.

    Raises:
        UserError: `value` is below `at_least`, or past every length that positions are computed for.
    """
    if not at_least <= value <= at_most:
        raise UserError(f"{option} must be from {at_least} to {at_most}, got {value}")


def _parsed(typed: str | int) -> int:
    if isinstance(typed, int):  # an option's default
        return typed
    try:
        return tokens(typed)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
