# SPDX-License-Identifier: Apache-2.0
"""The tiles that the Hopper kernel for narrow bands goes through, without a GPU."""

from __future__ import annotations

import pytest
import torch

from ropewalk.maps import SELF, Band
from ropewalk.ops.triton.hopper_narrow import _tiles

KEYS = 32


@pytest.mark.parametrize("bands", [((40, 48), (48, 70), (70, 131)), ((10, 12), (30, 230))], ids=str)
@pytest.mark.parametrize("positions", [2, 8, 32, 128])
def test_every_key_of_a_band_is_in_one_tile(bands, positions):
    tiles = _tiles(tuple(Band.at_distances(*band) for band in bands), positions, KEYS, torch.device("cpu"))[:-1]
    for place in range(positions):  # of a query, counted from the program's first
        seen = []
        for start, first, stop, number, *_ in tiles.tolist():
            assert (first, stop) == bands[number]
            seen += [place - key for key in range(start, start + KEYS) if first <= place - key < stop]
        assert sorted(seen) == [distance for band in bands for distance in range(*band)]


@pytest.mark.parametrize("positions", [8, 32])
def test_tiles_fill_the_slots_of_their_band(positions):
    """A key's slot leads to where the keys are re-rotated for that band, as `narrow_keys` says."""
    bands = SELF(5, 0.05, 130, "distance").bands[1:-1]
    chunk = 4 * positions
    tiles = _tiles(bands, positions, KEYS, torch.device("cpu")).tolist()
    begins, slot = [], 0
    for band in bands:
        first, stop = band.distances
        begins.append(slot - (1 - stop))  # of key 0 for a chunk that begins at 0
        slot += chunk - 1 + stop - first
    for _, _, _, number, _, base, *_ in tiles[:-1]:
        assert base + number * (chunk - 1) == begins[number]


def test_tiles_before_the_text_are_left_out():
    """A program takes the first tiles of the table, as many as hold a key of the text or have one behind them."""
    bands = SELF(5, 0.05, 130, "distance").bands[1:-1]
    *tiles, end = _tiles(bands, 8, KEYS, torch.device("cpu")).tolist()
    for begin in range(bands[0].distances[0] - 8, bands[-1].distances[1] + 8, 5):
        taken = sum(begin + tile[4] + KEYS > 0 for tile in tiles)
        assert all(begin + tile[0] + KEYS <= 0 for tile in tiles[taken:])
        assert all(begin + tile[4] + KEYS > 0 for tile in tiles[:taken])
    assert end[3] == len(bands)
