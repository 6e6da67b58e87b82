# SPDX-License-Identifier: Apache-2.0
"""Attributes that are set for a while, and put back as they were."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from ropewalk.integrations.transformers.place import OLD_FORWARD


class Changes:
    """What was set, and what was there before. Those of a copied model are the copy's."""

    def __init__(self) -> None:
        self._made: list[_Change] = []

    def set(self, owner: object, name: str, value: Any) -> None:
        """Sets an attribute of a configuration or a module, which may be one of its modules or buffers.

        A forward that accelerate's hooks are around is set inside of them.
        """
        if name == "forward" and OLD_FORWARD in vars(owner):
            name = OLD_FORWARD
        tables = [vars(owner).get(table, {}) for table in ("_modules", "_buffers")]
        there = next((table for table in tables if name in table), vars(owner))
        self._made.append(_Change(owner, name, value, name in there, there.get(name)))
        setattr(owner, name, value)

    def undo(self) -> None:
        """Puts back all that was set, the last first. Does nothing the second time."""
        while self._made:
            self._made.pop().undo()


@dataclass(eq=False)
class _Change:
    """An attribute that was set.

    Args:
        there, before: whether it had been there, and what it was.
    """

    owner: Any
    name: str
    value: Any
    there: bool
    before: Any

    def undo(self) -> None:
        if self.name in ("forward", OLD_FORWARD) and self._moved():
            return
        if self.there:
            setattr(self.owner, self.name, self.before)
        elif self.name in vars(self.owner):
            delattr(self.owner, self.name)

    def _moved(self) -> bool:
        """Whether hooks of accelerate came or went since, which put a forward elsewhere; it is then put back there."""
        other = OLD_FORWARD if self.name == "forward" else "forward"
        if vars(self.owner).get(other) is not self.value:
            return False
        # A module has a forward of its own where hooks are, or were.
        own = self.before if self.there else MethodType(type(self.owner).forward, self.owner)
        setattr(self.owner, other, own)
        return True


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
