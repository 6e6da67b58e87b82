# SPDX-License-Identifier: Apache-2.0
"""`generate`, in every way that transformers decodes, on an extended model."""

import pytest
import torch
from tiny import CLOSE, MAP, extended, logits, shared, text
from torch.testing import assert_close
from transformers import DynamicCache, PreTrainedTokenizerFast, StaticCache, pipeline

import ropewalk
from ropewalk.testing import TINY_MODELS, tiny_model

over_models = pytest.mark.parametrize("name", TINY_MODELS)
NEW = 12

pytestmark = pytest.mark.filterwarnings("ignore:a text of:UserWarning")


def generate(model, ids, **arguments):
    arguments = {"max_new_tokens": NEW, "do_sample": False, "attention_mask": torch.ones_like(ids), **arguments}
    return model.generate(ids, **arguments)


def greedy(model, ids, tokens=NEW):
    """Greedy decoding without a cache: the text is read anew for every token."""
    for _ in range(tokens):
        ids = torch.cat((ids, logits(model, ids)[:, -1:].argmax(dim=-1)), dim=1)
    return ids


@over_models
@pytest.mark.parametrize("prompt", [6, 50])
def test_greedy(name, prompt):
    ids, model = text(prompt), shared(name)
    with extended(name):
        expected = greedy(model, ids)
        assert torch.equal(generate(model, ids), expected)
        assert torch.equal(generate(model, ids, prefill_chunk_size=16), expected)


@over_models
def test_a_static_cache(name):
    ids, model = text(50), shared(name)
    with extended(name):
        expected = generate(model, ids)
        assert torch.equal(generate(model, ids, cache_implementation="static", disable_compile=True), expected)


def test_sampling():
    ids, model = text(50), shared("llama")
    samples = []
    with extended("llama"):
        for cache in ("dynamic", "static"):
            with torch.random.fork_rng():
                torch.manual_seed(3)
                arguments = {"do_sample": True, "cache_implementation": cache, "disable_compile": True}
                samples.append(generate(model, ids, **arguments))
        assert not torch.equal(samples[0], generate(model, ids))
    assert torch.equal(*samples)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt-neox"])
def test_beams(name):
    ids, model = text(40), shared(name)
    with extended(name):
        arguments = {"num_beams": 3, "return_dict_in_generate": True, "output_scores": True}
        found = generate(model, ids, **arguments)
        # The score is the text's own log-probability, read at once.
        log_probabilities = logits(model, found.sequences)[0, 39:-1].log_softmax(dim=-1)
        score = log_probabilities.gather(1, found.sequences[0, 40:, None]).sum() / NEW
        assert_close(found.sequences_scores[0], score, **CLOSE)
        plain = greedy(model, ids)
        plain_score = logits(model, plain)[0, 39:-1].log_softmax(dim=-1).gather(1, plain[0, 40:, None]).sum() / NEW
        assert score >= plain_score - 1e-3


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "mistral-sliding"])
@pytest.mark.parametrize("how", ["assistant", "extended assistant", "prompt lookup"])
def test_speculative_decoding(name, how):
    # A text that repeats itself is what look-up can guess.
    ids, model = text(20).repeat(1, 3), shared(name)
    assistant = tiny_model("llama", num_hidden_layers=1)
    assistant.generation_config.num_assistant_tokens = 4
    with extended(name):
        expected = greedy(model, ids)
        if how == "prompt lookup":
            actual = generate(model, ids, prompt_lookup_num_tokens=4)
        elif how == "assistant":
            actual = generate(model, ids, assistant_model=assistant)
        else:
            with ropewalk.extend(assistant, MAP):
                actual = generate(model, ids, assistant_model=assistant)
        assert torch.equal(actual, expected)


@over_models
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_left_padded_batch(name, cache):
    texts, model = [text(50), text(33, seed=1), text(9, seed=2)], shared(name)
    ids, mask = torch.zeros(3, 50, dtype=torch.long), torch.zeros(3, 50, dtype=torch.long)
    for row, tokens in enumerate(texts):
        ids[row, 50 - tokens.shape[1] :], mask[row, 50 - tokens.shape[1] :] = tokens, 1
    with extended(name):
        together = generate(model, ids, attention_mask=mask, cache_implementation=cache, disable_compile=True)
        for row, tokens in enumerate(texts):
            assert torch.equal(together[row, 50:], generate(model, tokens)[0, tokens.shape[1] :])


