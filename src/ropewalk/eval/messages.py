# SPDX-License-Identifier: Apache-2.0
"""Errors in one line, for rows and for users."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


def in_one_line(error: Exception, characters: int = 200) -> str:
    """Its kind, and so much of its message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:characters]}"


def first_problem(error: ValidationError) -> str:
    """Of those in a record: where, and what."""
    detail = error.errors()[0]
    where = ".".join(map(str, detail["loc"]))
    return f"{where}: {detail['msg']}" if where else detail["msg"]
