# SPDX-License-Identifier: Apache-2.0
"""Scaled frequencies, against models whose configuration asked transformers for them from the start."""

import math

import pytest
import torch
from tiny import CLOSE, in_chunks, logits, shared, text
from transformers import DynamicCache

import ropewalk
from ropewalk.integrations.transformers import scoring
from ropewalk.integrations.transformers.frequencies import changes_with_length
from ropewalk.integrations.transformers.generation import generate
from ropewalk.integrations.transformers.rope_scaling import fixed_frequencies, scaled
from ropewalk.testing import TINY_MODELS, tiny_model
from ropewalk.testing.saved import tiny_tokenizer

WINDOW, TOKENS, FACTOR = 64, 150, 4.0
KINDS = ["linear", "ntk", "dynamic-ntk", "yarn"]
# Several kinds of layers, or layers without a rotary embedding, or scaled from the start.
REFUSED = {
    "gemma3": r"frequencies for each kind of layer \(full_attention, sliding_attention\)",
    "smollm3": r"1 of 4 layers of SmolLM3ForCausalLM have no rotary embedding, such as model.layers.3.self_attn",
    "llama-yarn": "its rope_type is 'yarn', and only 'default' ones",
    "llama-dynamic": "its rope_type is 'dynamic'",
    "phi3-longrope": "its rope_type is 'longrope'",
    "gptj": "keeps its rotations in a table",
    "codegen": "keeps its rotations in a table",
    "gpt2": "no rotary embedding",
    "t5": "encoder-decoder",
}
# Phi-3's configuration takes every rope type for longrope.
MODELS = [name for name in TINY_MODELS if name not in REFUSED and name != "phi3"]
over_kinds = pytest.mark.parametrize("kind", KINDS)


def log_likelihoods(model, ids, first, *arguments):
    """Of one text (1, tokens)."""
    return scoring.log_likelihoods(model, ids.tolist(), [first], *arguments)[0]


def rotary(model):
    [module] = [module for module in model.modules() if "inv_freq" in dict(module.named_buffers(recurse=False))]
    return module


