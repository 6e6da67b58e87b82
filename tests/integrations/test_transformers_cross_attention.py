# SPDX-License-Identifier: Apache-2.0
"""Layers that attend to an image instead of the text (Mllama) are left alone, whatever is done to the others."""

import copy

import pytest
import torch
from tiny import CLOSE, MAP, text
from torch.testing import assert_close
from transformers import DynamicCache

import ropewalk
from ropewalk.testing.by_rows import logits_by_rows
from ropewalk.testing.zoo import ZOO

ENTRY = ZOO["mllama, an image"]
TOKENS = 70
CROSS = [f"model.language_model.layers.{number}.cross_attn" for number in (1, 3)]


def build(dtype=torch.float32):
    return ENTRY.tiny.build(64, dtype=dtype)


def given(tokens=TOKENS, begin=0):
    """Tokens, and the image with the first of them."""
    image = ENTRY.beside(tokens)
    seen = {"cross_attention_mask": image["cross_attention_mask"]}
    return {"input_ids": text(TOKENS)[:, begin:tokens], **(seen if begin else image)}


def outputs_of_cross_attention(model, **arguments):
    """What goes into each such layer, and what comes out of it."""
    seen = []

    def note(module, args, kwargs, output):
        seen.append((module, args, kwargs, output[0]))

    hooks = [model.get_submodule(name).register_forward_hook(note, with_kwargs=True) for name in CROSS]
    try:
        return model(**arguments).logits, seen
    finally:
        for hook in hooks:
            hook.remove()


def test_an_image_matters():
    """Or nothing below would be checked."""
    model = build()
    inputs = given()
    other = {**inputs, "pixel_values": -inputs["pixel_values"]}
    assert (model(**inputs).logits - model(**other).logits).abs().max() > 0.5


def test_the_handle_says_so():
    model = build()
    with ropewalk.extend(model, MAP) as extension:
        layers = {layer.name: layer for layer in extension.layers}
        assert [name for name, layer in layers.items() if not layer.extended] == CROSS
        assert list(layers) == sorted(layers)
        assert all(layers[name].reason.startswith("cross-attention") for name in CROSS)
        assert "2 left alone: cross-attention, whose keys are no tokens of the text" in str(extension)
        assert len(extension.rotary) == 1


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_they_compute_what_they_computed(implementation):
    """On what they are given under a map they give, to the bit, what they give unmodified."""
    model = build()
    model.set_attn_implementation(implementation)
    with ropewalk.extend(model, MAP):
        _, seen = outputs_of_cross_attention(model, **given(), use_cache=False)
    assert [module for module, *_ in seen] == [model.get_submodule(name) for name in CROSS]
    for module, args, kwargs, output in seen:
        assert torch.equal(module(*args, **kwargs)[0], output)


@pytest.mark.parametrize("position_map", [MAP, ropewalk.DualChunk(24, 8)], ids=str)
@torch.no_grad()
def test_the_others_are_right(position_map):
    """As the model itself computes at the positions of each band, in float64."""
    inputs = given()
    beside = {name: x for name, x in inputs.items() if name != "input_ids"}
    expected = logits_by_rows(build(torch.float64), inputs["input_ids"], position_map, beside=beside)
    model = build(torch.float64)
    unmodified = model(**inputs).logits
    with ropewalk.extend(model, position_map):
        assert_close(model(**inputs).logits, expected, rtol=0, atol=1e-4)
        assert (expected - unmodified).abs().max() > 0.5
    assert torch.equal(model(**inputs).logits, unmodified)


@torch.no_grad()
def test_however_a_text_is_read():
    model = build()
    short = model(**given(8)).logits
    with ropewalk.extend(model, MAP) as extension:
        assert_close(model(**given(8)).logits, short, **CLOSE)
        whole = model(**given()).logits
        for made in (lambda: DynamicCache(config=model.config), extension.far_keys_cache):
            cache, parts, begin = made(), [], 0
            for end in (1, 2, 30, *range(31, TOKENS + 1)):
                parts.append(model(**given(end, begin), past_key_values=cache).logits)
                begin = end
            assert_close(torch.cat(parts, dim=1), whole, **CLOSE)


@torch.no_grad()
def test_generate():
    """With a static cache too, whose layers for the image `generate` makes as long as that."""
    model = build()
    greedy = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with ropewalk.extend(model, MAP):
        inputs = given()
        answer = model.generate(**inputs, **greedy)
        assert torch.equal(model.generate(**inputs, cache_implementation="static", **greedy), answer)
        for end in range(TOKENS, TOKENS + 6):
            image = ENTRY.beside(end)
            assert model(answer[:, :end], **image).logits[:, -1].argmax() == answer[0, end]
    assert not torch.equal(model.generate(**inputs, **greedy), answer)


@torch.no_grad()
def test_a_map_for_each_layer():
    model = build()
    with ropewalk.extend(model, MAP):
        expected = model(**given()).logits
    with ropewalk.extend(model, [MAP, ropewalk.Identity(), MAP, ropewalk.Identity()]):
        assert torch.equal(model(**given()).logits, expected)
    with pytest.raises(ValueError, match="has 4 attention layers, and there are 2 maps"):
        ropewalk.extend(model, [MAP, MAP])


@torch.no_grad()
def test_copies():
    model = build()
    with ropewalk.extend(model, MAP):
        other = copy.deepcopy(model)
        assert torch.equal(other(**given()).logits, model(**given()).logits)
        ropewalk.restore(other)
    assert torch.equal(other(**given()).logits, model(**given()).logits)
