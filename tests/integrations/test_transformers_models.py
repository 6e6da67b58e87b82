# SPDX-License-Identifier: Apache-2.0
"""An extended model, compared with itself read otherwise and with the same model computed from the definition."""

from dataclasses import replace

import pytest
import torch
from naive import naive_attention
from tiny import CLOSE, MAP, TOKENS, extended, in_chunks, logits, options, shared, text
from torch.testing import assert_close
from transformers import DynamicCache, StaticCache

import ropewalk
from ropewalk import SELF, Identity, LeakyReRoPE, ReRoPE, SelfExtend
from ropewalk.integrations.transformers.rope_scaling import fixed_frequencies
from ropewalk.maps import MAPS
from ropewalk.testing import TINY_MODELS, example_maps, tiny_model

MAPS_OF_MODELS = [MAP, SELF(6, 0.7, 8, "distance")]
EXAMPLES = [example for name in MAPS for example in example_maps().get(name, [])]

over_models = pytest.mark.parametrize("name", TINY_MODELS)
over_maps_of_models = pytest.mark.parametrize("position_map", MAPS_OF_MODELS, ids=str)
over_examples = pytest.mark.parametrize("position_map", EXAMPLES, ids=str)

pytestmark = pytest.mark.filterwarnings("ignore:a text of:UserWarning")


def unmodified(name, ids):
    """Logits of the model as it is; where windows must be disabled, of the model made without one; where frequencies
    change with the length, with those of the trained window; where it has a table of rotations, with a longer one."""
    changes = {"sliding_window": None} if TINY_MODELS[name].disable_window else {}
    if any(each.endswith("embed_positions") for each, _ in shared(name).named_buffers()):
        changes = {"max_position_embeddings": 1000}
    model = tiny_model(name, **changes) if changes else shared(name)
    with fixed_frequencies(model, model.config.max_position_embeddings):
        return logits(model, ids)


@over_models
@pytest.mark.parametrize("position_map", [Identity(), SelfExtend(group_size=1, window=8), MAP], ids=str)
def test_the_unmodified_model(name, position_map):
    # Every key of 8 tokens is inside the neighbor window, so any map is the identity there.
    ids = text(TOKENS if position_map.is_identity else MAP.window)
    expected = unmodified(name, ids)
    with extended(name, position_map, enforce_limit=False):
        assert_close(logits(shared(name), ids), expected, **CLOSE)


@over_models
@over_maps_of_models
def test_the_definition(name, position_map):
    ids, model = text(), shared(name)
    disable = bool(options(name))
    with naive_attention(model, name, position_map, extend_sliding=disable):
        expected = logits(model, ids)
    with extended(name, position_map):
        actual = logits(model, ids)
    assert_close(actual, expected, rtol=0, atol=1e-3)
    assert (actual - unmodified(name, ids)).abs().max() > 0.5  # the map matters on this model


@over_examples
def test_the_definition_for_every_map(position_map):
    ids, model = text(50), shared("llama")
    with naive_attention(model, "llama", position_map):
        expected = logits(model, ids)
    with extended("llama", position_map, enforce_limit=False):
        assert_close(logits(model, ids), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["mistral-sliding", "qwen2-sliding", "gemma2", "gemma3", "gpt-oss"])
def test_the_definition_without_sliding_windows(name):
    ids, model = text(), shared(name)
    with naive_attention(model, name, MAP, extend_sliding=True):
        expected = logits(model, ids)
    with extended(name, sliding_window="disable"):
        assert_close(logits(model, ids), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("impl", ["reference", "blocks", "flash"])
def test_every_implementation(impl):
    ids = text()
    with extended("qwen3", impl="reference"):
        expected = logits(shared("qwen3"), ids)
    with extended("qwen3", impl=impl):
        assert_close(logits(shared("qwen3"), ids), expected, **CLOSE)


@over_models
@over_maps_of_models
@pytest.mark.parametrize("sizes", [(7,), (9, 1, 26), (25, 24)], ids=str)
def test_chunks(name, position_map, sizes):
    # Chunks end before, at and after the edges of the window (8), of groups (3) and of sliding windows (24).
    ids, model = text(), shared(name)
    with extended(name, position_map):
        assert_close(in_chunks(model, ids, sizes), logits(model, ids), **CLOSE)


@over_models
def test_token_by_token(name):
    ids, model = text(40), shared(name)
    with extended(name):
        assert_close(in_chunks(model, ids, (1,)), logits(model, ids), **CLOSE)


@over_examples
def test_chunks_then_tokens_for_every_map(position_map):
    ids, model = text(34), shared("llama")
    with extended("llama", position_map, enforce_limit=False):
        assert_close(in_chunks(model, ids, (8, 1, 11, 4, 1)), logits(model, ids), **CLOSE)


@over_models
def test_static_cache(name):
    ids, model = text(50), shared(name)
    with extended(name):
        cache = StaticCache(config=model.config, max_cache_len=64)
        assert_close(in_chunks(model, ids, (9, 1, 30, 1), cache), logits(model, ids), **CLOSE)


@over_models
def test_a_cache_rolled_back(name):
    ids, model = text(60), shared(name)
    with extended(name):
        cache = DynamicCache(config=model.config)
        for layer in cache.layers:
            if hasattr(layer, "activate_past_recording"):  # sliding windows forget otherwise
                layer.activate_past_recording()
        in_chunks(model, ids[:, :50], (50,), cache)
        cache.crop(-17)
        again = in_chunks(model, ids[:, 33:], (5, 1, 21), cache)
        assert_close(again, logits(model, ids)[:, 33:], **CLOSE)


@pytest.mark.parametrize("position_map", [MAP, LeakyReRoPE(2.5, 8), ReRoPE(8)], ids=str)
def test_start_leaves_what_comes_before_it(position_map):
    ids, model = text(), shared("llama")
    late = replace(position_map, start=20)
    with extended("llama", late):
        actual = logits(model, ids)
    expected = logits(model, ids)
    assert_close(actual[:, :20], expected[:, :20], **CLOSE)
    assert (actual[:, 40:] - expected[:, 40:]).abs().max() > 0.5


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi"])
def test_bfloat16(name):
    ids, model = text(), tiny_model(name).bfloat16()
    with extended(name):
        exact = logits(shared(name), ids)
    plain_error = (logits(model, ids).float() - logits(shared(name), ids)).abs()
    with ropewalk.extend(model, MAP):
        actual = logits(model, ids)
    assert actual.dtype == torch.bfloat16
    error = (actual.float() - exact).abs()
    assert error.mean() < 2 * plain_error.mean() + 0.01
