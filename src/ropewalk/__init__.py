"""Ropewalk lets a pretrained language model read far past its training window, without touching a weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ropewalk.maps import SELF, Identity, LeakyReRoPE, LengthError, PositionMap, ReRoPE, SelfExtend

if TYPE_CHECKING:
    from ropewalk.integrations.transformers import Extension, UnsupportedModelError, extend, restore

__version__ = "0.1.0"

_TRANSFORMERS = ("Extension", "UnsupportedModelError", "extend", "restore")

__all__ = [
    "SELF",
    "Extension",
    "Identity",
    "LeakyReRoPE",
    "LengthError",
    "PositionMap",
    "ReRoPE",
    "SelfExtend",
    "UnsupportedModelError",
    "extend",
    "restore",
]


def __getattr__(name: str) -> Any:
    # transformers takes seconds to import: only what needs it pays.
    if name in _TRANSFORMERS:
        from ropewalk.integrations import transformers

        return getattr(transformers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
