# SPDX-License-Identifier: Apache-2.0
"""A map's bands in numbers, read back as a kernel reads them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from random_maps import random_maps

from ropewalk.maps import SELF, Band, DualChunk, SelfExtend
from ropewalk.maps.edges import BEGINNING, PAST_QUERY, Edge
from ropewalk.maps.positions import Grouped
from ropewalk.ops.triton.primitives import COLUMNS, NO_END
from ropewalk.ops.triton.tables import LARGEST_FORMULA, edge_numbers, make_table

CPU = torch.device("cpu")


def read_edge(numbers, query):
    back, block, cap = numbers
    return min(max(query - back, 0) // block * block, cap)


def read_position(numbers, token, table):
    inverse, shift = numbers
    if inverse:
        return float(np.floor(np.float32(token + 0.5) * np.int32(inverse).view(np.float32))) + shift
    return table.positions[shift, token].item()


@settings(max_examples=60, deadline=None)
@given(random_maps())
def test_bands_are_what_the_numbers_say(position_map):
    table, bands = make_table(position_map.bands, 64, CPU), [b for b in position_map.bands if b.first_query < 64]
    assert table.bands.shape == (len(bands), COLUMNS.value)
    assert table.bands.dtype == torch.int32
    diagonal = [edge.is_diagonal or edge.is_beginning for band in bands for edge in (band.low, band.high)]
    assert table.is_diagonal == all(diagonal)
    tokens = torch.arange(64)
    for band, row in zip(bands, table.bands.tolist(), strict=True):
        for query in range(64):
            assert read_edge(row[:3], query) == band.low(query)
            assert read_edge(row[3:6], query) == band.high(query)
        for function, numbers, size in zip(band.functions, (row[6:8], row[8:10]), row[10:12], strict=True):
            expected = function(tokens).float().tolist()
            assert [read_position(numbers, token, table) for token in range(64)] == expected
            assert size == (function.size if isinstance(function, Grouped) else 0)


def test_groups_need_no_table_of_positions():
    """SELF by distance on a million slots would have kept 252 MiB."""
    table = make_table(SELF(33, 0.02, 64, "distance").bands, 1 << 20, CPU)
    assert table.bands.shape[0] > 20
    assert table.positions.nbytes < 100
    assert make_table(DualChunk(6, 4).bands, 4096, CPU).positions.shape == (3, 4096)


def test_past_what_the_formula_is_right_for_positions_are_kept():
    table = make_table(SelfExtend(3, 8).bands, 2 * LARGEST_FORMULA, CPU)
    tokens = torch.tensor([0, 3, LARGEST_FORMULA + 1, 2 * LARGEST_FORMULA - 1])
    _, far = SelfExtend(3, 8).bands
    inverse, shift = table.bands[1, 6:8].tolist()
    assert inverse == 0
    assert torch.equal(table.positions[shift, tokens], far.query_positions(tokens).float())


def test_bands_that_no_query_sees_are_left_out():
    position_map = SelfExtend(3, 100)
    assert make_table(position_map.bands, 100, CPU).bands.shape[0] == 1
    assert make_table(position_map.bands, 101, CPU).bands.shape[0] == 2


@pytest.mark.parametrize(
    ("edge", "numbers"),
    [
        (Edge(5), (5, 1, NO_END.value)),
        (PAST_QUERY, (-1, 1, NO_END.value)),
        (Edge(5, 3, 7), (5, 3, 7)),
        (BEGINNING, (NO_END.value, 1, NO_END.value)),
        (Edge(1 << 40, 1 << 40, 1 << 40), (NO_END.value,) * 3),
    ],
    ids=str,
)
def test_edges_in_numbers(edge, numbers):
    assert edge_numbers(edge) == numbers
    for query in (0, 4, 5, 100, (1 << 31) - 2):
        assert read_edge(numbers, query) == edge(query)


def test_numbers_past_32_bits():
    huge = 1 << 40
    band = Band(Edge(huge, huge), PAST_QUERY, Grouped(huge, 3), Grouped(huge))
    [row] = make_table([band], 64, CPU).bands.tolist()
    assert row[10:12] == [NO_END.value] * 2


def test_tables_made_in_inference_mode_are_plain_tensors():
    with torch.inference_mode():
        table = make_table(DualChunk(6, 4).bands, 64, CPU)
    assert not table.bands.is_inference()
    assert not table.positions.is_inference()
