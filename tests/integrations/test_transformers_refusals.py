# SPDX-License-Identifier: Apache-2.0
"""What cannot be extended is refused before the first token, by a reason, and stays what it was."""

import numpy as np
import pytest
import torch
from test_transformers_restore import assert_same, fingerprint
from tiny import MAP, shared, text
from torch import nn
from transformers.masking_utils import create_causal_mask

import ropewalk
from ropewalk import UnsupportedModelError
from ropewalk.testing import REFUSED_MODELS, tiny_model

# Some of these models lack kernels or warn by themselves, whatever is done to them.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def outputs(model, ids):
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return model(ids, **more).logits


@pytest.mark.parametrize("name", REFUSED_MODELS)
@pytest.mark.parametrize("how", ["map", "target_length"])
def test_refused(name, how):
    model, ids = tiny_model(name), text(30)
    expected = outputs(model, ids)
    before = fingerprint(model)
    with pytest.raises(UnsupportedModelError, match=REFUSED_MODELS[name].refused):
        ropewalk.extend(model, MAP) if how == "map" else ropewalk.extend(model, target_length=100)
    assert_same(before, fingerprint(model))
    assert torch.equal(outputs(model, ids), expected)


def test_the_reason_comes_before_a_missing_training_window():
    with pytest.raises(UnsupportedModelError, match="no rotary embedding"):
        ropewalk.extend(tiny_model("gpt2"), MAP)


def test_a_model_that_only_has_sliding_windows():
    model, ids = shared("mistral-sliding"), text(50)
    before, expected = fingerprint(model), outputs(model, ids)
    with pytest.raises(UnsupportedModelError, match=r"of 24 tokens.* sliding_window='disable' turns the windows off"):
        ropewalk.extend(model, MAP)
    assert_same(before, fingerprint(model))
    with ropewalk.extend(model, MAP, sliding_window="disable") as extension:
        assert all(layer.extended for layer in extension.layers)
        assert (outputs(model, ids) - expected).abs().max() > 0.5
    assert_same(before, fingerprint(model))
    assert torch.equal(outputs(model, ids), expected)


def test_keys_that_are_not_rotated_as_the_model_says():
    model = tiny_model("llama")
    model.model.layers[1].self_attn.k_proj.register_forward_hook(lambda module, inputs, output: output + 0)
    with ropewalk.extend(model, MAP):
        pass  # harmless, so it is no reason to refuse

    class Otherwise(nn.Module):
        def __init__(self, rotary):
            super().__init__()
            self.inner = rotary

        def forward(self, x, position_ids):
            return self.inner(x, 2 * position_ids)

    model.model.rotary_emb = Otherwise(model.model.rotary_emb)
    before = fingerprint(model)
    with pytest.raises(
        UnsupportedModelError, match=r"model.layers.0.self_attn .* does not rotate its keys by any .* off by"
    ):
        ropewalk.extend(model, MAP)
    assert_same(before, fingerprint(model))


@pytest.mark.parametrize(
    "more",
    [
        {"or_mask_function": lambda batch, head, query, key: key < 4},
        {"block_sequence_ids": torch.tensor([[-1] * 4 + [0] * 4 + [-1] * 12])},
    ],
    ids=["prefix", "image"],
)
def test_masks_that_add_to_the_causal_one(more):
    model = shared("llama")
    with ropewalk.extend(model, MAP):
        arguments = {"config": model.config, "inputs_embeds": torch.zeros(1, 20, 64), "attention_mask": None}
        assert create_causal_mask(past_key_values=None, **arguments) is not None
        with pytest.raises(UnsupportedModelError, match="only causal attention"):
            create_causal_mask(past_key_values=None, **arguments, **more)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((nn.Linear(2, 2), MAP), TypeError, "expected a transformers PreTrainedModel, .* got Linear"),
        (("llama", "selfextend"), TypeError, r"position map such as SelfExtend\(8, 1024\), got 'selfextend'"),
        (("llama", int), TypeError, "position map such as"),
        (("llama",), ValueError, r"pass a position map .* or target_length"),
        (("llama", ropewalk.SelfExtend), ValueError, r"pass a position map .* or target_length"),
    ],
)
def test_arguments(arguments, error, message):
    model, *rest = arguments
    with pytest.raises(error, match=message):
        ropewalk.extend(shared(model) if isinstance(model, str) else model, *rest)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sliding_window": "off"}, "sliding_window must be 'keep' or 'disable', got 'off'"),
        ({"impl": "fast"}, "impl must be one of auto, reference, blocks, flash, fused, got 'fast'"),
        ({"query_scaling": "ntk"}, "query scaling must be one of log-n, yarn, got 'ntk'"),
        ({"trained_window": 0}, "trained_window must be 1 or more, got 0"),
    ],
)
def test_options(options, message):
    model = shared("llama")
    before = fingerprint(model)
    with pytest.raises(ValueError, match=message):
        ropewalk.extend(model, MAP, **options)
    assert_same(before, fingerprint(model))


@pytest.mark.parametrize("argument", ["target_length", "trained_window"])
def test_lengths_are_whole_numbers_above_zero(argument):
    model = shared("llama")
    before = fingerprint(model)
    rest = {"trained_window": 64} if argument == "target_length" else {"target_length": 60}
    for value in (0, -5, np.int64(0), np.int32(-5)):
        with pytest.raises(ValueError, match=f"{argument} must be 1 or more, got {value}"):
            ropewalk.extend(model, **{argument: value}, **rest)
    for value in (True, False, np.bool_(True), 1.5, 64.0, np.float32(64), "64", torch.tensor(64.0)):
        with pytest.raises(ValueError, match=f"{argument} must be a whole number, got"):
            ropewalk.extend(model, **{argument: value}, **rest)
    assert_same(before, fingerprint(model))
    with ropewalk.extend(model, **{argument: 64}, **rest) as extension:
        expected = extension.position_map, extension.trained_window
    for kind in (np.int64, np.int16, np.uint8):
        with ropewalk.extend(model, **{argument: kind(64)}, **rest) as extension:
            assert (extension.position_map, extension.trained_window) == expected
            assert type(extension.trained_window) is int
            model(text(10))


def test_a_model_that_does_not_say_its_training_window():
    model, ids = tiny_model("llama"), text(30)
    vars(model.config)["max_position_embeddings"] = None  # past the configuration's own check
    with pytest.raises(ValueError, match="does not say how long its training window was: pass trained_window="):
        ropewalk.extend(model, MAP)
    with ropewalk.extend(model, MAP, trained_window=64) as extension:
        assert extension.trained_window == 64
        model(ids)
