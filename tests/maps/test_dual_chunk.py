# SPDX-License-Identifier: Apache-2.0
import math

import pytest

from ropewalk.maps import DualChunk, LengthError

# Figure 2 of the paper: chunks of 6, a model trained on 10, a local window of 4, twelve tokens.
FIGURE_2 = [
    [0],
    [1, 0],
    [2, 1, 0],
    [3, 2, 1, 0],
    [4, 3, 2, 1, 0],
    [5, 4, 3, 2, 1, 0],
    [6, 5, 4, 3, 2, 1, 0],
    [7, 6, 5, 4, 3, 2, 1, 0],
    [8, 7, 6, 5, 4, 3, 2, 1, 0],
    [9, 8, 7, 6, 5, 4, 3, 2, 1, 0],
    [9, 8, 7, 6, 5, 4, 4, 3, 2, 1, 0],
    [9, 8, 7, 6, 5, 4, 5, 4, 3, 2, 1, 0],
]


def test_figure_2_of_the_paper():
    expected = [row + [-1] * (12 - len(row)) for row in FIGURE_2]
    assert DualChunk(6, 4).relative_positions(12).tolist() == expected
    assert DualChunk(6, 4).max_length(trained_window=10) == math.inf


def test_a_third_chunk_sees_the_first_from_the_last_trained_position():
    # Query 14 of a third chunk: eq. 5 for keys 0-5 (9 - n), eq. 7 for 6-11 (its third query is at 8), eq. 2 then.
    assert DualChunk(6, 4).relative_positions(15)[14].tolist() == [
        *[9, 8, 7, 6, 5, 4],
        *[8, 7, 6, 5, 4, 3],
        *[2, 1, 0],
    ]


def test_for_length_is_the_setting_of_the_paper():
    # Section 4.1: three quarters of the trained window, 3072 for Llama 2's 4096; the local window is the rest of it.
    assert DualChunk.for_length(100_000, 4096) == DualChunk(3072, 1024)
    assert DualChunk(3072, 1024).max_length(4096) == math.inf
    assert DualChunk(3072, 1024).max_length(4095) == 4095
    with pytest.raises(LengthError, match=r"of 2 tokens on a trained window of 1: at best DualChunk\(.*\) reaches 1 "):
        DualChunk.for_length(2, 1)


@pytest.mark.parametrize("trained_window", [64, 128])
def test_the_released_code_is_a_dual_chunk_too(trained_window):
    """HKUNLP/ChunkLlama, `chunkllama_attn_replace.py`: the positions of its tables, by its own names."""
    chunk_size, local_window = trained_window * 3 // 4, trained_window // 8
    chunk_len = chunk_size - local_window
    q_t = list(range(chunk_len))
    qc_t = [min(position + chunk_len, chunk_size) for position in range(chunk_len)]
    length = 3 * chunk_len + 5
    found = DualChunk(5 * trained_window // 8, trained_window // 8 + 1).relative_positions(length)
    for m in range(length):
        for n in range(m + 1):
            chunks_between = m // chunk_len - n // chunk_len
            query = [q_t[m % chunk_len], qc_t[m % chunk_len], qc_t[chunk_len - 1]][min(chunks_between, 2)]
            assert found[m, n] == query - n % chunk_len
    assert found.max() == chunk_size
