# SPDX-License-Identifier: Apache-2.0
"""A cache that keeps far keys: the same answers as without, for a known amount of memory."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from test_transformers_generate import generate, greedy, size
from test_transformers_restore import assert_same, fingerprint
from tiny import CLOSE, MAP, extended, logits, options, shared, text
from torch.testing import assert_close
from transformers import DynamicCache

import ropewalk
from ropewalk.integrations.transformers import far_keys as far_keys_module
from ropewalk.integrations.transformers.far_keys import FarKeysLayer, far_keys_cache
from ropewalk.maps import SELF, DualChunk, Identity, LeakyReRoPE, LMInfinite, ReRoPE, SelfExtend, StreamingLLM
from ropewalk.testing import TINY_MODELS, tiny_model
from ropewalk.testing.models import ALIBI_MODELS

pytestmark = pytest.mark.filterwarnings("ignore:a text of:UserWarning")

# Its cache holds compressed keys.
OTHER_KEYS = ("deepseek-v3",)

MAPS = [MAP, SelfExtend(3, 8, start=30), SELF(9, 0.3, 6), ReRoPE(8), LeakyReRoPE(2.5, 7)]


def held(cache):
    """Bytes of the far views."""
    return sum(layer.far_nbytes for layer in cache.layers if isinstance(layer, FarKeysLayer))


def both(model):
    """A cache without far keys, and one with them, for a model that is extended."""
    return DynamicCache(config=model.config), far_keys_cache(model)


def tokens_turned(monkeypatch):
    """Counts the key slots that are turned from now on, over all layers, to be kept."""
    count, original = [0], far_keys_module.rerotated

    def counting(x, *arguments):
        count[0] += x.shape[2]
        return original(x, *arguments)

    monkeypatch.setattr(far_keys_module, "rerotated", counting)
    return count


@pytest.mark.parametrize("name", TINY_MODELS)
@pytest.mark.parametrize("prompt", [6, 50])
def test_greedy(name, prompt):
    ids, model = text(prompt), shared(name)
    with extended(name) as extension:
        expected = generate(model, ids)
        cache = extension.far_keys_cache()
        assert torch.equal(generate(model, ids, past_key_values=cache), expected)
        assert (held(cache) > 0) == (name not in OTHER_KEYS)
        cache = extension.far_keys_cache()
        assert torch.equal(generate(model, ids, past_key_values=cache, prefill_chunk_size=16), expected)


@pytest.mark.parametrize("position_map", MAPS, ids=str)
def test_steps_equal_those_of_the_ordinary_path(position_map, monkeypatch):
    ids, model, found = text(60), shared("llama"), []
    with extended("llama", position_map):
        turned = tokens_turned(monkeypatch)
        for cache in both(model):
            parts = [logits(model, part, past_key_values=cache) for part in ids.split([33, 9, *[1] * 18], dim=1)]
            found.append(torch.cat(parts, dim=1))
    assert_close(*found, rtol=0, atol=1e-5)
    # Every key once: none is turned again.
    assert turned[0] == (60 - position_map.bands[1].distances[0]) * len(model.model.layers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_nearly_bit_for_bit(dtype):
    ids, model, found = text(60), tiny_model("qwen2").to(dtype), []
    with ropewalk.extend(model, MAP):
        for cache in both(model):
            found.append(torch.cat([logits(model, part, past_key_values=cache) for part in ids.split(1, dim=1)], dim=1))
    assert torch.equal(*found)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_may_change_between_steps(mode):
    ids, model = text(50), shared("llama")
    with extended("llama") as extension:
        expected = logits(model, ids)[:, 30:]
        cache, parts = extension.far_keys_cache(), []
        with mode():
            logits(model, ids[:, :30], past_key_values=cache)
        for step in range(30, 50):
            with (torch.no_grad, torch.inference_mode)[step % 2]():
                parts.append(logits(model, ids[:, step : step + 1], past_key_values=cache).clone())
    assert_close(torch.cat(parts, dim=1), expected, **CLOSE)


@pytest.mark.parametrize("name", ["llama", "gpt-neox", "qwen2-sliding"])
def test_a_left_padded_batch(name):
    texts, model = [text(50), text(33, seed=1), text(9, seed=2)], shared(name)
    ids, mask = torch.zeros(3, 50, dtype=torch.long), torch.zeros(3, 50, dtype=torch.long)
    for row, tokens in enumerate(texts):
        ids[row, 50 - tokens.shape[1] :], mask[row, 50 - tokens.shape[1] :] = tokens, 1
    with extended(name) as extension:
        expected = generate(model, ids, attention_mask=mask)
        # At once, and chunk by chunk, where rows have nothing but padding at first.
        for more in ({}, {"prefill_chunk_size": 7}):
            cache = extension.far_keys_cache()
            assert torch.equal(generate(model, ids, attention_mask=mask, past_key_values=cache, **more), expected)
            assert held(cache) > 0


def test_a_mask_that_changes():
    """The same cache, read as a text that begins later: positions count from there."""
    ids, model = text(40), shared("llama")
    steps = text(3, seed=5)
    mask = torch.ones(1, 43, dtype=torch.long)
    mask[0, :4] = 0
    found = []
    with extended("llama"):
        for cache in both(model):
            logits(model, ids, past_key_values=cache)
            parts = [logits(model, steps[:, :1], past_key_values=cache)]
            parts.append(logits(model, steps[:, 1:2], past_key_values=cache, attention_mask=mask[:, :42]))
            parts.append(logits(model, steps[:, 2:], past_key_values=cache, attention_mask=mask))
            found.append(torch.cat(parts, dim=1))
    assert_close(*found, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt-neox"])
def test_beams(name):
    ids, model, found = text(40), shared(name), []
    with extended(name):
        for cache in both(model):
            arguments = {"num_beams": 3, "return_dict_in_generate": True, "output_scores": True}
            found.append(generate(model, ids, past_key_values=cache, **arguments))
    assert torch.equal(found[0].sequences, found[1].sequences)
    assert_close(found[0].sequences_scores, found[1].sequences_scores, **CLOSE)


@pytest.mark.parametrize("how", ["assistant", "prompt lookup"])
def test_speculative_decoding(how):
    ids, model = text(20).repeat(1, 3), shared("llama")
    assistant = tiny_model("llama", num_hidden_layers=1)
    assistant.generation_config.num_assistant_tokens = 4
    more = {"assistant_model": assistant} if how == "assistant" else {"prompt_lookup_num_tokens": 4}
    with extended("llama") as extension, ropewalk.extend(assistant, MAP):
        cache = extension.far_keys_cache()
        assert torch.equal(generate(model, ids, past_key_values=cache, **more), greedy(model, ids))
        assert held(cache) > 0


def test_a_cache_carried_over_several_turns():
    model, conversation = shared("llama"), text(20)
    with extended("llama") as extension:
        cache = extension.far_keys_cache()
        for turn in range(3):
            conversation = torch.cat((conversation, text(9, seed=turn + 1)), dim=1)
            expected = greedy(model, conversation, 6)
            conversation = generate(model, conversation, past_key_values=cache, max_new_tokens=6)
            assert torch.equal(conversation, expected)


@pytest.mark.parametrize("inference", [False, True])
def test_a_cropped_cache_keeps_what_is_left(inference, monkeypatch):
    ids, other, model = text(50), text(20, seed=1), shared("llama")
    with extended("llama") as extension, torch.inference_mode() if inference else torch.no_grad():
        cache = extension.far_keys_cache()
        logits(model, ids, past_key_values=cache)
        cache.crop(-15)
        turned = tokens_turned(monkeypatch)
        again = torch.cat([logits(model, part, past_key_values=cache) for part in other.split(5, dim=1)], dim=1)
        assert turned[0] == (55 - 8 - 35) * len(model.model.layers)
        expected = logits(model, torch.cat((ids[:, :35], other), dim=1))[:, 35:]
    assert_close(again, expected, **CLOSE)


def _in_place(cache):
    for layer in cache.layers:
        layer.keys.copy_(layer.keys.flip(0))


def _assigned(cache, change):
    for layer in cache.layers:
        layer.keys, layer.values = change(layer.keys), change(layer.values)


CHANGES = {
    "reset": lambda cache: cache.reset(),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([1, 0])),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
    "repeat": lambda cache: (
        cache.batch_repeat_interleave(2),
        cache.batch_select_indices(torch.tensor([0, 3])),
    ),
    "copy": lambda cache: _assigned(cache, lambda x: x.flip(0).clone()),
    "in place": _in_place,
    "crop and in place": lambda cache: (cache.crop(-5), _in_place(cache)),
    "in place and crop": lambda cache: (_in_place(cache), cache.crop(-5)),
    "reorder and crop": lambda cache: (cache.reorder_cache(torch.tensor([1, 0])), cache.crop(-5)),
    "back and forth": lambda cache: (
        cache.reorder_cache(torch.tensor([1, 0])),
        cache.reorder_cache(torch.tensor([1, 0])),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_cache_that_was_changed(change):
    ids, model, found = text(50, batch=2), shared("llama"), []
    with extended("llama"):
        for cache in both(model):
            logits(model, ids, past_key_values=cache)
            CHANGES[change](cache)
            more = text(24, batch=2, seed=3).split([20, 1, 1, 1, 1], dim=1)
            found.append(torch.cat([logits(model, part, past_key_values=cache) for part in more], dim=1))
    assert_close(*found, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))], ids=["deepcopy", "pickle"]
)
def test_a_copied_cache_keeps_what_was_turned(duplicate, monkeypatch):
    """A prompt that is read once, for several questions."""
    model, prompt = shared("llama"), text(40)
    with extended("llama") as extension:
        cache = extension.far_keys_cache()
        logits(model, prompt, past_key_values=cache)
        turned = tokens_turned(monkeypatch)
        for seed in range(3):
            question, own = text(10, seed=seed + 1), duplicate(cache)
            actual = logits(model, question, past_key_values=own)
            assert_close(actual, logits(model, torch.cat((prompt, question), dim=1))[:, 40:], **CLOSE)
            assert own.get_seq_length() == cache.get_seq_length() + 10
        assert turned[0] == 3 * 10 * len(model.model.layers)


def test_two_caches_in_turn(monkeypatch):
    texts, model = [text(40), text(45, seed=1)], shared("llama")
    with extended("llama") as extension:
        turned, caches = tokens_turned(monkeypatch), [extension.far_keys_cache() for _ in texts]
        parts = [[], []]
        for begin in range(0, 40, 10):
            for ids, cache, found in zip(texts, caches, parts, strict=True):
                found.append(logits(model, ids[:, begin : begin + 10], past_key_values=cache))
        assert turned[0] == 2 * (40 - 8) * len(model.model.layers)
        for ids, found in zip(texts, parts, strict=True):
            assert_close(torch.cat(found, dim=1), logits(model, ids[:, :40]), **CLOSE)


@pytest.mark.parametrize("position_map", [MAP, ReRoPE(8)], ids=str)
def test_two_models_with_one_cache(position_map):
    """Only the one that it was made for has far keys in it, and that one sees what the other added."""
    ids, model, twin = (
        text(50),
        shared("llama"),
        tiny_model("llama", rope_parameters={"rope_type": "default", "rope_theta": 99.0}),
    )
    found = []
    with extended("llama"), ropewalk.extend(twin, position_map):
        for cache in both(model):
            parts = [
                logits((model, twin)[step % 2], part, past_key_values=cache)
                for step, part in enumerate(ids.split(10, dim=1))
            ]
            found.append(torch.cat(parts, dim=1))
        assert held(cache) > 0
    assert_close(*found, rtol=0, atol=1e-5)


def test_a_cache_after_another_extension():
    ids, model, found = text(50), shared("llama"), []
    for keep in (False, True):
        with extended("llama"):
            cache = both(model)[keep]
            parts = [logits(model, ids[:, :20], past_key_values=cache)]
        parts.append(logits(model, ids[:, 20:25], past_key_values=cache))
        with extended("llama", ReRoPE(16)):
            parts.append(logits(model, ids[:, 25:40], past_key_values=cache))
        with extended("llama"):
            parts.append(logits(model, ids[:, 40:], past_key_values=cache))
        found.append(torch.cat(parts, dim=1))
    assert_close(*found, rtol=0, atol=1e-5)


def test_what_only_shows_later_is_logged(caplog):
    far_keys_module._log_recomputed.cache_clear()
    with extended("deepseek-v3") as extension, caplog.at_level("INFO", logger="ropewalk"):
        generate(shared("deepseek-v3"), text(50), past_key_values=extension.far_keys_cache())
    reason = "the model does not attend to the keys as its cache holds them"
    assert [message for message in caplog.messages if "far keys" in message] == [f"far keys are recomputed: {reason}"]


def test_memory_goes_with_the_cache():
    model = shared("llama")
    with extended("llama") as extension:
        cache = extension.far_keys_cache()
        logits(model, text(50), past_key_values=cache)
        buffers = [weakref.ref(layer._far) for layer in cache.layers]
        keys = [weakref.ref(layer.keys) for layer in cache.layers]
        assert all(layer.far_nbytes for layer in cache.layers)
        gc.collect()
        gc.disable()
        try:
            # Nothing goes in circles.
            del cache
            assert [dead() for dead in (*buffers, *keys)] == [None] * len(buffers + keys)
        finally:
            gc.enable()


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen2-sliding"])
def test_memory(name):
    """Half of the cache, an eighth of that to grow, and never less than 64 keys a layer."""
    model, ids = tiny_model(name, max_position_embeddings=4096), text(1500)
    with ropewalk.extend(model, SelfExtend(4, 16), **options(name)):
        plain, cache = both(model)
        for each in (plain, cache):
            logits(model, ids, past_key_values=each)
        for step in range(200):
            logits(model, ids[:, step : step + 1], past_key_values=cache)
            logits(model, ids[:, step : step + 1], past_key_values=plain)
            assert 0.4 * size(cache) / len(cache.layers) < held(cache) < (0.5 + 1 / 16) * size(cache)
        assert size(cache) == size(plain)


def test_extending_and_restoring_know_nothing_of_it():
    model = tiny_model("llama")
    before, expected = fingerprint(model), logits(model, text())
    extension = ropewalk.extend(model, MAP)
    cache = extension.far_keys_cache()
    within = fingerprint(model)
    logits(model, text(50), past_key_values=cache)
    assert_same(within, fingerprint(model))
    extension.restore()
    assert_same(before, fingerprint(model))
    assert torch.equal(logits(model, text()), expected)
    with pytest.raises(ValueError, match="this LlamaForCausalLM is not extended"):
        extension.far_keys_cache()


def test_a_copied_model_uses_it_too():
    ids, model = text(50), tiny_model("llama")
    with ropewalk.extend(model, MAP) as extension:
        cache = extension.far_keys_cache()
        expected = logits(model, ids, past_key_values=cache)
        twin = copy.deepcopy(model)
    own = twin.ropewalk_extension.far_keys_cache()
    assert torch.equal(logits(twin, ids, past_key_values=own), expected)
    assert held(own) > 0


def test_gradients_take_the_ordinary_path():
    model, ids, gradients = tiny_model("llama"), text(40), []
    with ropewalk.extend(model, MAP), torch.enable_grad():
        for cache in both(model):
            model.zero_grad()
            model(ids, past_key_values=cache).logits.square().mean().backward()
            gradients.append(model.model.embed_tokens.weight.grad.clone())
            assert held(cache) == 0
    assert torch.equal(*gradients)


def test_compiled_and_back():
    torch._dynamo.reset()
    ids, model = text(50), tiny_model("llama")
    with ropewalk.extend(model, MAP) as extension:
        expected, cache = logits(model, ids), extension.far_keys_cache()
        compiled = torch.compile(model, backend="eager")
        parts = [
            logits((model, compiled)[step % 2], part, past_key_values=cache)
            for step, part in enumerate(ids.split(10, dim=1))
        ]
    assert_close(torch.cat(parts, dim=1), expected, **CLOSE)
    torch._dynamo.reset()


def test_alibi_turns_no_keys():
    extension = ropewalk.extend(ALIBI_MODELS["mpt"].build(64), MAP)
    with pytest.raises(ValueError, match="far keys cannot be kept: the model has ALiBi, which turns no key"):
        extension.far_keys_cache()


@pytest.mark.parametrize(
    ("name", "position_map", "arguments", "reason"),
    [
        ("llama", SELF(9, 0.3, 6, "distance"), {}, r".*grouping='distance'\) turns keys in \d+ bands"),
        ("llama", DualChunk(8, 4), {}, r"DualChunk\(chunk_size=8, window=4\) turns keys in 2 bands"),
        ("llama", LMInfinite(2, 4), {}, r"LMInfinite\(sinks=2, window=4\) does not turn all keys"),
        ("llama", StreamingLLM(2, 4), {}, r"StreamingLLM\(sinks=2, window=4\) turns no key"),
        ("llama", Identity(), {}, r"Identity\(\) turns no key"),
        ("llama", MAP, {"impl": "reference"}, "impl='reference' uses none"),
    ],
)
def test_where_there_is_nothing_to_keep(name, position_map, arguments, reason):
    with (
        extended(name, position_map, **arguments) as extension,
        pytest.raises(ValueError, match=f"far keys cannot be kept: {reason}"),
    ):
        extension.far_keys_cache()
