# SPDX-License-Identifier: Apache-2.0
"""The table of implementations, the choice among them, and a call's way to one."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Literal, Protocol, cast, get_args

import torch
from torch import Tensor

from ropewalk.ops.call import Call, laid_side_by_side
from ropewalk.ops.layout import Step

Implementation = Literal["auto", "reference", "blocks", "flash", "fused"]

logger = logging.getLogger("ropewalk")


class Module(Protocol):
    """What the module of an implementation has."""

    def lacks(self, call: Call) -> str | None:
        """What the call needs that the implementation does not have; None if it has all. May be traced."""
        ...

    def attend(self, call: Call) -> Tensor:
        """The output of a call without layout that nothing is lacking for; shaped and typed as `attention` says."""
        ...


class SteppingModule(Module, Protocol):
    """Of an implementation that takes one query a row without being told on the host how long the rows are."""

    def attend_step(self, call: Call, step: Step) -> Tensor:
        """The output of a call of one query a row, whose slots `step` says."""
        ...


@dataclass(frozen=True)
class Entry:
    """How an implementation is found.

    Args:
        devices: types of devices for which "auto" thinks of it; None for all.
        steps: whether its module is a `SteppingModule`.
    """

    module: str
    devices: tuple[str, ...] | None
    steps: bool = False


# The fastest first. A new implementation is a module and an entry here; it is imported when it is first asked.
IMPLEMENTATIONS: dict[str, Entry] = {
    "fused": Entry("ropewalk.ops.fused", ("cuda",), steps=True),
    "flash": Entry("ropewalk.ops.flash", None),
    "blocks": Entry("ropewalk.ops.blocks", None),
    "reference": Entry("ropewalk.ops.reference", None),
}


_NAMES = get_args(Implementation)


def check_name(impl: str) -> None:
    """Raises ValueError where no implementation has that name."""
    if impl not in _NAMES:
        raise ValueError(f"impl must be one of {', '.join(_NAMES)}, got {impl!r}")


def choose(call: Call, impl: Implementation = "auto") -> str:
    """Name of the implementation that runs the call; the reason for a slower one than the fastest is logged once.

    Raises:
        ValueError: `impl` does not take the call.
    """
    if impl != "auto":
        reason = module(impl).lacks(call)
        if reason is not None:
            others = [name for name in IMPLEMENTATIONS if name != impl and module(name).lacks(call) is None]
            raise ValueError(f"attention: impl={impl!r} does not take {reason}; {', '.join(map(repr, others))} would")
        return impl
    faster: list[tuple[str, str]] = []
    for name, entry in IMPLEMENTATIONS.items():
        if entry.devices is None or call.query.device.type in entry.devices:
            reason = module(name).lacks(call)
            if reason is None:
                # A log would end the graph that torch.compile traces.
                if faster and not torch.compiler.is_compiling():
                    _log_slower(name, *faster[0])
                return name
            faster.append((name, reason))
    raise AssertionError("the reference takes every call")


def step_of(call: Call, name: str) -> Step | None:
    """What one query a row sees, if the implementation takes the call as a step."""
    if not IMPLEMENTATIONS[name].steps:
        return None
    batch, _, queries, _ = call.query.shape
    if queries != 1 or not batch or call.pages is not None:
        return None
    if call.layout is None:
        return Step(None, None, call.key.shape[2])
    return call.layout.step(batch, call.query.device)


def run(call: Call, name: str, step: Step | None = None) -> Tensor:
    """The output of a call by the implementation that `choose` named.

    The call is such that `check` finds nothing in it, or such as a framework is known to make.

    Args:
        step: as `step_of` gave it.
    """
    batch, heads, queries, _ = call.query.shape
    if not call.query.numel() or not call.value.numel():
        return call.query.new_zeros((batch, heads, queries, call.value.shape[3]))
    call = laid_side_by_side(call)
    chosen = module(name)
    if step is not None:
        return cast(SteppingModule, chosen).attend_step(call, step)
    if call.pages is not None:
        return chosen.attend(call)
    output = None
    for span, part in call.parts():
        result = chosen.attend(part)
        if result.shape[:3] == (batch, heads, queries):
            return result
        if output is None:
            output = result.new_zeros((batch, heads, queries, result.shape[3]))
        output[span.rows, :, span.queries] = result
    return call.query.new_zeros((batch, heads, queries, call.value.shape[3])) if output is None else output


@cache
def module(name: str) -> Module:
    """The module of an implementation."""
    return cast(Module, import_module(IMPLEMENTATIONS[name].module))


@cache
def _log_slower(chosen: str, faster: str, reason: str) -> None:
    # On a GPU much is lost, and few expect it.
    level = logging.WARNING if faster == "fused" else logging.INFO
    logger.log(level, "attention runs on impl=%r, slower than %r, which does not take %s", chosen, faster, reason)
