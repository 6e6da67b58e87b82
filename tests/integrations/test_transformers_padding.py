# SPDX-License-Identifier: Apache-2.0
"""Rows of different lengths in one batch: each is read as if it were alone."""

import pytest
import torch
from tiny import CLOSE, MAP, extended, logits, shared, text
from torch.testing import assert_close
from transformers import DynamicCache, StaticCache

import ropewalk
from ropewalk.testing import TINY_MODELS

LENGTHS = (50, 33, 9)

over_models = pytest.mark.parametrize("name", TINY_MODELS)


def rows(lengths=LENGTHS, seed=0):
    return [text(length, seed=seed + row) for row, length in enumerate(lengths)]


def left_padded(texts, width):
    ids, mask = torch.zeros(len(texts), width, dtype=torch.long), torch.zeros(len(texts), width, dtype=torch.long)
    for row, tokens in enumerate(texts):
        ids[row, width - tokens.shape[1] :] = tokens
        mask[row, width - tokens.shape[1] :] = 1
    return ids, mask


def counted(mask):
    """Position ids as `generate` counts them."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


@over_models
def test_left_padded_rows(name):
    model, texts = shared(name), rows()
    ids, mask = left_padded(texts, 50)
    with extended(name):
        actual = logits(model, ids, attention_mask=mask, position_ids=counted(mask))
        for row, tokens in enumerate(texts):
            assert_close(actual[row, mask[row].bool()], logits(model, tokens)[0], **CLOSE)


@over_models
def test_left_padded_rows_decode(name):
    model, texts, following = shared(name), rows(), rows((12, 12, 12), seed=10)
    ids, mask = left_padded(texts, 50)
    with extended(name):
        for make in (DynamicCache, lambda config: StaticCache(config=config, max_cache_len=70)):
            cache = make(config=model.config)
            model(ids, attention_mask=mask, position_ids=counted(mask), past_key_values=cache)
            grown, parts = mask, []
            for step in range(12):
                grown = torch.nn.functional.pad(grown, (0, 1), value=1)
                token = torch.cat([tokens[:, step : step + 1] for tokens in following])
                arguments = {"attention_mask": grown, "position_ids": counted(grown)[:, -1:], "past_key_values": cache}
                parts.append(logits(model, token, **arguments))
            actual = torch.cat(parts, dim=1)
            for row in range(len(texts)):
                alone = logits(model, torch.cat((texts[row], following[row]), dim=1))
                assert_close(actual[row], alone[0, -12:], **CLOSE)


@over_models
def test_left_padded_rows_without_position_ids(name):
    # The model then counts the padding too, alike for queries and keys: only distances matter.
    model, texts = shared(name), rows()
    ids, mask = left_padded(texts, 50)
    with extended(name):
        actual = logits(model, ids, attention_mask=mask)
        for row, tokens in enumerate(texts):
            assert_close(actual[row, mask[row].bool()], logits(model, tokens)[0], **CLOSE)


@over_models
def test_right_padded_rows(name):
    model, texts = shared(name), rows()
    ids, mask = (x.flip(1) for x in left_padded([tokens.flip(1) for tokens in texts], 50))
    with extended(name):
        actual = logits(model, ids, attention_mask=mask)
        for row, tokens in enumerate(texts):
            assert_close(actual[row, mask[row].bool()], logits(model, tokens)[0], **CLOSE)


@pytest.mark.parametrize("name", ["llama", "phi", "cohere", "smollm3"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_a_second_turn_padded_on_the_left(name, static):
    model, first, second = shared(name), rows(), rows((5, 21, 14), seed=10)
    first_ids, first_mask = left_padded(first, 50)
    second_ids, second_mask = left_padded(second, 21)
    mask = torch.cat((first_mask, second_mask), dim=1)
    with extended(name):
        cache = StaticCache(config=model.config, max_cache_len=80) if static else DynamicCache(config=model.config)
        model(first_ids, attention_mask=first_mask, position_ids=counted(first_mask), past_key_values=cache)
        arguments = {"attention_mask": mask, "position_ids": counted(mask)[:, 50:], "past_key_values": cache}
        actual = logits(model, second_ids, **arguments)
        for row in range(len(first)):
            alone = logits(model, torch.cat((first[row], second[row]), dim=1))[0, first[row].shape[1] :]
            assert_close(actual[row, second_mask[row].bool()], alone, **CLOSE)


def test_a_gap_whose_slots_are_counted_is_refused():
    model, ids = shared("llama"), text(20)
    with extended("llama"):
        for gap in (slice(8, 11), slice(8, 15)):  # inside the second part, and all the way up to it
            mask = torch.ones(1, 20, dtype=torch.long)
            mask[:, gap] = 0
            cache = DynamicCache(config=model.config)
            model(ids[:, :10], attention_mask=mask[:, :10], past_key_values=cache)
            with pytest.raises(ValueError, match="pass position_ids that count the tokens"):
                model(ids[:, 10:], attention_mask=mask, past_key_values=cache)


def test_packed_sequences_are_refused():
    model, ids = shared("llama"), text(20)
    packed = torch.cat((torch.arange(12), torch.arange(8)))[None]
    with extended("llama"):
        with pytest.raises(ValueError, match="packed sequences"):
            model(ids, position_ids=packed)
        with pytest.raises(ValueError, match="packed sequences"):
            model(ids, position_ids=packed, attention_mask=torch.ones_like(ids))


def test_positions_may_begin_anywhere():
    model, ids = shared("llama"), text(30)
    with extended("llama"):
        expected = logits(model, ids)
        assert_close(logits(model, ids, position_ids=torch.arange(100, 130)[None]), expected, **CLOSE)


def test_a_mask_of_four_dimensions_is_refused():
    model, ids = shared("llama"), text(20)
    with extended("llama"), pytest.raises(ValueError, match=r"2-D attention mask .* got shape \(1, 1, 20, 20\)"):
        model(ids, attention_mask=torch.ones(1, 1, 20, 20, dtype=torch.bool).tril())


def test_a_mask_shorter_than_the_text_is_refused():
    model, ids = shared("llama"), text(30)
    with extended("llama"):
        cache = DynamicCache(config=model.config)
        model(ids[:, :20], past_key_values=cache)
        with pytest.raises(ValueError, match=r"attention_mask has 10 columns.* 30"):
            model(ids[:, 20:], attention_mask=torch.ones(1, 10, dtype=torch.long), past_key_values=cache)


def test_dropout_is_refused():
    model = ropewalk.testing.tiny_model("llama", attention_dropout=0.1)
    with ropewalk.extend(model, MAP):
        model(text(20))
        model.train()
        with pytest.raises(ValueError, match=r"dropout of 0.1 .* model.eval"):
            model(text(20))
    assert model.training


def test_gradients():
    model, ids = ropewalk.testing.tiny_model("llama"), text(20)
    with torch.enable_grad(), ropewalk.extend(model, MAP):
        model(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_attention_weights_are_refused():
    with extended("llama"), pytest.raises(ValueError, match="output_attentions"):
        shared("llama")(text(20), output_attentions=True)


def test_paged_caches_are_refused():
    with extended("llama"), pytest.raises(ValueError, match="paged caches"):
        shared("llama")(text(20), cache=DynamicCache())