@over_models
def test_a_cache_carried_over_several_turns(name):
    model, conversation = shared(name), text(20)
    with extended(name):
        cache = DynamicCache(config=model.config)
        for turn in range(3):
            conversation = torch.cat((conversation, text(9, seed=turn + 1)), dim=1)
            expected = greedy(model, conversation, 6)
            conversation = generate(model, conversation, past_key_values=cache, max_new_tokens=6)
            assert torch.equal(conversation, expected)


def test_a_static_cache_carried_over_several_turns():
    model, conversation = shared("llama"), text(20)
    with extended("llama"):
        cache = StaticCache(config=model.config, max_cache_len=80)
        for turn in range(3):
            conversation = torch.cat((conversation, text(9, seed=turn + 1)), dim=1)
            expected = greedy(model, conversation, 6)
            arguments = {"past_key_values": cache, "max_new_tokens": 6, "disable_compile": True}
            conversation = generate(model, conversation, **arguments)
            assert torch.equal(conversation, expected)


@pytest.mark.parametrize("num_return_sequences", [1, 3])
def test_pipeline(num_return_sequences):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Whitespace()
    story = "the rope walks far past the end of the window and the words come with it"
    trained.train_from_iterator([story], trainers.BpeTrainer(vocab_size=90, special_tokens=["<pad>", "<unk>"]))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained, pad_token="<pad>", unk_token="<unk>", padding_side="left"
    )
    model = tiny_model("llama")
    texts = [f"{story} {story} {story}", story]
    with ropewalk.extend(model, MAP):
        generator = pipeline("text-generation", model=model, tokenizer=tokenizer, batch_size=2)
        arguments = {"max_new_tokens": 8, "return_full_text": False, "do_sample": num_return_sequences > 1}
        answers = generator(texts, num_return_sequences=num_return_sequences, **arguments)
        assert [len(answer) for answer in answers] == [num_return_sequences] * 2
        if num_return_sequences == 1:
            for prompt, answer in zip(texts, answers, strict=True):
                ids = tokenizer(prompt, return_tensors="pt").input_ids
                expected = tokenizer.decode(greedy(model, ids, 8)[0, ids.shape[1] :], skip_special_tokens=True)
                assert answer[0]["generated_text"] == expected


def size(cache):
    return sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))


@over_models
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_the_cache_takes_the_memory_it_took(name, kind):
    ids, model = text(60), shared(name)
    if TINY_MODELS[name].disable_window:
        model = tiny_model(name, sliding_window=None)
    more = {"max_cache_len": 64} if kind is StaticCache else {}
    unmodified = kind(config=model.config, **more)
    model(ids, past_key_values=unmodified)
    model = shared(name)
    with extended(name):
        cache = kind(config=model.config, **more)
        model(ids, past_key_values=cache)
        assert size(cache) == size(unmodified)


@pytest.mark.parametrize("name", ["mistral-sliding", "gemma3"])
def test_without_sliding_windows_the_cache_keeps_every_key(name):
    ids, model = text(60), shared(name)
    with extended(name, sliding_window="disable"):
        cache = DynamicCache(config=model.config)
        model(ids, past_key_values=cache)
        assert {layer.keys.shape[2] for layer in cache.layers} == {60}
    assert model.config.sliding_window == 24
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    assert cache.layers[0].keys.shape[2] == 23


def test_the_cache_holds_keys_at_their_true_positions():
    ids, model = text(60), shared("llama")
    unmodified, cache = DynamicCache(config=model.config), DynamicCache(config=model.config)
    model(ids, past_key_values=unmodified)
    with extended("llama"):
        model(ids, past_key_values=cache)
    # The first layer's keys depend on nothing but the tokens and their positions.
    assert torch.equal(cache.layers[0].keys, unmodified.layers[0].keys)


def test_bfloat16():
    ids, model = text(50), tiny_model("qwen2").bfloat16()
    with ropewalk.extend(model, MAP):
        found = generate(model, ids, output_logits=True, return_dict_in_generate=True)
        alone = logits(model, found.sequences)[0, 49:-1]
        assert_close(torch.cat(found.logits), alone.float(), rtol=0, atol=0.15)
