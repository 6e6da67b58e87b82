# SPDX-License-Identifier: Apache-2.0
"""Where a model computes: accelerate's hooks keep weights elsewhere until they are needed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

# Of a module with hooks: they, and what its forward was before them, which they call.
HOOK, OLD_FORWARD = "_hf_hook", "_old_forward"


def place(model: nn.Module) -> torch.device:
    """The device that a model takes its tokens on: of its first weights or, where those are offloaded, the one that
    they are brought to."""
    device = next(model.parameters()).device
    if device.type == "meta":
        return next(_execution_devices(model), device)
    return device


def _execution_devices(model: nn.Module) -> Iterator[torch.device]:
    for module in model.modules():
        hook: Any = vars(module).get(HOOK)
        for one in getattr(hook, "hooks", (hook,)):  # several in a sequence
            if (found := getattr(one, "execution_device", None)) is not None:
                yield torch.device(found)
