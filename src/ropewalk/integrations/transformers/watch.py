# SPDX-License-Identifier: Apache-2.0
"""Notices what was changed on a model since it was extended, before it would compute something else than was meant."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig


class ModelChangedError(RuntimeError):
    """An extended model was changed so that its map would no longer be right; the message says what was changed."""


@dataclass
class _Fact:
    """An entry of a module's or a configuration's attributes, or of one of a module's tables, that is to stay.

    Attributes:
        owner: module or configuration.
        table: "_modules", "_buffers", or empty for the attributes themselves.
        key, value: the entry.
        name: what to call it.
        measured: of a buffer, the frequencies that were measured.
    """

    owner: Any
    table: str
    key: str
    value: Any
    name: str
    measured: Tensor | None = None

    @property
    def entries(self) -> dict[str, Any]:
        attributes: dict[str, Any] = vars(self.owner)
        return attributes[self.table] if self.table else attributes

    def problem(self) -> str | None:
        """What is no longer as it was. A buffer that holds the same on another device is noted."""
        now = self.entries.get(self.key)
        if self.measured is not None:
            # Offloaded weights are on no device until they are needed.
            if not isinstance(now, Tensor):
                return f"{self.name} was removed"
            if now.is_meta or torch.equal(now.float().cpu(), self.measured.cpu()):
                self.value = now
                return None
            cast = "" if now.dtype == self.value.dtype else f" (cast to {now.dtype})"
            return f"the frequencies in {self.name} changed{cast}"
        if isinstance(self.value, str):
            return None if now == self.value else f"{self.name} was set to {now!r}"
        return None if now is self.value else f"{self.name} was replaced"


class Watch:
    """A forward pre-hook: a model is what it was when it was extended, or the call is an error.

    A few dozen comparisons of identity, so that it takes microseconds. What torch.compile traces is compared whenever
    it is traced, which is whenever something that it depends on was changed.

    Args:
        model: as it is to stay.
        modules: names of modules that are to stay where they are and to keep their configurations, which are to keep
            their attention implementation.
        frequencies: names of buffers, and what they are to hold.
    """

    def __init__(self, model: nn.Module, modules: Iterable[str], frequencies: Mapping[str, Tensor]) -> None:
        self._model = type(model).__name__
        self._register()
        # Identities, for quick comparison; made when first needed, as a copied model has its own.
        self._entries: list[tuple[dict[str, Any], str, Any]] | None = None
        self._versions: list[tuple[Tensor, int]] = []
        self._facts: list[_Fact] = []
        named = dict(model.named_modules(remove_duplicate=False))
        configurations = {}
        for name in {*modules, *(path for buffer in frequencies for path in paths(buffer)[:-1])} | {""}:
            if name:
                parent, _, key = name.rpartition(".")
                self._facts.append(_Fact(named[parent], "_modules", key, named[name], name))
            for key, value in vars(named[name]).items():
                if isinstance(value, PreTrainedConfig) and name in modules:
                    self._facts.append(_Fact(named[name], "", key, value, f"{name}.{key}".strip(".")))
                    configurations[id(value)] = value
        for value in configurations.values():
            key = "_attn_implementation_internal"
            self._facts.append(_Fact(value, "", key, vars(value)[key], "the attention implementation"))
        for name, measured in frequencies.items():
            owner, _, key = name.rpartition(".")
            self._facts.append(_Fact(named[owner], "_buffers", key, named[owner].get_buffer(key), name, measured))
            if isinstance(rope_type := vars(named[owner]).get("rope_type"), str):
                self._facts.append(_Fact(named[owner], "", "rope_type", rope_type, f"{owner}.rope_type"))

    def _register(self) -> None:
        self._key = str(next(_keys))
        _watches[self._key] = self

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_entries": None, "_versions": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._register()

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling():
            _check_traced(self._key)
        else:
            self.check()

    def problem(self) -> str | None:
        """What was changed, in words; None where nothing that matters was."""
        found = next(filter(None, (fact.problem() for fact in self._facts)), None)
        if found is None:
            self._entries = [(fact.entries, fact.key, fact.entries[fact.key]) for fact in self._facts]
            buffers = [fact.value for fact in self._facts if fact.measured is not None]
            self._versions = [(buffer, buffer._version) for buffer in buffers if not buffer.is_inference()]
        return found

    def check(self) -> None:
        """
        Raises:
            ModelChangedError: something that matters was changed.
        """
        if self._as_before():
            return
        if (problem := self.problem()) is not None:
            raise ModelChangedError(
                f"{problem} since this {self._model} was extended, so its position map no longer fits it: call "
                "ropewalk.restore(model), and extend it again once it is what it is to be"
            )

    def _as_before(self) -> bool:
        if self._entries is None:
            return False
        for entries, key, value in self._entries:
            if entries.get(key) is not value:
                return False
        return all(buffer._version == version for buffer, version in self._versions)


# What stands for a watch in a trace, where torch 2.11 takes constants alone.
_keys = itertools.count()
_watches: WeakValueDictionary[str, Watch] = WeakValueDictionary()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _check_traced(key: str) -> int:
    _watches[key].check()
    return 0


def paths(name: str) -> list[str]:
    """A module's name and those of the modules that it is in."""
    parts = name.split(".")
    return [".".join(parts[: count + 1]) for count in range(len(parts))]
