"""Small instances of every position map, for tests that run over all of them."""

from __future__ import annotations

from ropewalk.maps import SELF, Identity, LeakyReRoPE, PositionMap, ReRoPE, SelfExtend
from ropewalk.maps.sliding_window import SlidingWindow


def example_maps() -> dict[str, list[PositionMap]]:
    """Instances of each registered map, by the map's name, for texts of a few dozen tokens.

    They hold what is easily got wrong: group sizes that do not divide the window, windows smaller than a group or
    larger than the text, the parameters that make the map the identity, and a late `start`.
    """
    return {
        "identity": [Identity(), Identity(start=7)],
        "selfextend": [
            SelfExtend(2, 4),
            SelfExtend(3, 5),
            SelfExtend(4, 3),
            SelfExtend(1, 4),
            SelfExtend(5, 1),
            SelfExtend(4, 100),
            SelfExtend(3, 4, start=9),
        ],
        "self": [
            SELF(5, 1.0, 3),
            SELF(5, 1.0, 3, "distance"),
            SELF(9, 0.3, 6),
            SELF(9, 0.3, 6, "distance"),
            SELF(4, 50.0, 1),
            SELF(4, 50.0, 1, "distance"),
            SELF(2, 0.5, 3),
            SELF(2, 0.5, 3, "distance"),
            SELF(33, 0.02, 100),
            SELF(6, 0.7, 4, start=11),
            SELF(6, 0.7, 4, "distance", start=11),
        ],
        "rerope": [ReRoPE(4), ReRoPE(1), ReRoPE(100), ReRoPE(3, start=8)],
        "leaky-rerope": [
            LeakyReRoPE(2, 4),
            LeakyReRoPE(2.5, 3),
            LeakyReRoPE(1, 4),
            LeakyReRoPE(3, 100),
            LeakyReRoPE(1.5, 5, start=9),
        ],
    }


def large_maps() -> list[PositionMap]:
    """Instances with windows larger than the blocks of the implementations, for texts of a thousand tokens."""
    return [
        SelfExtend(8, 256),
        SelfExtend(7, 300),
        SELF(9, 0.05, 100),
        SELF(9, 0.05, 100, "distance"),
        ReRoPE(257),
        LeakyReRoPE(3.7, 255),
        SlidingWindow(255),
    ]
