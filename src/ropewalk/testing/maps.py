# SPDX-License-Identifier: Apache-2.0
"""Small instances of every position map, for tests that run over all of them. The maps themselves hold them."""

from __future__ import annotations

from ropewalk.maps import MAPS, PositionMap


def example_maps() -> dict[str, list[PositionMap]]:
    """Maps of each registered kind, by its name, for texts of a few dozen tokens."""
    return {name: list(kind.examples()) for name, kind in MAPS.items()}


def large_maps() -> list[PositionMap]:
    """Maps of the registered kinds for texts of a thousand tokens, with windows larger than implementations' blocks."""
    return [example for kind in MAPS.values() for example in kind.large_examples()]
