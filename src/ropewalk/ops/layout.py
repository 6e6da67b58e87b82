"""Which slots of a batch's keys and queries hold tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

Slots = slice | Tensor


@dataclass(frozen=True)
class Span:
    """Rows of a batch that hold the same slots. A token's true position is its index among `keys`; the queries are the
    last of them."""

    rows: slice
    queries: Slots
    keys: Slots


@dataclass(eq=False)
class Layout:
    """Where tokens lie in the key and query slots of one call. Slots that hold no token are never seen.

    Args:
        query_length, key_length: slots of the query and of the key tensor.
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

    @cached_property
    def first_query(self) -> int:
        """Key slot of the first query. Reads the device once where `query_start` is a tensor."""
        if self.query_start is None:
            return self.key_length - self.query_length
        return int(self.query_start)

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


def _slots(indices: Tensor, device: torch.device) -> Slots:
    """A slice where the indices are consecutive, which costs no copy."""
    first, last = int(indices[0]), int(indices[-1])
    if last - first + 1 == len(indices):
        return slice(first, last + 1)
    return indices.to(device)
