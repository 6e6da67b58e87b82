# SPDX-License-Identifier: Apache-2.0
import pytest

from ropewalk import LeakyReRoPE


def test_far_keys_are_at_real_distances():
    assert LeakyReRoPE(2, 3).relative_positions(6)[5].tolist() == [4, 3.5, 3, 2, 1, 0]


@pytest.mark.parametrize(("factor", "longest"), [(8, 25_593), (1, 4096), (2.5, 8702)])
def test_longest_text(factor, longest):
    # (N - 1) / k + W - W / k <= L - 1, so N = floor((L - 1 - W) * k) + W + 1.
    assert LeakyReRoPE(factor, 1024).max_length(4096) == longest


@pytest.mark.parametrize("trained_window", [3, 16, 33, 4096])
@pytest.mark.parametrize("target_length", [1, 5, 16, 4096, 4097, 100_000])
def test_for_length_takes_the_smallest_whole_factor_that_keeps_the_rule(target_length, trained_window):
    chosen = LeakyReRoPE.for_length(target_length, trained_window)
    assert chosen.meets_rule(target_length, trained_window)
    one_less = chosen.factor - 1
    assert one_less == 0 or not LeakyReRoPE(one_less, chosen.window).meets_rule(target_length, trained_window)
