# SPDX-License-Identifier: Apache-2.0
"""Public-domain texts for the demo and the evaluation, and the built-in presets. Sources: README.md in this folder."""

from __future__ import annotations

from functools import cache
from importlib.resources import files


@cache
def alice() -> str:
    """Lewis Carroll, "Alice's Adventures in Wonderland" (1865): all of it, paragraphs apart by empty lines."""
    return files(__name__).joinpath("alice.txt").read_text(encoding="ascii")
