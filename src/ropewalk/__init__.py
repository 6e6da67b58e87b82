# SPDX-License-Identifier: Apache-2.0
"""Ropewalk lets a pretrained language model read far past its training window, without touching a weight."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ropewalk.maps import (
    SELF,
    DualChunk,
    Identity,
    Infinite,
    LeakyReRoPE,
    LengthError,
    LMInfinite,
    PositionMap,
    ReRoPE,
    SelfExtend,
    SlidingWindow,
    StreamingLLM,
)
from ropewalk.presets import Preset

if TYPE_CHECKING:
    from ropewalk.integrations.transformers.extend import Extension, extend, restore
    from ropewalk.integrations.transformers.probe import UnsupportedModelError
    from ropewalk.integrations.transformers.watch import ModelChangedError

__version__ = "0.1.0"

# What needs transformers, which takes seconds to import: only who asks for it pays.
_LAZY = {
    "Extension": "ropewalk.integrations.transformers.extend",
    "ModelChangedError": "ropewalk.integrations.transformers.watch",
    "UnsupportedModelError": "ropewalk.integrations.transformers.probe",
    "extend": "ropewalk.integrations.transformers.extend",
    "restore": "ropewalk.integrations.transformers.extend",
}

__all__ = [
    "SELF",
    "DualChunk",
    "Extension",
    "Identity",
    "Infinite",
    "LMInfinite",
    "LeakyReRoPE",
    "LengthError",
    "ModelChangedError",
    "PositionMap",
    "Preset",
    "ReRoPE",
    "SelfExtend",
    "SlidingWindow",
    "StreamingLLM",
    "UnsupportedModelError",
    "extend",
    "restore",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
