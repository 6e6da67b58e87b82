# SPDX-License-Identifier: Apache-2.0
"""Rotary embeddings whose frequencies transformers computes anew for longer texts ("dynamic", "longrope")."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ropewalk.integrations.transformers.changes import Changes
from ropewalk.integrations.transformers.place import HOOK


def changes_with_length(module: nn.Module) -> bool:
    """Whether this is a rotary embedding whose frequencies transformers computes anew for longer texts."""
    return any("dynamic" in kind or kind == "longrope" for kind in _rope_types(module).values())


def _rope_types(module: nn.Module) -> Mapping[str | None, str]:
    """Of a rotary embedding, by kind of layer where there are several; none for other modules."""
    found = getattr(module, "rope_type", None)
    if isinstance(found, str):
        return {None: found}
    return found if isinstance(found, dict) else {}


def fixed(module: nn.Module, length: int) -> nn.Module:
    """A copy with the frequencies that the module itself computes for this length, which then stay."""
    # accelerate's hook is shared, as it may hold all offloaded weights.
    hook = vars(module).get(HOOK)
    fixed: Any = copy.deepcopy(module, {id(hook): hook})
    where = next(module.buffers())
    for layer_type in _rope_types(module):
        options = {} if layer_type is None else {"layer_type": layer_type}
        # A short text first: what the module grew to for an earlier, longer text would stay.
        for position in (0, length - 1):
            fixed(torch.empty(1, device=where.device), torch.tensor([[position]], device=where.device), **options)
    # In their forward pass "default" ones differ in nothing but that they stay as they are.
    kinds = fixed.rope_type
    fixed.rope_type = "default" if isinstance(kinds, str) else dict.fromkeys(kinds, "default")
    return fixed  # type: ignore[no-any-return]


def hold(model: nn.Module, length: int, changes: Changes) -> None:
    """Holds frequencies that change with the length at those of a text of `length` tokens, until the changes are
    undone: keys in a cache can be re-rotated only where all were rotated alike."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if changes_with_length(module):
            parent, _, attribute = name.rpartition(".")
            changes.set(model.get_submodule(parent), attribute, fixed(module, length))
