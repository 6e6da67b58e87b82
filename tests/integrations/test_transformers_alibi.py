# SPDX-License-Identifier: Apache-2.0
"""Models with ALiBi under a map: the bias is minus the slope times the mapped distance (SelfExtend, appendix F)."""

from contextlib import contextmanager

import pytest
import torch
from test_transformers_padding import left_padded, rows
from test_transformers_restore import assert_same, fingerprint
from tiny import CLOSE, in_chunks, logits, text
from torch.testing import assert_close
from transformers import BloomConfig, BloomForCausalLM, DynamicCache, StaticCache
from transformers.models.falcon import modeling_falcon

import ropewalk
from ropewalk.maps import SELF, DualChunk, Identity, LeakyReRoPE, SelfExtend, StreamingLLM
from ropewalk.testing import tiny_model
from ropewalk.testing.models import ALIBI_MODELS

MAPS = [SelfExtend(4, 16), SELF(9, 0.3, 12, "distance"), DualChunk(24, 12), LeakyReRoPE(2.5, 10), StreamingLLM(3, 20)]
over_models = pytest.mark.parametrize("name", ALIBI_MODELS)
over_maps = pytest.mark.parametrize("position_map", MAPS, ids=str)

pytestmark = pytest.mark.filterwarnings("ignore:a text of:UserWarning", "ignore::FutureWarning")


def extend(model, position_map):
    return ropewalk.extend(model, position_map, trained_window=64, enforce_limit=False)


def slopes(heads):
    """Press et al., arXiv 2108.12409: 2^(-8i/n) for n heads, n a power of 2; MPT has else the next power's, every other
    one first."""
    power = 1 << (heads - 1).bit_length()
    whole = [2.0 ** (-8 * (i + 1) / power) for i in range(power)]
    return torch.tensor([*whole[1::2], *whole[::2]][:heads] if power != heads else whole, dtype=torch.float64)


@contextmanager
def with_bias(model, bias):
    """The model's own attention with another bias, (heads, tokens, tokens)."""
    inner, replaced = model.transformer, []

    def set_on(owner, name, value):
        replaced.append((owner, name, vars(owner).get(name)))
        setattr(owner, name, value)

    if hasattr(inner, "build_mpt_alibi_tensor"):
        set_on(inner, "build_mpt_alibi_tensor", lambda *args, **kwargs: bias)
    elif hasattr(inner, "build_alibi_tensor"):
        set_on(inner, "build_alibi_tensor", lambda *args, **kwargs: bias)
    else:
        # Falcon divides it with the scores.
        set_on(modeling_falcon, "build_alibi_tensor", lambda *args, **kwargs: bias)
    try:
        yield
    finally:
        for owner, name, value in replaced:
            setattr(owner, name, value) if value is not None else delattr(owner, name)


@over_models
@over_maps
def test_the_definition(name, position_map):
    model, ids = tiny_model(name).double(), text(100)
    relative = position_map.relative_positions(100).double()
    heads = model.config.num_attention_heads
    # What a map hides is as far as no key is.
    bias = -slopes(heads)[:, None, None] * relative
    bias = bias.masked_fill(relative < 0, -1e9)
    with with_bias(model, bias), torch.no_grad():
        expected = model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    with extend(model, position_map):
        found = logits(model, ids)
    assert_close(found, expected, rtol=0, atol=1e-5)
    if "mpt" not in name:  # its bias is as long as the trained window
        assert (found - logits(model, ids)).abs().max() > 0.1


@over_models
def test_the_unmodified_model(name):
    model, ids = tiny_model(name), text(60)
    before, expected = fingerprint(model), logits(model, ids)
    for position_map, tokens in ((Identity(), 60), (SelfExtend(4, 16), 16), (DualChunk(24, 12), 24)):
        with extend(model, position_map) as extension:
            assert "ALiBi with slopes from" in str(extension)
            assert all(layer.extended for layer in extension.layers)
            assert_close(logits(model, ids[:, :tokens]), expected[:, :tokens], **CLOSE)
        assert_same(before, fingerprint(model))
        assert torch.equal(logits(model, ids), expected)


@over_models
@over_maps
def test_chunks_and_caches(name, position_map):
    model, ids = tiny_model(name), text(90)
    with extend(model, position_map):
        expected = logits(model, ids)
        assert_close(in_chunks(model, ids, (50, 1, 30, 9)), expected, **CLOSE)
        for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=100)):
            parts = [model(part, past_key_values=cache).logits for part in (ids[:, :60], ids[:, 60:61], ids[:, 61:])]
            assert_close(torch.cat(parts, dim=1), expected, **CLOSE)


@over_models
def test_batches(name):
    model, texts = tiny_model(name), rows()
    ids, mask = left_padded(texts, 50)
    with extend(model, SelfExtend(4, 8)):
        found = model(ids, attention_mask=mask).logits
        together = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
        for row, one in enumerate(texts):
            assert_close(found[row, mask[row].bool()], logits(model, one)[0], **CLOSE)
            alone = model.generate(one, max_new_tokens=5, do_sample=False)
            assert together[row, -5:].tolist() == alone[0, -5:].tolist()


def test_the_trained_window():
    """MPT's configuration says it; BLOOM's does not."""
    with ropewalk.extend(tiny_model("mpt"), target_length=200) as extension:
        assert extension.trained_window == 64
    with pytest.raises(ValueError, match="does not say how long its training window was"):
        ropewalk.extend(
            BloomForCausalLM(BloomConfig(vocab_size=96, hidden_size=64, n_layer=1, n_head=4)), target_length=200
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    """Biases are added in float32, so far ones are told apart."""
    model, ids = tiny_model("mpt").to(dtype), text(90)
    with extend(model, SelfExtend(4, 16)):
        found = logits(model, ids).float()
    with extend(whole := tiny_model("mpt"), SelfExtend(4, 16)):
        expected = logits(whole, ids)
    assert (found - expected).abs().mean() < 0.05 * expected.std()
