# SPDX-License-Identifier: Apache-2.0
"""Paths as they are typed."""

from __future__ import annotations

from pathlib import Path

import typer


def path(typed: str) -> Path:
    """For `parser=` of an option or an argument.

    Raises:
        BadParameter: nothing was typed, which Python would take for the folder it runs in.
    """
    if not typed.strip():
        raise typer.BadParameter(f"must name a file or a folder, got {typed!r}")
    return Path(typed)
