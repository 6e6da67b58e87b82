# SPDX-License-Identifier: Apache-2.0
"""What the prefill kernels take: attention to the keys of one or two bands, in one pass."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ropewalk.maps.edges import BEGINNING, PAST_QUERY, Edge


@dataclass(slots=True, eq=False)
class Banded:
    """Queries that see near keys through (query, key) and far ones through (far_query, far_key), with one softmax.

    The last query is beside the last key. The query at position m sees the keys `near_low(m) <= n < near_high(m)` near
    and those before `far_high(m)`, which is never past `near_low(m)`, far. Tensors have a last stride of 1 and may
    share memory.

    Args:
        query: (batch, heads, queries, head_dim).
        key, value: (batch, key heads, keys, head_dim), keys >= queries; heads is a multiple of key heads.
        scale: of the scores, above 0.
        far_query: shaped as query, re-rotated to its far positions; queries without far keys may hold anything. None if
            nothing is far.
        far_key: (batch, key heads, far slots, head_dim), the first keys re-rotated to their far positions; far slots is
            at least `far_high` of the last query, and what lies past that is not read.
        softcap: `softcap * tanh(score / softcap)` instead of the score.
        sinks: (heads,), a logit a head that takes part in the softmax and adds nothing.
        slopes: (heads,), takes `slope * (query position - key position)` away from each score (ALiBi).
        near_positions, far_positions: where queries and keys are near and far, float32, (keys,) each, by slot; None for
            their slots. Not looked at without slopes.
        return_lse: whether the log-sum-exp is wanted as well: the natural logarithm of the softmax's denominator, sink
            included, float32, (batch, heads, queries). A query that sees no key gives zeros, and -inf without a sink.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    near_low: Edge = BEGINNING
    near_high: Edge = PAST_QUERY
    far_query: Tensor | None = None
    far_key: Tensor | None = None
    far_high: Edge = BEGINNING
    softcap: float | None = None
    sinks: Tensor | None = None
    return_lse: bool = False
    slopes: Tensor | None = None
    near_positions: tuple[Tensor | None, Tensor | None] = (None, None)
    far_positions: tuple[Tensor | None, Tensor | None] = (None, None)

    @property
    def is_diagonal(self) -> bool:
        """Whether every edge is a diagonal or the first key, and the query's own key is the last that it sees."""
        edges = self.near_low, self.far_high
        return self.near_high == PAST_QUERY and all(edge.is_diagonal or edge.is_beginning for edge in edges)

    @property
    def has_far(self) -> bool:
        """Whether some query sees a far key."""
        return self.far_query is not None and self.far_high(self.key.shape[2] - 1) > 0
