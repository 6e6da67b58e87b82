# SPDX-License-Identifier: Apache-2.0
import math

import pytest

from ropewalk.maps import LengthError, SlidingWindow, StreamingLLM


def test_the_example_of_section_3_2():
    """The cache holds tokens 0 1 2 3 6 7 8 and token 9 is decoded: their positions are 0 1 2 3 4 5 6 and 7."""
    row = StreamingLLM(sinks=4, window=4).relative_positions(10)[9].tolist()
    positions = {0: 0, 1: 1, 2: 2, 3: 3, 6: 4, 7: 5, 8: 6, 9: 7}
    assert row == [7 - positions[n] if n in positions else -1 for n in range(10)]


def test_texts_that_the_cache_holds_are_the_unmodified_models():
    relative = StreamingLLM(3, 5).relative_positions(8)
    assert relative[7].tolist() == [7, 6, 5, 4, 3, 2, 1, 0]
    assert StreamingLLM(3, 5).relative_positions(9)[8].tolist() == [7, 6, 5, -1, 4, 3, 2, 1, 0]


@pytest.mark.parametrize(("start_size", "recent_size"), [(4, 3), (1, 6), (2, 1), (4, 40)])
def test_the_released_cache_token_by_token(start_size, recent_size):
    """mit-han-lab/streaming-llm, `StartRecentKVCache.__call__` after every token, places in the cache as positions."""
    found = StreamingLLM(start_size, recent_size + 1).relative_positions(30)
    cache = []
    for query in range(30):
        seen = [*cache, query]
        row = [seen.index(query) - seen.index(key) if key in seen else -1 for key in range(30)]
        assert found[query].tolist() == row
        cache = seen if len(seen) <= start_size + recent_size else seen[:start_size] + seen[-recent_size:]


def test_without_sinks_it_is_the_sliding_window():
    assert StreamingLLM(0, 7).bands == SlidingWindow(7).bands


def test_for_length_is_the_setting_of_the_paper():
    # Table 2: four sinks and a cache of the trained window, 4 + 4092 for Llama 2 and 4 + 2044 for MPT.
    assert StreamingLLM.for_length(4_000_000, 4096) == StreamingLLM(4, 4092)
    assert StreamingLLM.for_length(400_000, 2048) == StreamingLLM(4, 2044)
    assert StreamingLLM(4, 4092).max_length(4096) == math.inf
    assert StreamingLLM(4, 4092).max_length(4095) == 4095
    # Of windows that hold no more than the sinks, something is left for the query itself.
    assert StreamingLLM.for_length(100, 3) == StreamingLLM(2, 1)
    assert StreamingLLM.for_length(100, 1) == StreamingLLM(0, 1)


def test_a_cache_past_the_trained_window_does_not_reach():
    with pytest.raises(LengthError, match=r"9 tokens .* reaches 8 \(eq\. 4\)"):
        StreamingLLM(5, 5)._check_length(9, 8)
