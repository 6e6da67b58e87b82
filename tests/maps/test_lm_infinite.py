# SPDX-License-Identifier: Apache-2.0
import math

from ropewalk.maps import LMInfinite, SlidingWindow


def test_distances_of_the_first_keys_are_limited_and_the_middle_is_hidden():
    # Section 4.1 with n_global = 2 and the limit at 3.
    assert LMInfinite(sinks=2, window=3).relative_positions(7).tolist() == [
        [0, -1, -1, -1, -1, -1, -1],
        [1, 0, -1, -1, -1, -1, -1],
        [2, 1, 0, -1, -1, -1, -1],
        [3, 2, 1, 0, -1, -1, -1],
        [3, 3, 2, 1, 0, -1, -1],
        [3, 3, -1, 2, 1, 0, -1],
        [3, 3, -1, -1, 2, 1, 0],
    ]


def test_without_sinks_it_is_the_sliding_window():
    assert LMInfinite(0, 7).bands == SlidingWindow(7).bands


def test_for_length_is_the_setting_of_the_paper_inside_the_window():
    assert LMInfinite.for_length(200_000_000, 4096) == LMInfinite(10, 4095)
    assert LMInfinite(10, 4095).max_length(4096) == math.inf
    # The paper's own limit is the first distance that was not trained.
    assert LMInfinite(10, 4096).max_length(4096) == 4096
