# SPDX-License-Identifier: Apache-2.0
"""Keys as narrow bands see them, before any attention to them."""

from __future__ import annotations

import pytest
import torch
import triton_interpreter  # noqa: F401
from tensors import DEVICE, random_rotary, random_tensors
from torch.testing import assert_close

from ropewalk.maps import SELF, Band, DualChunk, SelfExtend
from ropewalk.maps.edges import BEGINNING, PAST_QUERY, Edge
from ropewalk.maps.positions import Constant, Grouped
from ropewalk.ops import Rotary
from ropewalk.ops.rotary import rerotated
from ropewalk.ops.triton import narrow_keys
from ropewalk.ops.triton.narrow_keys import Narrow, in_parts, prepare, takes, width

BANDS = (
    Band.at_distances(5, 9, Grouped(2, 3), Grouped(2)),
    Band.at_distances(9, 22, Grouped(3, 4), Grouped(3)),
    Band.at_distances(22, 53, Grouped(7, 9), Grouped(7)),
)


def narrow_of(queries, keys, bands=BANDS, rotary=None, batch=1, head_dim=16):
    q, k, v = random_tensors(batch, 2, 1, queries, keys, head_dim, device=DEVICE)
    rotary = random_rotary(16, device=DEVICE) if rotary is None else rotary
    return Narrow(q, k, v, bands, rotary, torch.zeros_like(q), torch.zeros(q.shape[:3], device=DEVICE), 1.0)


def test_which_bands_are_narrow():
    assert all(map(takes, BANDS))
    *ended, far = SELF(9, 0.3, 6, "distance").bands
    assert all(map(takes, ended))
    assert not takes(far)
    for band in (
        *DualChunk(6, 4).bands,
        SelfExtend(3, 8).bands[1],
        Band(Edge(9), Edge(4), Constant(3)),
        Band(Edge(9, 1, 30), Edge(4)),
        Band(Edge(9), Edge(4, 3)),
        Band(BEGINNING, PAST_QUERY),
    ):
        assert not takes(band)


def test_there_may_be_nothing_to_do():
    assert prepare(narrow_of(5, 5)) is None  # no query sees a key of the bands
    assert prepare(narrow_of(0, 60)) is None
    assert prepare(narrow_of(6, 6)).bands == BANDS[:1]
    work = prepare(narrow_of(30, 60))
    assert (work.bands, work.past, work.first, work.widths) == (BANDS, 30, 30, 4 + 13 + 31)


@pytest.mark.parametrize("chunk", [None, 7, 16])
@pytest.mark.parametrize(("queries", "keys"), [(60, 60), (17, 90), (1, 54)])
def test_every_key_is_where_its_slot_says(chunk, queries, keys):
    """Of every part and band: the keys that some query of the part sees, re-rotated as the band has them."""
    narrow = narrow_of(queries, keys)
    work = prepare(narrow)
    expected = [rerotated(narrow.key, band.key_positions, 0, narrow.rotary) for band in work.bands]
    covered = []
    for part in in_parts(narrow.key, work, narrow.rotary, chunk):
        part.write_keys()
        covered += range(part.begin, part.end)
        band_slot = 0
        for band, view in zip(work.bands, expected, strict=True):
            # From before the text's beginning on, for a whole chunk.
            slot = band_slot - (part.begin - band.low.back)
            low, high = max(part.begin - band.low.back, 0), max(part.end - 1 - band.high.back, 0)
            if low < high:
                assert_close(part.keys[:, :, slot + low : slot + high], view[:, :, low:high], rtol=0, atol=2e-6)
            band_slot += part.chunk - 1 + width(band)
        assert part.keys.shape[2] >= band_slot
    assert covered == list(range(work.first, keys))


def test_rows_share_memory(monkeypatch):
    """Where the keys of all rows would take too much, a few rows' at a time, in the same place."""
    monkeypatch.setattr(narrow_keys, "_VIEW_BYTES", 1)
    narrow = narrow_of(10, 60, batch=3)
    parts = list(in_parts(narrow.key, prepare(narrow), narrow.rotary, None))
    assert [part.rows for part in parts] == [slice(0, 1), slice(1, 2), slice(2, 3)]
    assert len({part.keys.data_ptr() for part in parts}) == 1


def test_without_rotary_nothing_is_rerotated():
    narrow = narrow_of(10, 60, rotary=Rotary.none())
    [part] = in_parts(narrow.key, prepare(narrow), narrow.rotary, None)
    assert (part.write_keys, part.keys.numel()) == (None, 0)
    assert (part.begin, part.end) == (50, 60)


def test_texts_that_grow_share_their_tables():
    rotary = random_rotary(16, device=DEVICE)
    first, second, third = (prepare(narrow_of(5, keys, rotary=rotary)) for keys in (60, 90, 4097))
    assert first.table is second.table
    assert third.table is not None
