"""`keep_far_keys`: the same answers as without, for a known amount of memory."""

import copy
import gc
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
from ropewalk.integrations.transformers.plan import PLAN
from ropewalk.maps import SELF, Identity, LeakyReRoPE, ReRoPE, SelfExtend
from ropewalk.testing import TINY_MODELS, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:a text of:UserWarning")

# Its cache holds compressed keys.
OTHER_KEYS = ("deepseek-v3",)

MAPS = [MAP, SelfExtend(3, 8, start=30), SELF(9, 0.3, 6), ReRoPE(8), LeakyReRoPE(2.5, 7)]


def keeping(name, position_map=MAP, **changes):
    return extended(name, position_map, keep_far_keys=True, **changes)


def far_keys(model):
    """What keeps the far view of each extended layer."""
    plans = [getattr(module, PLAN, None) for module in model.modules()]
    return [plan.far_keys for plan in plans if plan is not None and plan.far_keys is not None]


def held(model):
    return sum(far.nbytes for far in far_keys(model))


def tokens_turned(model, monkeypatch):
    """Counts the key slots that are turned from now on, over all layers."""
    count, original = [0], far_keys_module.moved

    def counting(x, *arguments):
        count[0] += x.shape[2]
        return original(x, *arguments)

    monkeypatch.setattr(far_keys_module, "moved", counting)
    return count


@pytest.mark.parametrize("name", TINY_MODELS)
@pytest.mark.parametrize("prompt", [6, 50])
def test_greedy(name, prompt):
    ids, model = text(prompt), shared(name)
    with extended(name):
        expected = generate(model, ids)
    with keeping(name):
        cache = DynamicCache(config=model.config)
        assert torch.equal(generate(model, ids, past_key_values=cache), expected)
        assert (held(model) > 0) == (name not in OTHER_KEYS)
        assert torch.equal(generate(model, ids, prefill_chunk_size=16), expected)
        assert torch.equal(generate(model, ids, cache_implementation="static", disable_compile=True), expected)


