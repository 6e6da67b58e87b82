# SPDX-License-Identifier: Apache-2.0
"""The rules for bands, which a map of somebody's own may break: told once, before anything is computed."""

from __future__ import annotations

import pytest
import torch
from random_maps import Bands

import ropewalk
from ropewalk.maps import Band
from ropewalk.maps.edges import BEGINNING, PAST_QUERY, Edge
from ropewalk.maps.positions import Grouped
from ropewalk.ops import attention
from ropewalk.testing import example_maps, tiny_model
from ropewalk.testing.maps import large_maps

NEAR = Band.at_distances(0, 8)
FAR = Band.at_distances(8, None, Grouped(3, 6), Grouped(3))
BROKEN = {
    "none": ((), "a tuple of bands, one or more, got ()"),
    "a list": ([NEAR, FAR], "a tuple of bands"),
    "numbers": ((1, 2), "a tuple of bands"),
    "far first": ((FAR, NEAR), "the first does not hold query 0's own key, but no key"),
    "without the own key": ((Band.at_distances(2, None),), "does not hold query 0's own key"),
    "an empty first band": ((Band.at_distances(0, 0), Band.at_distances(0, None)), "own key, but no key"),
    "overlap": ((NEAR, Band.at_distances(4, None, Grouped(3, 4), Grouped(3))), "number 2 holds .* past a band before"),
    "overlap, late": (
        (NEAR, Band(BEGINNING, Edge(8, cap=200)), Band(BEGINNING, Edge(300))),
        "number 3 holds .* past a band before",
    ),
    "the third before the second": (
        (NEAR, Band.at_distances(16, None), Band.at_distances(8, 16)),
        "number 3 holds .* past a band before",
    ),
    "the future": ((Band(Edge(3), Edge(-3)),), "number 1 holds keys 0 to 2 of query 0, past the query"),
    "a block of 0": ((NEAR, Band(BEGINNING, Edge(8, block=0))), "a block of 1 token or more"),
}


class Broken(Bands):
    """A map that says what bands it has, whatever they are."""


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("impl", ["auto", "reference", "blocks", "flash"])
def test_the_operator_refuses(name, impl):
    bands, message = BROKEN[name]
    x = torch.zeros(1, 1, 4, 8)
    with pytest.raises(ValueError, match=f"bands that no attention can follow: .*{message}".replace("()", r"\(\)")):
        attention(x, x, x, Broken(bands), None, impl=impl)


@pytest.mark.parametrize("name", BROKEN)
def test_extend_refuses(name):
    bands, _ = BROKEN[name]
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="bands that no attention can follow"):
        ropewalk.extend(model, Broken(bands))
    assert not hasattr(model, "ropewalk_extension")


def test_all_maps_keep_the_rules():
    for one in [*(one for maps in example_maps().values() for one in maps), *large_maps()]:
        one.check()
    for bands in ((NEAR, FAR), (Band(Edge(3), PAST_QUERY),), (NEAR, Band(BEGINNING, Edge(8, block=4, cap=12)))):
        Bands(bands).check()


def test_a_late_start_is_looked_at_from_there():
    """Queries before it see everything, whatever the bands would be."""
    own = Band(Edge(0, cap=None), PAST_QUERY)
    Bands((own, Band(BEGINNING, Edge(0)))).check()
    Bands((own, Band(BEGINNING, Edge(0))), start=100_000).check()


def test_abstract_kinds_are_refused():
    with pytest.raises(ValueError, match="PositionMap is no kind of map of its own"):
        ropewalk.PositionMap.for_length(100, 64)
    with pytest.raises(ValueError, match="PositionMap is no kind of map of its own"):
        ropewalk.extend(tiny_model("llama"), ropewalk.PositionMap, target_length=100)
