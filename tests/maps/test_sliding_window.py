# SPDX-License-Identifier: Apache-2.0
import math

from ropewalk.maps import SlidingWindow


def test_the_nearest_keys_are_seen():
    relative = SlidingWindow(2).relative_positions(4).tolist()
    assert relative == [[0, -1, -1, -1], [1, 0, -1, -1], [-1, 1, 0, -1], [-1, -1, 1, 0]]


def test_for_length_takes_the_trained_window():
    assert SlidingWindow.for_length(100_000, 4096) == SlidingWindow(4096)
    assert SlidingWindow(4096).max_length(4096) == math.inf
    assert SlidingWindow(4097).max_length(4096) == 4096


def test_hidden_keys_are_known():
    assert not SlidingWindow(4).sees_everything
    assert not SlidingWindow(4).is_identity