@pytest.mark.parametrize("position_map", MAPS, ids=str)
def test_steps_equal_those_of_the_ordinary_path(position_map, monkeypatch):
    ids, model = text(60), shared("llama")
    found = []
    for keep in (False, True):
        with extended("llama", position_map, keep_far_keys=keep):
            turned, cache = tokens_turned(model, monkeypatch), DynamicCache(config=model.config)
            parts = [logits(model, part, past_key_values=cache) for part in ids.split([33, 9, *[1] * 18], dim=1)]
            found.append(torch.cat(parts, dim=1))
    assert_close(*found, rtol=0, atol=1e-5)
    # Every key once: none is turned again.
    assert turned[0] == (60 - position_map.bands[1].first) * len(model.model.layers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_nearly_bit_for_bit(dtype):
    ids, model, found = text(60), tiny_model("qwen2").to(dtype), []
    for keep in (False, True):
        with ropewalk.extend(model, MAP, keep_far_keys=keep):
            cache = DynamicCache(config=model.config)
            found.append(torch.cat([logits(model, part, past_key_values=cache) for part in ids.split(1, dim=1)], dim=1))
    assert torch.equal(*found)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_may_change_between_steps(mode):
    ids, model = text(50), shared("llama")
    with keeping("llama"):
        expected = logits(model, ids)[:, 30:]
        cache, parts = DynamicCache(config=model.config), []
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
    with extended(name):
        expected = generate(model, ids, attention_mask=mask)
    with keeping(name):
        cache = DynamicCache(config=model.config)
        assert torch.equal(generate(model, ids, attention_mask=mask, past_key_values=cache), expected)
        assert held(model) > 0
        # Chunk by chunk, where rows have nothing but padding at first.
        assert torch.equal(generate(model, ids, attention_mask=mask, prefill_chunk_size=7), expected)


def test_a_mask_that_changes():
    """The same cache, read as a text that begins later: positions count from there."""
    ids, model = text(40), shared("llama")
    steps = text(3, seed=5)
    mask = torch.ones(1, 43, dtype=torch.long)
    mask[0, :4] = 0
    found = []
    for keep in (False, True):
        with extended("llama", keep_far_keys=keep):
            cache = DynamicCache(config=model.config)
            logits(model, ids, past_key_values=cache)
            parts = [logits(model, steps[:, :1], past_key_values=cache)]
            parts.append(logits(model, steps[:, 1:2], past_key_values=cache, attention_mask=mask[:, :42]))
            parts.append(logits(model, steps[:, 2:], past_key_values=cache, attention_mask=mask))
            found.append(torch.cat(parts, dim=1))
    assert_close(*found, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt-neox"])
def test_beams(name):
    ids, model, found = text(40), shared(name), []
    for keep in (False, True):
        with extended(name, keep_far_keys=keep):
            arguments = {"num_beams": 3, "return_dict_in_generate": True, "output_scores": True}
            found.append(generate(model, ids, **arguments))
    assert torch.equal(found[0].sequences, found[1].sequences)
    assert_close(found[0].sequences_scores, found[1].sequences_scores, **CLOSE)


@pytest.mark.parametrize("how", ["assistant", "prompt lookup"])
def test_speculative_decoding(how):
    ids, model = text(20).repeat(1, 3), shared("llama")
    assistant = tiny_model("llama", num_hidden_layers=1)
    assistant.generation_config.num_assistant_tokens = 4
    more = {"assistant_model": assistant} if how == "assistant" else {"prompt_lookup_num_tokens": 4}
    with keeping("llama"), ropewalk.extend(assistant, MAP, keep_far_keys=True):
        assert torch.equal(generate(model, ids, **more), greedy(model, ids))


def test_a_cache_carried_over_several_turns():
    model, conversation = shared("llama"), text(20)
    with keeping("llama"):
        cache = DynamicCache(config=model.config)
        for turn in range(3):
            conversation = torch.cat((conversation, text(9, seed=turn + 1)), dim=1)
            expected = greedy(model, conversation, 6)
            conversation = generate(model, conversation, past_key_values=cache, max_new_tokens=6)
            assert torch.equal(conversation, expected)


@pytest.mark.parametrize("inference", [False, True])
def test_a_cropped_cache_keeps_what_is_left(inference, monkeypatch):
    ids, other, model = text(50), text(20, seed=1), shared("llama")
    with keeping("llama"), torch.inference_mode() if inference else torch.no_grad():
        cache = DynamicCache(config=model.config)
        logits(model, ids, past_key_values=cache)
        cache.crop(-15)
        turned = tokens_turned(model, monkeypatch)
        again = torch.cat([logits(model, part, past_key_values=cache) for part in other.split(5, dim=1)], dim=1)
        assert turned[0] == (55 - 8 - 35) * len(model.model.layers)
        expected = logits(model, torch.cat((ids[:, :35], other), dim=1))[:, 35:]
    assert_close(again, expected, **CLOSE)


CHANGES = {
    "reset": lambda cache: cache.reset(),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([1, 0])),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
    "copy": lambda cache: [setattr(layer, "keys", layer.keys.flip(0).clone()) for layer in cache.layers],
    "in place": lambda cache: [layer.keys.copy_(layer.keys.flip(0)) for layer in cache.layers],
    "crop and in place": lambda cache: (
        cache.crop(-5),
        [layer.keys.copy_(layer.keys.flip(0)) for layer in cache.layers],
    ),
    "less": lambda cache: (
        [setattr(layer, "keys", layer.keys[:, :, 5:]) for layer in cache.layers]
        + [setattr(layer, "values", layer.values[:, :, 5:]) for layer in cache.layers]
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_cache_that_was_changed(change):
    ids, model, found = text(50, batch=2), shared("llama"), []
    for keep in (False, True):
        with extended("llama", keep_far_keys=keep):
            cache = DynamicCache(config=model.config)
            logits(model, ids, past_key_values=cache)
            CHANGES[change](cache)
            more = text(24, batch=2, seed=3).split([20, 1, 1, 1, 1], dim=1)
            found.append(torch.cat([logits(model, part, past_key_values=cache) for part in more], dim=1))
    assert_close(*found, rtol=0, atol=1e-5)


def test_two_caches_in_turn(monkeypatch):
    texts, model = [text(40), text(45, seed=1)], shared("llama")
    with keeping("llama"):
        turned, caches = tokens_turned(model, monkeypatch), [DynamicCache(), DynamicCache(config=model.config)]
        parts = [[], []]
        for begin in range(0, 40, 10):
            for ids, cache, found in zip(texts, caches, parts, strict=True):
                found.append(logits(model, ids[:, begin : begin + 10], past_key_values=cache))
        assert turned[0] == 2 * (40 - 8) * len(model.model.layers)
        for ids, found in zip(texts, parts, strict=True):
            assert_close(torch.cat(found, dim=1), logits(model, ids[:, :40]), **CLOSE)


def test_two_models_with_one_cache():
    """Each keeps its own view, and sees what the other added."""
    ids, model, twin = text(50), shared("llama"), tiny_model("llama")
    with keeping("llama"), ropewalk.extend(twin, ReRoPE(8), keep_far_keys=True):
        cache, parts = DynamicCache(config=model.config), []
        for step, part in enumerate(ids.split(10, dim=1)):
            parts.append(logits((model, twin)[step % 2], part, past_key_values=cache))
    with extended("llama"), ropewalk.extend(twin, ReRoPE(8)):
        cache = DynamicCache(config=model.config)
        for step, part in enumerate(ids.split(10, dim=1)):
            assert_close(logits((model, twin)[step % 2], part, past_key_values=cache), parts[step], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "cache", "reason"),
    [
        ("deepseek-v3", "dynamic", "the model does not attend to the keys as its cache holds them"),
        ("llama", "static", "StaticLayer is not a cache that grows"),
    ],
)
def test_what_only_shows_later_is_logged(name, cache, reason, caplog):
    far_keys_module._log_recomputed.cache_clear()
    with keeping(name), caplog.at_level("INFO", logger="ropewalk"):
        generate(shared(name), text(50), cache_implementation=cache, disable_compile=True)
    assert [message for message in caplog.messages if "far keys" in message] == [f"far keys are recomputed: {reason}"]


def test_memory_goes_with_the_cache():
    model = shared("llama")
    with keeping("llama"):
        cache = DynamicCache(config=model.config)
        logits(model, text(50), past_key_values=cache)
        kept = far_keys(model)
        assert all(far.nbytes for far in kept)
        buffers = [weakref.ref(entry.buffer) for far in kept for entry in far._kept.values()]
        keys = [weakref.ref(layer.keys) for layer in cache.layers]
        del cache
        gc.collect()
        assert [dead() for dead in (*buffers, *keys)] == [None] * len(buffers + keys)
        assert held(model) == 0


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen2-sliding"])
def test_memory(name):
    """Half of the cache, an eighth of that to grow, and never less than 64 keys a layer; without the option nothing."""
    model, ids = tiny_model(name, max_position_embeddings=4096), text(1500)
    with ropewalk.extend(model, SelfExtend(4, 16), keep_far_keys=True, **options(name)):
        cache = DynamicCache(config=model.config)
        logits(model, ids, past_key_values=cache)
        for step in range(200):
            logits(model, ids[:, step : step + 1], past_key_values=cache)
            assert 0.4 * size(cache) / len(cache.layers) < held(model) < (0.5 + 1 / 16) * size(cache)
        with_option = size(cache)
        assert all(far.nbytes for far in far_keys(model))
    with ropewalk.extend(model, SelfExtend(4, 16), **options(name)):
        cache = DynamicCache(config=model.config)
        logits(model, ids, past_key_values=cache)
        for step in range(200):
            logits(model, ids[:, step : step + 1], past_key_values=cache)
        assert size(cache) == with_option
        assert far_keys(model) == []


def test_restore_lets_go_of_everything():
    model = tiny_model("llama")
    before, expected = fingerprint(model), logits(model, text())
    extension = ropewalk.extend(model, MAP, keep_far_keys=True)
    cache = DynamicCache(config=model.config)
    logits(model, text(50), past_key_values=cache)
    kept = far_keys(model)
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == len(kept) > 0
    extension.restore()
    assert [far.nbytes for far in kept] == [0] * len(kept)
    assert all(
        not module._forward_pre_hooks and not module._forward_pre_hooks_with_kwargs for module in model.modules()
    )
    assert_same(before, fingerprint(model))
    assert torch.equal(logits(model, text()), expected)


def test_a_copy_keeps_for_itself():
    ids, model = text(50), tiny_model("llama")
    with ropewalk.extend(model, MAP, keep_far_keys=True):
        cache = DynamicCache(config=model.config)
        expected = logits(model, ids, past_key_values=cache)
        twin = copy.deepcopy(model)
        assert held(twin) == 0
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == 0
    cache = DynamicCache(config=twin.config)
    assert torch.equal(logits(twin, ids, past_key_values=cache), expected)
    assert held(twin) > 0
    ropewalk.restore(twin)
    assert sum(len(module._forward_pre_hooks) for module in twin.modules()) == 0


def test_gradients_take_the_ordinary_path():
    model, ids, gradients = tiny_model("llama"), text(40), []
    for keep in (False, True):
        with ropewalk.extend(model, MAP, keep_far_keys=keep), torch.enable_grad():
            model.zero_grad()
            model(ids, use_cache=True).logits.square().mean().backward()
            gradients.append(model.model.embed_tokens.weight.grad.clone())
            assert held(model) == 0
    assert torch.equal(*gradients)


def test_compiled_and_back():
    ids, model = text(50), tiny_model("llama")
    with ropewalk.extend(model, MAP, keep_far_keys=True):
        expected, cache = logits(model, ids), DynamicCache(config=model.config)
        compiled = torch.compile(model, backend="eager")
        parts = [
            logits((model, compiled)[step % 2], part, past_key_values=cache)
            for step, part in enumerate(ids.split(10, dim=1))
        ]
    assert_close(torch.cat(parts, dim=1), expected, **CLOSE)


@pytest.mark.parametrize(
    ("position_map", "arguments", "line"),
    [
        (MAP, {}, "far keys         kept"),
        (SELF(9, 0.3, 6, "distance"), {}, "far keys         recomputed (SELF(capacity=9, rate=0.3, window=6, grouping"),
        (Identity(), {}, "far keys         recomputed (Identity() moves no key)"),
        (MAP, {"impl": "reference"}, "far keys         recomputed (impl='reference' uses none)"),
    ],
)
def test_the_handle_says_what_is_done(position_map, arguments, line):
    ids, model = text(50), shared("llama")
    with extended("llama", position_map, **arguments) as extension:
        assert "far keys" not in str(extension)
        expected = generate(model, ids)
    with keeping("llama", position_map, **arguments) as extension:
        assert line in str(extension)
        assert torch.equal(generate(model, ids), expected)
        assert bool(far_keys(model)) == (extension.far_keys == "kept")
