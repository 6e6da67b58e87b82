# SPDX-License-Identifier: Apache-2.0
from contextlib import nullcontext

import pytest
import torch
from tiny import CLOSE, MAP, TOKENS, extended, logits, shared, text

from ropewalk import LengthError
from ropewalk.integrations.transformers import scoring
from ropewalk.testing import tiny_model


def log_likelihoods(model, ids, first, *arguments):
    """Of one text (1, tokens)."""
    return scoring.log_likelihoods(model, ids.tolist(), [first], *arguments)[0]


def one_forward(model, ids, first):
    scores = logits(model, ids).float().log_softmax(-1)[0, :-1]
    return scores.gather(-1, ids[0, 1:, None])[first - 1 :, 0]


@pytest.mark.parametrize("first", [1, 2, 8, 9, 16, 17, 18, TOKENS - 1])
@pytest.mark.parametrize("chunk", [1, 7, 8, TOKENS - 2, TOKENS - 1, TOKENS, 1000])
def test_chunks_give_the_scores_of_one_forward(first, chunk):
    ids = text()
    with extended("llama") as extension:
        scores = log_likelihoods(extension.model, ids, first, chunk)
        torch.testing.assert_close(scores, one_forward(extension.model, ids, first), **CLOSE)
    assert scores.shape == (TOKENS - first,)


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "gpt-neox", "qwen2-sliding"])
def test_unmodified_models(name):
    model, ids = shared(name), text(40)
    torch.testing.assert_close(log_likelihoods(model, ids, 9, 16), one_forward(model, ids, 9), **CLOSE)


def test_a_model_that_does_not_compute_in_float32():
    ids = text()
    expected = one_forward(shared("llama"), ids, 1)
    scores = log_likelihoods(tiny_model("llama").bfloat16(), ids, 1, 16)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.mean(), expected.mean(), rtol=0, atol=0.2)


@pytest.mark.parametrize("first", [1, 30])
def test_scores_of_few_positions_at_a_time(first, monkeypatch):
    monkeypatch.setattr(scoring, "_BLOCK", 12)
    model, ids = shared("llama"), text()
    seen = []
    hook = model.register_forward_hook(lambda module, inputs, output: seen.append(output.logits.shape[1]))
    try:
        scores = log_likelihoods(model, ids, first, 64)
    finally:
        hook.remove()
    torch.testing.assert_close(scores, one_forward(model, ids, first), **CLOSE)
    # What is only read has the scores of one position.
    assert seen[: first > 1] == [1] * (first > 1)
    assert max(seen) == 12
    assert sum(seen[first > 1 :]) == TOKENS - first


@pytest.mark.parametrize(
    ("first", "expected"),
    [(1, [(0, 69), (25, 69), (50, 69), (69, 69)]), (31, [(0, 69), (25, 69), (30, 69), (55, 69), (69, 69)])],
)
def test_progress(first, expected):
    calls = []
    log_likelihoods(shared("llama"), text(), first, 25, lambda *call: calls.append(call))
    assert calls == expected


@pytest.mark.parametrize(
    ("shape", "first", "chunk", "message"),
    [
        ((1, 9), 0, 4, "first must be from 1 to 8 for 9 tokens, got 0"),
        ((1, 9), 9, 4, "first must be from 1 to 8 for 9 tokens, got 9"),
        ((1, 9), 1, 0, "chunk must be 1 or more tokens, got 0"),
        ((1, 1), 1, 4, "first must be from 1 to 0 for 1 tokens, got 1"),
    ],
)
def test_errors(shape, first, chunk, message):
    with pytest.raises(ValueError, match=message):
        log_likelihoods(shared("llama"), torch.ones(shape, dtype=torch.long), first, chunk)


@pytest.mark.parametrize("name", ["llama", "qwen2-sliding", "gpt-neox"])
@pytest.mark.parametrize("extend", [False, True])
def test_texts_side_by_side_score_as_alone(name, extend, monkeypatch):
    """Of several lengths, scored from several places, and read in chunks that end inside some of them."""
    monkeypatch.setattr(scoring, "_BLOCK", 12)
    texts = [text(tokens, seed=tokens)[0].tolist() for tokens in (TOKENS, 2, 41, 17)]
    firsts = [30, 1, 40, 5]
    with extended(name) if extend else nullcontext():
        together = scoring.log_likelihoods(shared(name), texts, firsts, 7)
        for ids, first, scores in zip(texts, firsts, together, strict=True):
            alone = log_likelihoods(shared(name), torch.tensor([ids]), first, 7)
            assert scores.shape == (len(ids) - first,)
            torch.testing.assert_close(scores, alone, **CLOSE)


@pytest.mark.filterwarnings("ignore:a text of")
def test_a_text_past_eq_4_is_an_error_before_anything_is_read():
    # The last token is scored and not read.
    longest, begun = MAP.max_length(64) + 1, []
    with extended("llama") as extension:
        log_likelihoods(extension.model, text(longest), longest - 2, 64)
        with pytest.raises(LengthError, match=f"a text of {longest} tokens"):
            log_likelihoods(extension.model, text(longest + 1), 2, 64, lambda *done: begun.append(done))
    assert not begun
