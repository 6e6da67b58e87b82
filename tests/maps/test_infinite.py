# SPDX-License-Identifier: Apache-2.0
import math

from ropewalk.maps import Infinite


def test_every_block_is_a_text_of_its_own():
    assert Infinite(3).relative_positions(7).tolist() == [
        [0, -1, -1, -1, -1, -1, -1],
        [1, 0, -1, -1, -1, -1, -1],
        [2, 1, 0, -1, -1, -1, -1],
        [-1, -1, -1, 0, -1, -1, -1],
        [-1, -1, -1, 1, 0, -1, -1],
        [-1, -1, -1, 2, 1, 0, -1],
        [-1, -1, -1, -1, -1, -1, 0],
    ]


def test_for_length_takes_blocks_of_the_trained_window():
    assert Infinite.for_length(100_000, 4096) == Infinite(4096)
    assert Infinite(4096).max_length(4096) == math.inf
    assert Infinite(4097).max_length(4096) == 4096
