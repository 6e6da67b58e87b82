# SPDX-License-Identifier: Apache-2.0
"""One rule for numbers, wherever a map takes one."""

import math
from fractions import Fraction
from functools import partial
from itertools import product
from typing import get_args

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ropewalk.maps import MAPS, SELF, LeakyReRoPE, SelfExtend, from_dict
from ropewalk.maps.numbers import UNBOUNDED, real, whole
from ropewalk.maps.query_scaling import QueryScaling
from ropewalk.maps.self_ import Grouping
from ropewalk.testing.maps import example_maps

NUMPY_INTEGERS = [numpy.int8, numpy.uint8, numpy.int32, numpy.int64, numpy.uint64]
# What is no whole number, or none that any text or model has.
NOT_WHOLE = [True, False, numpy.True_, 4.0, 1.5, numpy.float32(4), math.nan, math.inf, "4", None, [4], 4j, Fraction(4)]
HUGE = [UNBOUNDED + 1, 1 << 62, 1 << 63, 1 << 64, 10**30, 10**400]
NOT_REAL = [True, "2", None, [2.0], 2j, math.nan, math.inf, -math.inf, numpy.float32("nan"), 10**400]

over_maps = pytest.mark.parametrize("kind", MAPS.values(), ids=MAPS)


@given(st.integers(-(1 << 62), 1 << 62))
def test_whole_numbers_of_every_library_are_taken(value):
    if abs(value) > UNBOUNDED:
        with pytest.raises(ValueError, match=rf"size must be .*, got {value}$"):
            whole("size", value)
    else:
        assert whole("size", value) == whole("size", numpy.int64(value)) == value
        assert type(whole("size", numpy.int64(value))) is int


@pytest.mark.parametrize("integer", NUMPY_INTEGERS)
def test_numpys_integers_become_pythons(integer):
    position_map = SelfExtend(integer(2), integer(4), start=integer(3))
    assert position_map == SelfExtend(2, 4, start=3)
    assert repr(position_map) == repr(SelfExtend(2, 4, start=3))
    assert all(type(value) is int for name, value in position_map.to_dict().items() if name != "map")


@pytest.mark.parametrize("value", NOT_WHOLE, ids=repr)
def test_what_is_no_whole_number_is_refused(value):
    with pytest.raises(ValueError, match=r"^size must be a whole number, got "):
        whole("size", value)


@pytest.mark.parametrize(("value", "expected"), [(2, 2), (2.5, 2.5), (numpy.float32(0.5), 0.5), (numpy.int64(3), 3)])
def test_numbers_become_pythons(value, expected):
    assert real("rate", value) == expected
    assert type(real("rate", value)) is type(expected)


@pytest.mark.parametrize("value", NOT_REAL, ids=repr)
def test_what_is_no_finite_number_is_refused(value):
    with pytest.raises(ValueError, match=r"^rate must be a (finite )?number, got "):
        real("rate", value)


# The rule, wherever a map is asked for one.


def parameters(kind, hint):
    """Names of the parameters of a kind of map that are written as of one type."""
    return [name for name, written in kind.__dataclass_fields__.items() if written.type == hint]


@over_maps
@pytest.mark.parametrize("value", [*NOT_WHOLE, *HUGE], ids=lambda value: f"{value!r:.20}")
def test_every_whole_parameter_of_every_map_keeps_the_rule(kind, value):
    example = example_maps()[kind.name][0].to_dict()
    assert "start" in parameters(kind, "int")
    for name in parameters(kind, "int"):
        with pytest.raises(ValueError, match=rf"^{name} must be "):
            from_dict({**example, name: value})


@pytest.mark.parametrize("value", NOT_REAL, ids=lambda value: f"{value!r:.20}")
def test_every_real_parameter_of_every_map_keeps_the_rule(value):
    kinds = [kind for kind in MAPS.values() if parameters(kind, "float")]
    assert {SELF, LeakyReRoPE} <= set(kinds)
    for kind in kinds:
        for name in parameters(kind, "float"):
            with pytest.raises(ValueError, match=rf"^{name} must be "):
                from_dict({**example_maps()[kind.name][0].to_dict(), name: value})


@over_maps
@pytest.mark.parametrize("value", [*NOT_WHOLE, *HUGE, 0, -5], ids=lambda value: f"{value!r:.20}")
def test_every_length_keeps_the_rule(kind, value):
    example = example_maps()[kind.name][0]
    for call in (
        lambda: kind.for_length(value, 64),
        lambda: kind.for_length(64, value),
        lambda: example.max_length(value),
        lambda: example.recommended_length(value),
        lambda: example.meets_rule(64, value),
    ):
        with pytest.raises(ValueError, match=r"^(target_length|trained_window) must be "):
            call()
    if value != 0:
        for call in (lambda: example.meets_rule(value, 64), lambda: example.largest_relative_position(value)):
            with pytest.raises(ValueError, match=r"^length must be "):
                call()
        with pytest.raises(ValueError, match=r"^length must be "):
            example.relative_positions(value)


