# SPDX-License-Identifier: Apache-2.0
"""Position maps: pure arithmetic on token positions, one map a file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ropewalk.maps.base import Band, LengthError, PositionMap, at_least
from ropewalk.maps.dual_chunk import DualChunk
from ropewalk.maps.identity import Identity
from ropewalk.maps.infinite import Infinite
from ropewalk.maps.leaky_rerope import LeakyReRoPE
from ropewalk.maps.lm_infinite import LMInfinite
from ropewalk.maps.registry import MapEntryPointError, Registry
from ropewalk.maps.rerope import ReRoPE
from ropewalk.maps.self_ import SELF
from ropewalk.maps.selfextend import SelfExtend
from ropewalk.maps.sliding_window import SlidingWindow
from ropewalk.maps.streaming_llm import StreamingLLM

# A new map is one file and one entry here: the generic tests, the command line and the plots then include it.
MAPS = Registry(
    Identity,
    SelfExtend,
    SELF,
    ReRoPE,
    LeakyReRoPE,
    DualChunk,
    StreamingLLM,
    LMInfinite,
    SlidingWindow,
    Infinite,
)


def from_dict(data: Mapping[str, Any]) -> PositionMap:
    """The map that `PositionMap.to_dict` described.

    Raises:
        ValueError: no map has that name, or its parameters are not those given, or one has a wrong type or value.
        MapEntryPointError: an installed package brings the map, and it cannot be used.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"a map is described by a mapping such as {Identity().to_dict()}, got {data!r}")
    parameters = dict(data)
    name = parameters.pop("map", None)
    if not isinstance(name, str) or name not in MAPS:
        raise ValueError(f"unknown map {name!r}: the maps are {', '.join(MAPS)}")
    kind = MAPS[name]
    own = {field.name: field.default is dataclasses.MISSING for field in dataclasses.fields(kind)}
    if unknown := [parameter for parameter in parameters if parameter not in own]:
        raise ValueError(f"map {name!r} has no parameter {unknown[0]!r}: its parameters are {', '.join(own)}")
    if missing := [parameter for parameter, needed in own.items() if needed and parameter not in parameters]:
        raise ValueError(f"map {name!r} needs {' and '.join(missing)}, got {data!r}")
    return kind(**parameters)


__all__ = [
    "MAPS",
    "SELF",
    "Band",
    "DualChunk",
    "Identity",
    "Infinite",
    "LMInfinite",
    "LeakyReRoPE",
    "LengthError",
    "MapEntryPointError",
    "PositionMap",
    "ReRoPE",
    "SelfExtend",
    "SlidingWindow",
    "StreamingLLM",
    "at_least",
    "from_dict",
]
