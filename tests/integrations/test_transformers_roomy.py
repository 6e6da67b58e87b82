# SPDX-License-Identifier: Apache-2.0
"""A cache with room for tokens to come: what a dynamic cache hands out, with fewer copies."""

import copy
import pickle

import pytest
import torch
from test_transformers_generate import generate
from tiny import MAP, extended, shared, text
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import ropewalk
from ropewalk.integrations.transformers.far_keys import FarKeysLayer, new_cache
from ropewalk.integrations.transformers.roomy import RoomyLayer, roomy_cache
from ropewalk.testing import TINY_MODELS
from ropewalk.testing.models import ALIBI_MODELS

pytestmark = pytest.mark.filterwarnings("ignore:a text of:UserWarning")


def new(tokens, seed, batch=2, value_dim=6):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, 3, tokens, dim, generator=generator) for dim in (8, value_dim))


def assert_same(one, other):
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)
        assert a.dtype == b.dtype


CHANGES = {
    "nothing": lambda layer: None,
    "crop": lambda layer: layer.crop(-3),
    "crop all": lambda layer: layer.crop(-7),
    "reorder": lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
    "select": lambda layer: layer.batch_select_indices(torch.tensor([1, 1])),
    "repeat": lambda layer: (layer.batch_select_indices(torch.tensor([0])), layer.batch_repeat_interleave(2)),
    "reset": lambda layer: layer.reset(),
    "assign": lambda layer: vars(layer).update(keys=layer.keys[:, :, 2:], values=layer.values[:, :, 2:]),
    "half": lambda layer: vars(layer).update(keys=layer.keys * 2),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_as_a_dynamic_layer(change, mode):
    """Whatever is done to a layer between its tokens, and in whichever mode it was made."""
    ours, theirs = RoomyLayer(), DynamicLayer()
    with mode():
        assert_same(ours.update(*new(7, 0)), theirs.update(*new(7, 0)))
        for layer in (ours, theirs):
            CHANGES[change](layer)
        assert ours.get_seq_length() == theirs.get_seq_length()
        for step in range(100):
            assert_same(ours.update(*new(1, step)), theirs.update(*new(1, step)))
    with torch.no_grad():
        assert_same(ours.update(*new(30, 5)), theirs.update(*new(30, 5)))
    assert ours.get_seq_length() == theirs.get_seq_length()
    assert ours.get_mask_sizes(3) == theirs.get_mask_sizes(3)


@torch.no_grad()
def test_what_is_handed_out_stays_as_it_is():
    """Also where another token takes the place of one that was cropped."""
    layer = RoomyLayer()
    kept, expected = [], []
    for step in range(5):
        kept.append(layer.update(*new(4, step)))
        expected.append([tensor.clone() for tensor in kept[-1]])
        layer.crop(-2)
    for one, other in zip(kept, expected, strict=True):
        assert_same(one, other)


@torch.no_grad()
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_go_on_by_themselves(duplicate):
    layer, plain = RoomyLayer(), DynamicLayer()
    for one in (layer, plain):
        one.update(*new(9, 0))
    other = duplicate(layer)
    assert_same(layer.update(*new(2, 1)), copy.deepcopy(plain).update(*new(2, 1)))
    assert_same(other.update(*new(2, 2)), copy.deepcopy(plain).update(*new(2, 2)))
    assert_same(layer.update(*new(1, 3))[:1], [torch.cat([t[0] for t in (new(9, 0), new(2, 1), new(1, 3))], dim=2)])


@torch.no_grad()
def test_tokens_are_copied_seldom_and_take_an_eighth_more():
    layer, copied = RoomyLayer(), 0
    layer.update(*new(1000, 0))
    for step in range(1000):
        before = layer.keys.data_ptr()
        layer.update(*new(1, step))
        copied += layer.keys.data_ptr() != before
        assert layer.keys.untyped_storage().nbytes() <= layer.keys.nbytes * 9 / 8 + 64 * 2 * 3 * 8 * 4
    assert copied <= 8


def test_gradients_go_through():
    """Of keys, and of queries that have seen keys which are written behind."""
    layer, (key, value) = RoomyLayer(), new(4, 0)
    layer.update(*new(3, 1))
    key.requires_grad_()
    query = torch.ones(8, requires_grad=True)
    with torch.enable_grad():
        seen = (layer.update(key, value)[0] * query).sum()
        keys, _ = layer.update(*new(2, 2))
        (keys.sum() + seen).backward()
    assert torch.equal(key.grad, 2 * torch.ones_like(key))
    assert query.grad is not None
    assert layer.update(*new(2, 3))[0].shape[2] == 11


@pytest.mark.parametrize("name", TINY_MODELS)
def test_models_write_the_same_with_it(name):
    model, ids = shared(name), text(40, batch=2)
    expected = generate(model, ids, past_key_values=DynamicCache(config=model.config))
    assert torch.equal(generate(model, ids, past_key_values=roomy_cache(model)), expected)
    with extended(name):
        expected = generate(model, ids, past_key_values=DynamicCache(config=model.config))
        assert torch.equal(generate(model, ids, past_key_values=roomy_cache(model)), expected)


def kinds(model):
    return {type(layer) for layer in new_cache(model).layers}


def test_which_cache_a_model_reads_with():
    model = shared("llama")
    assert kinds(model) == {RoomyLayer}
    with extended("llama"):
        assert kinds(model) == {FarKeysLayer}
    model = ALIBI_MODELS["mpt"].build(64)
    with ropewalk.extend(model, MAP, trained_window=64):
        assert kinds(model) == {RoomyLayer}
    model = shared("gemma3")
    with extended("gemma3"):
        assert kinds(model) == {FarKeysLayer, DynamicSlidingWindowLayer}