def loaded_with(name, kind, factor=FACTOR, trained_window=WINDOW):
    """The same weights, with rope parameters in the configuration."""
    own = shared(name)
    parameters = dict(own.config.rope_parameters)
    dim = 2 * len(rotary(own).inv_freq)
    parameters |= {
        "linear": {"rope_type": "linear", "factor": factor},
        "ntk": {"rope_theta": parameters["rope_theta"] * factor ** (dim / (dim - 2))},
        "dynamic-ntk": {"rope_type": "dynamic", "factor": factor},
        "yarn": {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": trained_window},
    }[kind]
    return tiny_model(name, trained_window, rope_parameters=parameters)


@pytest.mark.parametrize("name", MODELS)
@over_kinds
def test_logits_are_those_of_a_model_loaded_with_the_rope_parameters(name, kind):
    model, ids = shared(name), text(TOKENS)
    before, config, module = logits(model, ids), model.config.to_dict(), rotary(model)
    with scaled(model, kind, FACTOR, WINDOW):
        inside = logits(model, ids)
    assert torch.equal(inside, logits(loaded_with(name, kind), ids))
    assert (inside - before).abs().max() > 0.1
    assert torch.equal(logits(model, ids), before)
    assert model.config.to_dict() == config
    assert rotary(model) is module


@over_kinds
def test_the_trained_window_may_be_another_than_the_configuration_says(kind):
    model, ids = shared("llama"), text(TOKENS)
    with scaled(model, kind, FACTOR, 32):
        inside = logits(model, ids)
    assert torch.equal(inside, logits(loaded_with("llama", kind, trained_window=32), ids))


@over_kinds
def test_phi3_which_says_its_trained_window_twice(kind):
    model = shared("phi3")
    assert model.config.original_max_position_embeddings == 4096
    with scaled(model, kind, FACTOR, WINDOW):
        assert torch.equal(rotary(model).inv_freq, rotary(loaded_with("llama", kind)).inv_freq)


def test_yarn_sharpens_attention():
    with scaled(shared("llama"), "yarn", 4.0, WINDOW):
        assert rotary(shared("llama")).attention_scaling == 0.1 * math.log(4) + 1


@pytest.mark.parametrize("kind", ["linear", "ntk", "yarn"])
def test_a_factor_of_1_is_the_unmodified_model(kind):
    model, ids = shared("phi"), text(TOKENS)
    before = logits(model, ids)
    with scaled(model, kind, 1.0, WINDOW):
        torch.testing.assert_close(logits(model, ids), before, **CLOSE)


def test_dynamic_ntk_is_the_unmodified_model_up_to_its_window():
    model, ids = shared("llama"), text(WINDOW)
    before = logits(model, ids)
    with scaled(model, "dynamic-ntk", FACTOR, WINDOW):
        assert torch.equal(logits(model, ids), before)


def test_one_after_another():
    model, ids = shared("qwen2"), text(TOKENS)
    for kind in KINDS:
        with scaled(model, kind, 2.0, WINDOW):
            assert torch.equal(logits(model, ids), logits(loaded_with("qwen2", kind, 2.0), ids))


@over_kinds
def test_an_exception_restores_too(kind):
    model, ids = shared("llama"), text()
    before = logits(model, ids)
    with pytest.raises(IndexError), scaled(model, kind, FACTOR, WINDOW):
        logits(model, ids + model.config.vocab_size)  # no such tokens
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("name", REFUSED)
@over_kinds
def test_what_cannot_be_scaled_is_refused_and_left_alone(name, kind):
    model = shared(name)
    modules = list(model.modules())
    with pytest.raises(ropewalk.UnsupportedModelError, match=REFUSED[name]) as found, scaled(model, kind, 2.0, WINDOW):
        pass
    assert "\n" not in str(found.value)
    assert list(model.modules()) == modules


def test_frequencies_of_another_kind_are_refused():
    model = tiny_model("llama")
    rotary(model).inv_freq.mul_(0.5)
    with (
        pytest.raises(ropewalk.UnsupportedModelError, match=r"other frequencies than 10000.0\^\(-2i/16\)"),
        scaled(model, "linear", 2.0, WINDOW),
    ):
        pass


def test_several_rotary_embeddings_are_refused():
    model = tiny_model("llama")
    model.model.layers[0].rotary_emb = rotary(model)
    with (
        pytest.raises(ropewalk.UnsupportedModelError, match="2 rotary embeddings"),
        scaled(model, "linear", 2.0, WINDOW),
    ):
        pass


@over_kinds
def test_not_twice(kind):
    model = shared("llama")
    with (
        scaled(model, kind, 2.0, WINDOW),
        pytest.raises(ValueError, match=f"scaled already \\({kind}\\)"),
        scaled(model, "linear", 2.0, WINDOW),
    ):
        pass
    with (
        ropewalk.extend(model, ropewalk.SelfExtend(3, 8)),
        pytest.raises(ValueError, match="is extended"),
        scaled(model, kind, 2.0, WINDOW),
    ):
        pass


def one_forward(model, ids):
    scores = logits(model, ids).float().log_softmax(-1)[0, :-1]
    return scores.gather(-1, ids[0, 1:, None])[:, 0]


@pytest.mark.parametrize("chunk", [7, WINDOW, 100, 1000])
def test_dynamic_ntk_in_chunks_has_the_base_of_the_whole_text(chunk):
    model = shared("llama")
    with scaled(model, "dynamic-ntk", FACTOR, WINDOW):
        # The base of a long text must not stay for a shorter one.
        for tokens in (TOKENS, 90, 40, WINDOW, WINDOW + 1, TOKENS):
            ids = text(tokens)
            expected = one_forward(loaded_with("llama", "dynamic-ntk"), ids)
            torch.testing.assert_close(log_likelihoods(model, ids, 1, chunk), expected, **CLOSE)


def test_without_fixed_frequencies_each_chunk_has_its_own():
    ids = text(TOKENS)
    model = loaded_with("llama", "dynamic-ntk")
    expected = logits(loaded_with("llama", "dynamic-ntk"), ids)
    assert (in_chunks(model, ids, [50]) - expected).abs().max() > 0.1
    with fixed_frequencies(model, TOKENS):
        torch.testing.assert_close(in_chunks(model, ids, [50]), expected, **CLOSE)


@pytest.mark.parametrize("tokens", [40, 90])
def test_what_a_longer_text_left_behind_does_not_stay(tokens):
    model, ids = loaded_with("llama", "dynamic-ntk"), text(tokens)
    logits(model, text(TOKENS))
    expected = one_forward(loaded_with("llama", "dynamic-ntk"), ids)
    torch.testing.assert_close(log_likelihoods(model, ids, 1, 30), expected, **CLOSE)


@pytest.mark.parametrize("tokens", [40, 60, 130])
def test_an_answer_under_dynamic_ntk_has_one_base(tokens):
    ids, new, model = text(tokens), 10, shared("llama")
    with scaled(model, "dynamic-ntk", FACTOR, WINDOW):
        answer = generate(model, tiny_tokenizer(), ids[0].tolist(), max_new_tokens=new, chunk=30)
    # A larger base alone, and no cache.
    length = max(tokens + new, WINDOW)
    plain = loaded_with("llama", "ntk", FACTOR * length / WINDOW - (FACTOR - 1))
    for _ in range(new):
        ids = torch.cat([ids, logits(plain, ids)[:, -1:].argmax(-1)], dim=1)
    assert answer.token_ids == tuple(ids[0, tokens:].tolist())


@pytest.mark.parametrize("name", ["llama-dynamic", "phi3-longrope"])
def test_unmodified_models_that_change_with_the_length(name):
    model = tiny_model(name)
    module = rotary(model)
    state = {key: value for key, value in vars(module).items() if not key.startswith("_")}
    buffers = {key: buffer.clone() for key, buffer in module.named_buffers()}
    for tokens in (TOKENS, 40, 90):
        ids = text(tokens)
        torch.testing.assert_close(log_likelihoods(model, ids, 1, 16), one_forward(tiny_model(name), ids), **CLOSE)
    assert rotary(model) is module
    assert {key: value for key, value in vars(module).items() if not key.startswith("_")} == state
    assert all(torch.equal(buffer, buffers[key]) for key, buffer in module.named_buffers())


@pytest.mark.filterwarnings("ignore:a text of")
def test_an_extended_model_is_left_alone():
    """Its frequencies are held already, and watched."""
    model, ids = tiny_model("llama-dynamic"), text(60)
    with ropewalk.extend(model, ropewalk.SelfExtend(3, 8), trained_window=15) as extension:
        module = rotary(model)
        assert extension.max_length == 27
        with fixed_frequencies(model, 27):
            assert rotary(model) is module
            model(ids[:, :27])
        answer = generate(model, tiny_tokenizer(), ids[0, :20].tolist(), max_new_tokens=4)
        assert len(answer.token_ids) == 4
        assert extension.active


def test_which_models_change_with_the_length():
    changing = {
        name
        for name in ("llama", "llama-yarn", "gemma3", "llama-dynamic", "phi3-longrope", "gpt2")
        if any(map(changes_with_length, shared(name).modules()))
    }
    assert changing == {"llama-dynamic", "phi3-longrope"}


def test_layers_of_several_kinds_that_change_with_the_length():
    parameters = {
        "full_attention": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": FACTOR},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
    }
    ids = text(TOKENS)
    model, expected = (tiny_model("gemma3", rope_parameters=parameters) for _ in range(2))
    torch.testing.assert_close(log_likelihoods(model, ids, 1, 20), one_forward(expected, ids), **CLOSE)


def test_other_models_are_not_touched():
    model = shared("llama")
    module = rotary(model)
    with fixed_frequencies(model, TOKENS):
        assert rotary(model) is module


def test_a_cache_needs_nothing():
    # Keys that a chunk left behind are rotated as those of one forward pass are.
    ids = text(TOKENS)
    model = shared("llama")
    whole, parts = DynamicCache(config=model.config), DynamicCache(config=model.config)
    with scaled(model, "dynamic-ntk", FACTOR, WINDOW), fixed_frequencies(model, TOKENS):
        model(ids, past_key_values=whole)
        in_chunks(model, ids, [33], parts)
    for one, other in zip(whole.layers, parts.layers, strict=True):
        torch.testing.assert_close(one.keys, other.keys, **CLOSE)
