# SPDX-License-Identifier: Apache-2.0
"""Attention of one query on a CPU, whose keys are shared out among the threads."""

import pytest
import torch
from tensors import random_tensors
from torch.testing import assert_close

from ropewalk.ops import windowed


@pytest.fixture
def four_threads(monkeypatch):
    """As far as pieces go; they may be small."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(windowed, "_LEAST_PIECE", 8)


@pytest.mark.parametrize(
    ("batch", "heads", "keys", "pieces"),
    [(1, 3, 100, 4), (1, 2, 100, 2), (1, 8, 100, 1), (1, 3, 20, 2), (1, 3, 7, 1), (2, 3, 100, 1)],
)
def test_pieces_give_every_thread_as_much(four_threads, batch, heads, keys, pieces):
    assert windowed._pieces(batch, heads, keys) == pieces


@pytest.mark.parametrize("keys", [16, 96, 97, 103])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_one_query_over_pieces(four_threads, dtype, tolerance, keys):
    """With gaps between the heads, as in a cache with room."""
    query, key, value = (x.to(dtype) for x in random_tensors(1, 6, 3, 1, keys + 9, 16))
    key, value = key[:, :, 4 : keys + 4], value[:, :, 4 : keys + 4]
    assert windowed._pieces(1, 3, keys) > 1
    output, lse = windowed.full(query, key, value, 0.3)
    scores = query.double() @ key.double().repeat_interleave(2, dim=1).mT * 0.3
    assert_close(lse.double(), scores.logsumexp(-1), rtol=0, atol=tolerance)
    expected = scores.softmax(-1) @ value.double().repeat_interleave(2, dim=1)
    assert output.shape == query.shape
    assert_close(output.double(), expected, rtol=0, atol=tolerance)