@pytest.mark.parametrize("value", [*NOT_WHOLE, *HUGE, 0, 1], ids=lambda value: f"{value!r:.20}")
def test_the_scaling_of_queries_keeps_the_rule(value):
    with pytest.raises(ValueError, match=r"^trained_window must be "):
        QueryScaling("log-n", value)
    assert QueryScaling("yarn", numpy.int64(4096)) == QueryScaling("yarn", 4096)


def test_a_text_without_tokens_has_no_relative_positions():
    for example in (example for examples in example_maps().values() for example in examples):
        assert example.largest_relative_position(0) == -1
        assert example.relative_positions(0).shape == (0, 0)


def made(make):
    """A map, or the message of the `ValueError` that making it raised."""
    try:
        return make(), None
    except ValueError as error:
        return None, str(error)


@over_maps
@pytest.mark.parametrize("trained_window", [1, 2, 4096, 1 << 31, UNBOUNDED])
@pytest.mark.parametrize("target_length", [1, 4096, 1 << 31, 1 << 40, UNBOUNDED])
@pytest.mark.timeout(60)
def test_huge_lengths_are_reached_or_refused(kind, target_length, trained_window):
    chosen, refusal = made(lambda: kind.for_length(target_length, trained_window))
    if refusal:
        assert str(target_length) in refusal
    else:
        assert chosen.meets_rule(target_length, trained_window)


@over_maps
@pytest.mark.timeout(60)
def test_huge_parameters_are_computed_with_or_refused(kind):
    names = {*parameters(kind, "int"), *parameters(kind, "float")}
    for example, name, value in product(kind.examples(), names, (1 << 30, (1 << 40) + 3, UNBOUNDED)):
        huge, refusal = made(partial(from_dict, {**example.to_dict(), name: value}))
        if refusal:
            assert refusal.startswith(name)
            continue
        for length in (1, 50, UNBOUNDED):
            assert -1 <= huge.largest_relative_position(length) < length
        assert huge.max_length(4096) >= 1
        assert huge.relative_positions(20).shape == (20, 20)
        assert huge == from_dict(huge.to_dict())


@pytest.mark.parametrize("factor", [1e15, 1e300, 1.7976931348623157e308, 10**30])
def test_a_huge_factor_leaves_far_keys_at_the_window(factor):
    relative = LeakyReRoPE(factor, 4).relative_positions(9)
    assert relative[8].tolist() == pytest.approx([4, 4, 4, 4, 4, 3, 2, 1, 0])
    assert LeakyReRoPE(factor, 4).max_length(4096) == math.inf


@pytest.mark.parametrize("capacity", [2, 33, 1 << 14])
@pytest.mark.parametrize("rate", [5e-324, 1e-300, 1e-9, 1e-4, 0.02, 40.0, 1e300, 1.7976931348623157e308])
@pytest.mark.timeout(60)
def test_curves_out_of_all_proportion_end(capacity, rate):
    for grouping in get_args(Grouping):
        position_map = SELF(capacity, rate, 8, grouping)
        assert position_map.relative_positions(12)[11, 4:].tolist() == [7, 6, 5, 4, 3, 2, 1, 0]
        assert 11 <= position_map.largest_relative_position(UNBOUNDED) < UNBOUNDED


# Plain data.


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"map": "selfextent"}, r"unknown map 'selfextent': the maps are identity, selfextend"),
        ({}, r"unknown map None"),
        ({"map": 3}, r"unknown map 3"),
        ({"map": ["selfextend"]}, r"unknown map \['selfextend'\]"),
        ({"map": "rerope"}, r"'rerope' needs window"),
        ({"map": "selfextend"}, r"'selfextend' needs group_size and window"),
        ({"map": "identity", "window": 4}, r"'identity' has no parameter 'window': its parameters are start"),
        ({"map": "rerope", "window": 4, 5: 6}, r"'rerope' has no parameter 5: its parameters are start, window"),
        ({"map": "rerope", "window": 4, "groups": 2}, r"no parameter 'groups'"),
        ({"map": "self", "grouping": 3}, r"grouping must be one of anchored, distance, released, got 3"),
        (
            {"map": "self", "grouping": ["anchored"]},
            r"released, got \['anchored'\]",
        ),
        (["rerope", 4], r"described by a mapping"),
        ("rerope", r"described by a mapping"),
        (None, r"described by a mapping"),
    ],
)
def test_from_dict_raises_what_it_documents(data, message):
    with pytest.raises(ValueError, match=message):
        from_dict(data)


plain = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["", "4", "distance"])
    | st.lists(st.integers(), max_size=2)
)


@settings(deadline=None)
@given(
    st.sampled_from([*MAPS, "zzz"]),
    st.dictionaries(st.sampled_from(["window", "start", "factor", "rate", "capacity", "grouping", "x"]), plain),
)
def test_from_dict_of_anything_is_a_map_or_a_value_error(name, data):
    try:
        found = from_dict({"map": name, **data})
    except ValueError:
        return
    assert from_dict(found.to_dict()) == found
