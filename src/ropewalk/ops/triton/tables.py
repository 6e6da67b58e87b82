# SPDX-License-Identifier: Apache-2.0
"""A map's bands as kernels read them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ropewalk.maps import Band
from ropewalk.maps.edges import Edge
from ropewalk.maps.positions import Grouped, PositionFunction
from ropewalk.ops.triton.primitives import COLUMNS, NO_END

# With r = 1 / size rounded, (token + 0.5) * r is off by less than 2^-23 of itself, and 0.5 / size from the next whole
# number: so its whole part is right for tokens below this.
LARGEST_FORMULA = 1 << 22


@dataclass(frozen=True, eq=False)
class BandTable:
    """Bands in numbers.

    Args:
        bands: int32, (bands, COLUMNS): back, block and cap of the low and of the high edge; then two numbers of the
            query's position function and two of the keys': of `Grouped` the bits of float32 1 / size, and the shift, or
            0 and a row of `positions`; then the sizes of `Grouped`, the query's and the keys'.
        positions: float32, (functions, capacity): by true position, those of functions that are no `Grouped`.
        is_diagonal: whether all edges are diagonals, or the first key.
    """

    bands: Tensor
    positions: Tensor
    is_diagonal: bool

    @property
    def capacity(self) -> int:
        """Tokens that `positions` has room for; any number where it has no rows."""
        return self.positions.shape[1]


def make_table(bands: Iterable[Band], capacity: int, device: torch.device) -> BandTable:
    """The table of those bands that some query before `capacity` sees."""
    seen = [band for band in bands if band.first_query < capacity]
    rows: dict[PositionFunction, int] = {}

    def numbers(function: PositionFunction) -> tuple[int, int]:
        if isinstance(function, Grouped) and capacity <= LARGEST_FORMULA:
            return int(np.float32(1 / function.size).view(np.int32)), function.shift
        return 0, rows.setdefault(function, len(rows))

    table = [
        (
            *edge_numbers(band.low),
            *edge_numbers(band.high),
            *numbers(band.query_positions),
            *numbers(band.key_positions),
            *(min(function.size, NO_END.value) if isinstance(function, Grouped) else 0 for function in band.functions),
        )
        for band in seen
    ]
    assert all(len(row) == COLUMNS.value for row in table)
    with torch.inference_mode(False), torch.no_grad():
        tokens = torch.arange(capacity if rows else 0, device=device)
        positions = [function(tokens).float() for function in rows]
        made = BandTable(
            torch.tensor(table, dtype=torch.int32, device=device),
            torch.stack(positions) if positions else torch.zeros((1, 1), device=device),
            all(edge.is_diagonal or edge.is_beginning for band in seen for edge in (band.low, band.high)),
        )
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return made


def edge_numbers(edge: Edge) -> tuple[int, int, int]:
    """Back, block and cap of an edge as kernels read them."""
    most: int = NO_END.value
    if edge.is_beginning:
        return most, 1, most
    return min(edge.back, most), min(edge.block, most), most if edge.cap is None else min(edge.cap, most)
