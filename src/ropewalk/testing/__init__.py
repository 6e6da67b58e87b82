# SPDX-License-Identifier: Apache-2.0
"""Helpers for tests: example maps, tiny models, references and error budgets."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ropewalk.testing.maps import example_maps
    from ropewalk.testing.models import REFUSED_MODELS, TINY_MODELS, tiny_model

# Imported on first use: each module needs only what it is for, and maps need no transformers.
_HOMES = {"example_maps": "maps", "tiny_model": "models", "TINY_MODELS": "models", "REFUSED_MODELS": "models"}

__all__ = ["REFUSED_MODELS", "TINY_MODELS", "example_maps", "tiny_model"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
