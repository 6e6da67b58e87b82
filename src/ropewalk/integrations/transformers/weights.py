# SPDX-License-Identifier: Apache-2.0
"""What chosen tokens attend to under a map, for those who study heads: rows of the specification's weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ropewalk.ops import reference
from ropewalk.ops.call import Call, Positions


@dataclass(eq=False)
class _Record:
    """What is wanted of the passes that run in this thread, and what was found."""

    names: dict[nn.Module, str]
    queries: Sequence[int]
    found: dict[str, Tensor]


_record: ContextVar[_Record | None] = ContextVar("weights that are wanted", default=None)


@contextmanager
def recorded(model: nn.Module, queries: Sequence[int]) -> Iterator[dict[str, Tensor]]:
    """Notes the weights of these tokens of every pass in this thread, by the names of the layers.

    Raises:
        RuntimeError: at the end, where nothing was noted.
    """
    record = _Record({module: name for name, module in model.named_modules()}, queries, {})
    token = _record.set(record)
    try:
        yield record.found
    finally:
        _record.reset(token)
    if not record.found:
        raise RuntimeError(
            "no attention weights were noted: inside the block this model must read a text itself (a copy is another "
            "model), in the same thread and not compiled, and of blocks in each other the innermost notes"
        )


def note(module: nn.Module, call: Call) -> None:
    """Of one call of an attention module, if anybody wants them."""
    record = _record.get()
    if record is None or module not in record.names:
        return
    tokens = call.query.shape[2]
    for query in record.queries:
        if not -tokens <= query < tokens:
            raise IndexError(f"there is no token {query} in a pass of {tokens}")
    record.found[record.names[module]] = of_queries(call, [query % tokens for query in record.queries])


def of_queries(call: Call, queries: Sequence[int]) -> Tensor:
    """The weights of some queries of a call, float32, (batch, heads, queries, key slots)."""
    batch, heads, _, _ = call.query.shape
    found = call.query.new_zeros((batch, heads, len(queries), call.key.shape[2]), dtype=torch.float32)
    for span, part in call.parts():
        indices = torch.arange(call.query.shape[2], device=call.query.device)[span.queries].tolist()
        slots = torch.arange(call.key.shape[2], device=call.query.device)[span.keys]
        for number, query in enumerate(queries):
            if query in indices:
                at = indices.index(query)
                seen = part.past + at + 1
                row = reference.weights(_one(part, at, seen))[:, :, 0].float()
                # Rows of the span, all heads, this query, the slots that it may see.
                found[span.rows, :, number] = found[span.rows, :, number].index_copy(2, slots[:seen], row)
    return found


def _one(call: Call, query: int, seen: int) -> Call:
    """One query of a call without layout, and the keys up to its own."""
    at = call.positions
    return replace(
        call,
        query=call.query[:, :, query : query + 1],
        key=call.key[:, :, :seen],
        value=call.value[:, :, :seen],
        far_keys=None,
        positions=at and Positions(at.queries[:, query : query + 1], at.keys[:, :seen], at.axis_of_pair),
    )
