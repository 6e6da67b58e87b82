# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from ropewalk import SelfExtend
from ropewalk.maps import LengthError

# Figure 3 of the paper: group size 2, neighbor window 4, ten tokens on a model trained on seven.
FIGURE_3 = [
    [0, -1, -1, -1, -1, -1, -1, -1, -1, -1],
    [1, 0, -1, -1, -1, -1, -1, -1, -1, -1],
    [2, 1, 0, -1, -1, -1, -1, -1, -1, -1],
    [3, 2, 1, 0, -1, -1, -1, -1, -1, -1],
    [4, 3, 2, 1, 0, -1, -1, -1, -1, -1],
    [4, 4, 3, 2, 1, 0, -1, -1, -1, -1],
    [5, 5, 4, 3, 2, 1, 0, -1, -1, -1],
    [5, 5, 4, 4, 3, 2, 1, 0, -1, -1],
    [6, 6, 5, 5, 4, 3, 2, 1, 0, -1],
    [6, 6, 5, 5, 4, 4, 3, 2, 1, 0],
]


def test_figure_3_of_the_paper():
    assert SelfExtend(2, 4).relative_positions(10).tolist() == FIGURE_3
    assert SelfExtend(2, 4).max_length(trained_window=7) == 10


@pytest.mark.parametrize(
    ("group_size", "window", "trained_window", "longest"),
    [
        (8, 1024, 4096, 25_600),
        (16, 1024, 4096, 50_176),
        (4, 2048, 8192, 26_624),
        (1, 1024, 4096, 4096),
        (2, 4, 7, 10),
    ],
)
def test_eq_4_literals(group_size, window, trained_window, longest):
    assert SelfExtend(group_size, window).max_length(trained_window) == longest


@pytest.mark.parametrize("group_size", [1, 2, 3, 5, 8, 64])
@pytest.mark.parametrize("multiple", [1, 2, 7])
@pytest.mark.parametrize("room", [0, 1, 100])
def test_eq_4_whenever_the_group_size_divides_the_window(group_size, multiple, room):
    window = group_size * multiple
    trained_window = window + 1 + room
    longest = (trained_window - window) * group_size + window
    assert SelfExtend(group_size, window).max_length(trained_window) == longest


def test_eq_4_of_a_window_wider_than_the_trained_one_is_the_trained_one():
    assert SelfExtend(8, 1024).max_length(512) == 512


def test_far_band_continues_at_the_window_when_the_group_size_divides_it():
    relative = SelfExtend(4, 8).relative_positions(60)
    assert all(relative[m, m - 8] == 8 for m in range(8, 60))


def test_eq_5_literal():
    # L/2 > W + (N - W)/G: 2048 > 1024 + (N - 1024)/8 holds up to N = 9216, where floors let the last group in.
    assert SelfExtend(8, 1024).recommended_length(4096) == 9216


@pytest.mark.parametrize("trained_window", [4, 5, 16, 33, 64, 512])
def test_for_length_takes_the_smallest_group_size_that_keeps_the_rule(trained_window):
    default = max(1, trained_window // 8)
    group_sizes = range(1, trained_window + 2)
    choices = [SelfExtend(size, max(default // size, 1) * size) for size in group_sizes]
    recommended = [choice.recommended_length(trained_window) for choice in choices]
    farthest = max(recommended)
    for target_length in {1, 2, trained_window, 2 * trained_window, farthest // 2, farthest - 1, farthest}:
        if target_length > farthest:
            continue
        first = next(choice for choice, reach in zip(choices, recommended, strict=True) if reach >= target_length)
        assert SelfExtend.for_length(target_length, trained_window) == first
    with pytest.raises(LengthError, match=rf"{farthest + 1} tokens .* reaches {farthest} "):
        SelfExtend.for_length(farthest + 1, trained_window)


@pytest.mark.parametrize(("target_length", "trained_window"), [(16_384, 4096), (32_768, 8192), (1_000_000, 32_768)])
def test_one_group_less_does_not_keep_the_rule(target_length, trained_window):
    chosen = SelfExtend.for_length(target_length, trained_window)
    assert chosen.window % chosen.group_size == 0
    assert chosen.meets_rule(target_length, trained_window)
    less = chosen.group_size - 1
    assert not SelfExtend(less, trained_window // 8 // less * less).meets_rule(target_length, trained_window)


def test_a_text_that_eq_5_already_holds_for_is_left_alone():
    assert SelfExtend.for_length(2048, 4096).is_identity
    assert not SelfExtend.for_length(2049, 4096).is_identity


def test_lengths_past_two_to_the_31():
    wide = SelfExtend(1 << 20, 1 << 20)
    assert wide.max_length(1 << 21) == (1 << 40) + (1 << 20)
    assert wide.relative_to(torch.tensor([1 << 40]), torch.tensor([0])).item() == (1 << 21) - 1
