# SPDX-License-Identifier: Apache-2.0
"""Attributes that are set for a while, and put back as they were."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedConfig


class Changes:
    """What was set, and what was there before. Those of a copied model are the copy's."""

    def __init__(self) -> None:
        self._before: list[tuple[Any, str, bool, Any]] = []

    def set(self, owner: object, name: str, value: Any) -> None:
        """Sets an attribute of a configuration or a module, which may be one of its modules or buffers."""
        tables = [vars(owner).get(table, {}) for table in ("_modules", "_buffers")]
        there = next((table for table in tables if name in table), vars(owner))
        self._before.append((owner, name, name in there, there.get(name)))
        setattr(owner, name, value)

    def undo(self) -> None:
        """Puts back all that was set, the last first. Does nothing the second time."""
        while self._before:
            owner, name, there, value = self._before.pop()
            if there:
                setattr(owner, name, value)
            elif name in vars(owner):
                delattr(owner, name)


def own_configurations(modules: Iterable[nn.Module], changes: Changes) -> list[PreTrainedConfig]:
    """Gives modules copies of their configurations, which other models may hold too.

    Modules that shared a configuration share its copy, and so do configurations a part.

    Returns:
        The copies, each once.
    """
    copies: dict[int, Any] = {}
    found: dict[int, PreTrainedConfig] = {}
    for module in modules:
        for name, value in list(vars(module).items()):
            if isinstance(value, PreTrainedConfig):
                own = copy.deepcopy(value, copies)
                changes.set(module, name, own)
                found[id(own)] = own
    return list(found.values())
