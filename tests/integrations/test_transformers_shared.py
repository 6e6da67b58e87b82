# SPDX-License-Identifier: Apache-2.0
"""Models that share modules or configurations: each is restored to what it was, in any order, or is refused before."""

import copy
import itertools

import pytest
import torch
from test_transformers_restore import assert_same, fingerprint
from tiny import CLOSE, MAP, logits, options, text
from torch.testing import assert_close

import ropewalk
from ropewalk import ReRoPE
from ropewalk.testing import tiny_model

IDS = text(60)


def one_configuration():
    """Two models on one configuration object."""
    one = tiny_model("gemma3")
    other = type(one)(one.config).eval()
    other.load_state_dict(one.state_dict())
    return one, other


def one_embedding():
    """Two models that share all that is not attention."""
    one, other = one_configuration()
    other.model.embed_tokens, other.lm_head = one.model.embed_tokens, one.lm_head
    other.model.rotary_emb = one.model.rotary_emb
    return one, other


@pytest.mark.parametrize("make", [one_configuration, one_embedding])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_what_may_be_shared(make, order):
    models = make()
    configuration = models[0].config
    before = [fingerprint(model) for model in models]
    plain = logits(models[0], IDS)
    more = {"sliding_window": "disable"}
    with ropewalk.extend(models[0], MAP, **more):
        first = logits(models[0], IDS)
        assert torch.equal(logits(models[1], IDS), plain)  # the other is what it was
    with ropewalk.extend(models[1], ReRoPE(8), **more):
        second = logits(models[1], IDS)
    for model, position_map in zip(models, (MAP, ReRoPE(8)), strict=True):
        ropewalk.extend(model, position_map, **more)
    assert torch.equal(logits(models[0], IDS), first)
    assert torch.equal(logits(models[1], IDS), second)
    ropewalk.restore(models[order[0]])
    assert torch.equal(logits(models[order[0]], IDS), plain)
    assert torch.equal(logits(models[order[1]], IDS), (first, second)[order[1]])
    ropewalk.restore(models[order[1]])
    for model, fingerprint_before in zip(models, before, strict=True):
        assert_same(fingerprint_before, fingerprint(model))
        assert model.config is configuration
        assert torch.equal(logits(model, IDS), plain)


def whole_and_part():
    model = tiny_model("llama")
    return model, model.model


def part_and_whole():
    return whole_and_part()[::-1]


def shallow_copy():
    model = tiny_model("llama")
    return model, copy.copy(model)


def one_attention():
    """Two models with one attention module in common."""
    one, other = tiny_model("llama"), tiny_model("llama")
    other.model.layers[1].self_attn = one.model.layers[1].self_attn
    return one, other


def one_stack_of_layers():
    one, other = tiny_model("llama"), tiny_model("llama")
    other.model.layers = one.model.layers
    return one, other


def two_heads():
    """A second head on the same base model."""
    one = tiny_model("llama")
    other = type(one)(one.config).eval()
    other.model = one.model
    return one, other


@pytest.mark.parametrize(
    "make", [whole_and_part, part_and_whole, shallow_copy, one_attention, one_stack_of_layers, two_heads]
)
def test_what_may_not_be_shared(make):
    one, other = make()
    before = fingerprint(one), fingerprint(other)
    extension = ropewalk.extend(one, MAP)
    within, expected = fingerprint(one), one(IDS)[0]
    with pytest.raises(ValueError, match="extended already, as a part of another model"):
        ropewalk.extend(other, ReRoPE(8))
    with pytest.raises(ValueError, match="not extended"):
        ropewalk.restore(other)
    assert_same(within, fingerprint(one))
    assert extension.active
    assert torch.equal(one(IDS)[0], expected)
    extension.restore()
    assert_same(before[0], fingerprint(one))
    assert_same(before[1], fingerprint(other))
    with ropewalk.extend(other, ReRoPE(8)):
        other(IDS)
    assert_same(before[0], fingerprint(one))


def test_a_shallow_copy_of_an_extended_model():
    model = tiny_model("llama")
    before, plain = fingerprint(model), logits(model, IDS)
    ropewalk.extend(model, MAP)
    twin = copy.copy(model)
    assert torch.equal(logits(twin, IDS), logits(model, IDS))
    with pytest.raises(ValueError, match="not extended"):
        ropewalk.restore(twin)
    with pytest.raises(ValueError, match="extended already"):
        ropewalk.extend(twin, MAP)
    ropewalk.restore(model)
    assert_same(before, fingerprint(model))
    for each in (model, twin):
        assert torch.equal(logits(each, IDS), plain)
        assert each.config._attn_implementation == "sdpa"
        each.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=2, cache_implementation="static")
    with ropewalk.extend(twin, MAP):
        logits(twin, IDS)


def test_one_attention_module_in_two_layers():
    model = tiny_model("llama")
    model.model.layers[1].self_attn = model.model.layers[0].self_attn
    before, plain = fingerprint(model), logits(model, IDS, use_cache=False)
    with ropewalk.extend(model, MAP) as extension:
        assert len(extension.layers) == 1
        assert (logits(model, IDS, use_cache=False) - plain).abs().max() > 0.1
    assert_same(before, fingerprint(model))
    assert torch.equal(logits(model, IDS, use_cache=False), plain)


def test_a_configuration_that_somebody_holds():
    model = tiny_model("mistral-sliding")
    configuration = model.config
    content = copy.deepcopy(vars(configuration))
    with ropewalk.extend(model, MAP, sliding_window="disable"):
        assert vars(configuration) == content
        assert model.config is not configuration
        assert model.config._attn_implementation == "ropewalk"
        # Not the model's any more: the model does not follow.
        expected = logits(model, IDS)
        configuration._attn_implementation = "eager"
        assert_close(logits(model, IDS), expected, **CLOSE)
    assert model.config is configuration


def test_extending_in_inference_mode():
    model = tiny_model("llama")
    with torch.inference_mode():
        ropewalk.extend(model, MAP)
        model(IDS)
    with torch.enable_grad():
        model(IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral-sliding"])
def test_copies_and_originals_are_restored_in_any_order(name):
    for order in itertools.permutations(range(3)):
        models = [tiny_model(name)]
        plain, before = logits(models[0], IDS), fingerprint(models[0])
        ropewalk.extend(models[0], MAP, **options(name))
        models += [copy.deepcopy(models[0]), copy.deepcopy(models[0])]
        for index in order:
            ropewalk.restore(models[index])
            assert torch.equal(logits(models[index], IDS), plain)
        assert_same(before, fingerprint(models[0]))
