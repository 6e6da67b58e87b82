# SPDX-License-Identifier: Apache-2.0
"""Which slots hold tokens, as spans of rows and as what one query a row sees."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ropewalk.ops import Layout

CPU = torch.device("cpu")


def test_layers_share_what_the_layout_knows():
    layout = Layout(1, 40, torch.tensor(25))
    assert layout.step(3, CPU) is layout.step(3, CPU)
    assert Layout(1, 40).step(3, CPU).lengths is None


@pytest.mark.parametrize(
    ("start", "mask", "lengths", "first_slots"),
    [
        (None, None, None, None),
        (5, None, None, None),
        (3, None, [4, 4], None),
        (torch.tensor(3), None, [4, 4], None),
        (torch.tensor([3]), None, [4, 4], None),
        (None, [[1] * 6, [0, 0, 1, 1, 1, 1]], [6, 6], [0, 2]),
        (3, [[1] * 6, [0, 0, 1, 1, 1, 1]], [4, 4], [0, 2]),
        (torch.tensor(3), [[1] * 4, [0, 0, 0, 1]], [4, 4], [0, 3]),
        (3, [[0, 0, 0, 0], [1, 1, 1, 1]], [4, 4], [4, 0]),
        (None, [[1, 0, 1, 1, 1, 1], [1] * 6], "gaps", None),
        (3, [[1, 1, 1, 0, 1, 1], [1] * 6], "gaps", None),
        (None, [[1, 1, 1, 1, 0, 0], [1] * 6], "gaps", None),
    ],
)
def test_what_one_query_a_row_sees(start, mask, lengths, first_slots):
    layout = Layout(1, 6, start, None if mask is None else torch.tensor(mask).bool())
    step = layout.step(2, CPU)
    if lengths == "gaps":
        assert step is None
        return
    assert (None if step.lengths is None else step.lengths.tolist()) == lengths
    assert (None if step.first_slots is None else step.first_slots.tolist()) == first_slots


def test_a_captured_step_has_the_device_check_the_mask(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    checked = []
    monkeypatch.setattr(torch, "_assert_async", lambda condition, message: checked.append((condition, message)))
    device = SimpleNamespace(type="cuda")
    for rows, fits in (([[0, 0, 1, 1], [1, 1, 1, 1]], True), ([[1, 0, 1, 1], [1, 1, 1, 1]], False)):
        mask = SimpleNamespace(to=lambda device, rows=rows: torch.tensor(rows))
        step = Layout(1, 6, 3, mask)._make_step(2, device)
        assert step.tokens is None
        (condition, message) = checked.pop()
        assert bool(condition) == fits
        assert "padded on the left only" in message


def test_neighbors_with_the_same_slots_are_one_span():
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 0], [1, 0, 1, 1], [1, 1, 1, 0]]).bool()
    spans = Layout(2, 4, key_mask=mask).spans(6)
    slots = [(s.rows, *(x.tolist() if isinstance(x, torch.Tensor) else x for x in (s.queries, s.keys))) for s in spans]
    assert slots == [
        (slice(0, 2), slice(0, 2), slice(0, 4)),
        (slice(2, 3), slice(0, 2), slice(1, 4)),
        (slice(4, 5), slice(0, 2), [0, 2, 3]),
        (slice(5, 6), slice(0, 1), slice(0, 3)),
    ]
