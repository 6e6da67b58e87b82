# SPDX-License-Identifier: Apache-2.0
"""Maps of any bands, for hypothesis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hypothesis import strategies as st

from ropewalk.maps.base import Band, PositionMap
from ropewalk.maps.edges import BEGINNING, PAST_QUERY, Edge
from ropewalk.maps.positions import TRUE_POSITIONS, Capped, Constant, Cyclic, Grouped, Scaled


@dataclass(frozen=True)
class Bands(PositionMap):
    """A map of the bands that it is given."""

    name: ClassVar[str] = "bands"
    bands: tuple[Band, ...] = ()

    @classmethod
    def _for_length(cls, target_length, trained_window):
        raise NotImplementedError


positions = st.one_of(
    st.just(TRUE_POSITIONS),
    st.builds(Grouped, st.integers(1, 7), st.integers(0, 20)),
    st.builds(Scaled, st.sampled_from([1.0, 2.5]), st.sampled_from([0.0, 7.25])),
    st.builds(Constant, st.integers(0, 20)),
    st.builds(Capped, st.integers(0, 30)),
    st.builds(Cyclic, st.integers(1, 9), st.integers(0, 9), st.none() | st.integers(0, 12)),
)


@st.composite
def edges_up_to(draw, edge, longest):
    """An edge that no query has past `edge`."""
    kind = draw(st.sampled_from(["same", "diagonal", "chunks", "capped", "beginning"]))
    if kind == "same" or edge.is_beginning:
        return edge
    if kind == "beginning":
        return BEGINNING
    if kind == "capped":
        cap = draw(st.integers(0, longest))
        return Edge(edge.back, edge.block, cap if edge.cap is None else min(cap, edge.cap))
    if kind == "diagonal":
        # A chunk's beginning is at most so far behind a diagonal.
        return Edge(edge.back + edge.block - 1 + draw(st.integers(0, longest)), cap=edge.cap)
    return Edge(max(edge.back, 0) + draw(st.integers(0, longest)), edge.block * draw(st.integers(1, 9)), edge.cap)


@st.composite
def random_maps(draw, longest=40):
    """Up to three bands, with or without keys between them that are not seen, in a text of about `longest` tokens."""
    bands, high = [], PAST_QUERY
    for _ in range(draw(st.integers(1, 3))):
        # The nearest band holds every query's own key.
        low = draw(edges_up_to(high if bands else Edge(0), longest))
        bands.append(Band(low, high, draw(positions), draw(positions)))
        high = draw(edges_up_to(low, longest))
    return Bands(tuple(bands), start=draw(st.just(0) | st.integers(0, longest)))
