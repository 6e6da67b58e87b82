# SPDX-License-Identifier: Apache-2.0
"""What is stable (docs/reference/stability.md): what the reference pages describe is what the package exports."""

from __future__ import annotations

import dataclasses
import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest

import ropewalk
from ropewalk.maps import MAPS

REFERENCE = Path(__file__).parents[1] / "docs/reference"
DESCRIBED = {
    name
    for page in REFERENCE.glob("*.md")
    for name in re.findall(r"^::: (\S+)", page.read_text(encoding="utf-8"), re.MULTILINE)
}


def exported(module):
    return {f"{module}.{name}" for name in import_module(module).__all__}


def test_what_is_exported_is_described():
    # What ropewalk.maps exports as well is described by its shorter name; so is the type of `impl=`, with `attention`.
    again = {f"ropewalk.maps.{name}" for name in ropewalk.__all__} | {"ropewalk.ops.Implementation"}
    # Who writes a map needs these, and they are described beside it.
    parts = {name for name in DESCRIBED if name.startswith(("ropewalk.maps.positions.", "ropewalk.maps.edges."))}
    exports = exported("ropewalk") | exported("ropewalk.maps") | exported("ropewalk.ops")
    assert exports - again == DESCRIBED - parts


@pytest.mark.parametrize("name", sorted(DESCRIBED))
def test_what_is_described_is_there(name):
    module, _, attribute = name.rpartition(".")
    assert hasattr(import_module(module), attribute)


def test_every_map_is_exported():
    assert {kind.__name__ for kind in MAPS.built_in.values()} <= set(ropewalk.__all__)


def test_the_parameters_of_extend():
    """Further ones may come, at the end; none may go, move or change its default."""
    assert str(inspect.signature(ropewalk.extend)).startswith(
        "(model: 'PreTrainedModel', "
        "position_map: 'PositionMap | type[PositionMap] | Sequence[PositionMap] | None' = None, *, "
        "target_length: 'int | None' = None, trained_window: 'int | None' = None, "
        "sliding_window: 'SlidingWindowChoice' = 'keep', query_scaling: 'QueryScalingKind | None' = None, "
        "impl: 'Implementation' = 'auto', enforce_limit: 'bool' = True"
    )


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("identity", {}),
        ("selfextend", {"group_size": None, "window": None}),
        ("self", {"capacity": 33, "rate": 0.02, "window": 1024, "grouping": "anchored"}),
        ("rerope", {"window": None}),
        ("leaky-rerope", {"factor": None, "window": None}),
        ("dual-chunk", {"chunk_size": None, "window": None}),
        ("streaming-llm", {"sinks": None, "window": None}),
        ("lm-infinite", {"sinks": None, "window": None}),
        ("sliding-window", {"window": None}),
        ("infinite", {"window": None}),
    ],
)
def test_the_parameters_of_maps(name, parameters):
    """In this order; None for those that must be given."""
    fields = [field for field in dataclasses.fields(MAPS[name]) if field.name != "start"]
    missing = dataclasses.MISSING
    assert {field.name: None if field.default is missing else field.default for field in fields} == parameters
    assert [field.name for field in fields] == list(parameters)
