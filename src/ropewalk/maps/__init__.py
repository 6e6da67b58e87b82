"""Position maps: pure arithmetic on token positions, one map a file."""

from __future__ import annotations

from typing import Any

from ropewalk.maps.base import Band, LengthError, PositionMap
from ropewalk.maps.identity import Identity
from ropewalk.maps.leaky_rerope import LeakyReRoPE
from ropewalk.maps.rerope import ReRoPE
from ropewalk.maps.self_ import SELF
from ropewalk.maps.selfextend import SelfExtend

# A new map is one file and one entry here: the generic tests, the command line and the plots then include it.
MAPS: dict[str, type[PositionMap]] = {cls.name: cls for cls in (Identity, SelfExtend, SELF, ReRoPE, LeakyReRoPE)}


def from_dict(data: dict[str, Any]) -> PositionMap:
    """The map that `PositionMap.to_dict` described.

    Raises:
        ValueError: no map has that name, or a parameter is out of range.
    """
    parameters = dict(data)
    name = parameters.pop("map", None)
    if name not in MAPS:
        raise ValueError(f"unknown map {name!r}: the maps are {', '.join(MAPS)}")
    return MAPS[name](**parameters)


__all__ = [
    "MAPS",
    "SELF",
    "Band",
    "Identity",
    "LeakyReRoPE",
    "LengthError",
    "PositionMap",
    "ReRoPE",
    "SelfExtend",
    "from_dict",
]
