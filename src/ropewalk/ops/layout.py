# SPDX-License-Identifier: Apache-2.0
"""Which slots of a batch's keys and queries hold tokens."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor

Slots = slice | Tensor

GAPS = "a compiled decode step takes rows that are padded on the left only, and key_mask has gaps"


@dataclass(frozen=True)
class Span:
    """Rows of a batch that hold the same slots. A token's true position is its index among `keys`; the queries are the
    last of them."""

    rows: slice
    queries: Slots
    keys: Slots

    @property
    def count(self) -> int:
        """Keys."""
        return _count(self.keys)

    @property
    def count_queries(self) -> int:
        """Queries."""
        return _count(self.queries)

    @property
    def has_gaps(self) -> bool:
        """Whether slots without a token lie between the keys."""
        return isinstance(self.keys, Tensor)


@dataclass(eq=False)
class Step:
    """What one query a row sees, as kernels read it: the slots `first_slots .. lengths - 1`, none where that is empty.

    Args:
        lengths: (batch,), int64: slots up to the query's own, on the device of the queries; None for all slots.
        first_slots: (batch,), likewise; None for slot 0.
        tokens: of the longest row; None where only the device knows.
    """

    lengths: Tensor | None
    first_slots: Tensor | None
    tokens: int | None
    # Set by integrations, which check a length that only the device knows once a forward pass.
    limits_checked: bool = field(default=False, init=False)
    # Factors on the queries by what scales them: all layers of a forward pass scale alike.
    query_factors: dict[object, Tensor] = field(default_factory=dict, init=False)

    def positions(self, slots: int, device: torch.device) -> Tensor:
        """True positions of the queries, (batch,) or (1,), among `slots` key slots."""
        positions = torch.full((1,), slots - 1, device=device) if self.lengths is None else self.lengths - 1
        return positions if self.first_slots is None else positions - self.first_slots


@dataclass(eq=False)
class Layout:
    """Where tokens lie in the key and query slots of one call. Slots that hold no token are never seen.

    Args:
        query_length: slots of the query tensor.
        key_length: slots of the key tensor.
        query_start: key slot of the first query; by default the queries are the last keys. A tensor (one element) for
            static caches. Key slots after the last query are not yet written.
        key_mask: bool, shape (batch, key slots): which slots hold a token; by default all. Key slots past its end hold
            none. A row may be padded left, right, or in between: positions count its tokens alone.
    """

    query_length: int
    key_length: int
    query_start: int | Tensor | None = None
    key_mask: Tensor | None = None
    # Set by integrations, which check the positions a framework counts against the mask, once a forward pass.
    positions_checked: bool = field(default=False, init=False)
    # Set by integrations in what torch.compile traces: `lengths` and `first_slots` of a `Step`, for all layers.
    traced_slots: tuple[Tensor, Tensor] | None = field(default=None, init=False)
    # By device: the layers of a model may be spread over several.
    _steps: dict[torch.device, Step | None] = field(default_factory=dict, init=False, repr=False)
    _copies: dict[torch.device, Self] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def first_query(self) -> int:
        """Key slot of the first query. Reads the device once where `query_start` is a tensor."""
        if self.query_start is None:
            return self.key_length - self.query_length
        return int(self.query_start)

    def on(self, device: torch.device) -> Self:
        """The same, with its mask on a device: the layers of a model may be spread over several."""
        if self.key_mask is None or self.key_mask.device == device:
            return self
        if device not in self._copies:
            self._copies[device] = replace(self, key_mask=self.key_mask.to(device))
        return self._copies[device]

    def step(self, batch: int, device: torch.device) -> Step | None:
        """What one query a row sees; None where a row has gaps, which only spans describe.

        Reads the device once where there is a key mask, to see whether there are gaps; never otherwise. While a CUDA
        graph is captured it cannot be read: the device then checks the mask itself, at each replay.
        """
        if device not in self._steps:
            self._steps[device] = self._make_step(batch, device)
        return self._steps[device]

    def _make_step(self, batch: int, device: torch.device) -> Step | None:
        start = self.key_length - 1 if self.query_start is None else self.query_start
        if isinstance(start, Tensor):
            # What is on the host is read there, which waits for nothing.
            known = start.device.type == "cpu" != device.type
            start = self.first_query if known else start.reshape(1).to(device)
        if self.key_mask is None:
            if isinstance(start, Tensor):
                return Step(start.expand(batch) + 1, None, None)
            everything = start + 1 == self.key_length
            return Step(None if everything else torch.full((batch,), start + 1, device=device), None, start + 1)
        lengths, first_slots, gaps = left_padding(self.key_mask.to(device), start + 1)
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            torch._assert_async(~gaps, GAPS)
            return Step(lengths, first_slots, None)
        has_gaps, tokens = torch.stack((gaps.long(), (lengths - first_slots).amax())).tolist()
        return None if has_gaps else Step(lengths, first_slots, tokens)

    def spans(self, batch: int) -> tuple[Span, ...]:
        """Rows with their slots, neighbors with the same slots together. Rows without queries are left out."""
        if self.key_mask is None:
            end = self.first_query + self.query_length
            return (Span(slice(0, batch), slice(0, self.query_length), slice(0, end)),)
        return self._masked_spans

    @cached_property
    def _masked_spans(self) -> tuple[Span, ...]:
        assert self.key_mask is not None
        end = self.first_query + self.query_length
        mask = self.key_mask[:, :end].bool().cpu()
        changed = (mask[1:] != mask[:-1]).any(dim=1).nonzero().flatten() + 1
        edges = [0, *changed.tolist(), mask.shape[0]]
        spans = []
        for first_row, next_row in pairwise(edges):
            keys = mask[first_row].nonzero().flatten()
            queries = keys[keys >= self.first_query] - self.first_query
            if len(queries):
                device = self.key_mask.device
                spans.append(Span(slice(first_row, next_row), _slots(queries, device), _slots(keys, device)))
        return tuple(spans)


def left_padding(key_mask: Tensor, end: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the query in slot `end - 1` sees if each row's tokens are the last of the slots before `end`.

    Returns:
        `lengths` and `first_slots` of a `Step`, and whether some row is not like that: bool, no dimensions.
    """
    slots = torch.arange(key_mask.shape[1], device=key_mask.device)
    seen = key_mask.bool() & (slots < end)
    count = seen.sum(dim=1)
    first_slots = end - count
    return first_slots + count, first_slots, (seen & (slots < first_slots[:, None])).any()


def _count(slots: Slots) -> int:
    return slots.stop - slots.start if isinstance(slots, slice) else len(slots)


def _slots(indices: Tensor, device: torch.device) -> Slots:
    """A slice where the indices are consecutive, which costs no copy."""
    first, last = int(indices[0]), int(indices[-1])
    if last - first + 1 == len(indices):
        return slice(first, last + 1)
    return indices.to(device)
