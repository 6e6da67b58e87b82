# SPDX-License-Identifier: Apache-2.0
import math

from ropewalk import ReRoPE


def test_every_far_key_is_at_the_window():
    assert ReRoPE(3).relative_positions(6)[5].tolist() == [3, 3, 3, 2, 1, 0]


def test_no_text_is_too_long():
    assert ReRoPE(1024).max_length(4096) == math.inf
    assert ReRoPE(1024).recommended_length(4096) == math.inf
    assert ReRoPE(4096).max_length(4096) == 4096
    assert ReRoPE.for_length(10**9, 4096) == ReRoPE(1024)
