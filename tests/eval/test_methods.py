import pytest

from ropewalk.eval.methods import parse
from ropewalk.maps import SELF, LeakyReRoPE, SelfExtend


@pytest.mark.parametrize(
    ("text", "position_map"),
    [
        ("unmodified", None),
        ("selfextend(group_size=8, window=1024)", SelfExtend(8, 1024)),
        ("selfextend(group_size=8,window=1024,start=4096)", SelfExtend(8, 1024, start=4096)),
        ("self(capacity=16, rate=0.02, window=1024, grouping='distance')", SELF(16, 0.02, 1024, "distance")),
        ("leaky-rerope(factor=8, window=512)", LeakyReRoPE(8, 512)),
        ("selfextend", SelfExtend.for_length(16384, 8192)),
    ],
)
def test_a_name_says_all(text, position_map):
    method = parse(text, 16384, 8192)
    assert method.position_map == position_map
    assert parse(method.name, 1, 8192) == method


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("selfexend", "no method is called 'selfexend'. Did you mean 'selfextend'\\?"),
        ("unmodified(start=3)", "no method"),
        ("selfextend(8, 1024)", "a method is a name, or a name with parameters such as"),
        ("selfextend(group_size=open('x'))", "a method is a name"),
        ("selfextend(group_size=8, width=3)", "width"),
        ("selfextend(group_size=0, window=3)", "group_size"),
        ("", "a method is a name"),
    ],
)
def test_what_is_no_method(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text, 16384, 8192)
