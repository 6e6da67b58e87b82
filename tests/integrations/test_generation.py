# SPDX-License-Identifier: Apache-2.0
from contextlib import nullcontext

import pytest
import torch
from transformers import DynamicCache

import ropewalk
from ropewalk.integrations.transformers.generation import PrefillCost, generate, generate_batch, prefill
from ropewalk.testing import tiny_model
from ropewalk.testing.saved import tiny_tokenizer

MAP = ropewalk.SelfExtend(group_size=4, window=8)
TOKENS, NEW = 90, 12


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    # Tensors this small only lose time to threads that wait for each other.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def text(tokens=TOKENS, seed=1):
    return torch.randint(2, 90, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


def one_shot(model, ids):
    output = model.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False)
    return tuple(output[0, len(ids) :].tolist())


@pytest.mark.parametrize("chunk", [1, 7, 8, TOKENS - 2, TOKENS - 1, TOKENS, 1000])
def test_chunked_prefill_gives_the_tokens_of_one_shot_generation(model, tokenizer, chunk):
    ids = text()
    with ropewalk.extend(model, MAP):
        expected = one_shot(model, ids)
        answer = generate(model, tokenizer, ids, max_new_tokens=NEW, chunk=chunk)
    assert answer.token_ids == expected
    assert answer.prompt_tokens == TOKENS


@pytest.mark.parametrize("name", ["qwen2-sliding", "gemma3", "gpt-neox"])
def test_other_architectures(name, tokenizer):
    model, ids = tiny_model(name), text(60)
    with ropewalk.extend(model, MAP):
        assert generate(model, tokenizer, ids, max_new_tokens=NEW, chunk=16).token_ids == one_shot(model, ids)


def test_a_model_whose_configuration_wants_no_cache(tokenizer):
    """MPT's: what was read is not read again behind itself."""
    model, ids = tiny_model("mpt"), text(60)
    with ropewalk.extend(model, ropewalk.SelfExtend(8, 8)):
        assert generate(model, tokenizer, ids, max_new_tokens=NEW, chunk=16).token_ids == one_shot(model, ids)


def test_an_unmodified_model(model, tokenizer):
    ids = text(40)
    assert generate(model, tokenizer, ids, max_new_tokens=NEW, chunk=16).token_ids == one_shot(model, ids)


def test_a_prompt_of_one_token(model, tokenizer):
    assert generate(model, tokenizer, [5], max_new_tokens=NEW).token_ids == one_shot(model, [5])


def test_progress(model, tokenizer):
    calls = []
    cache = DynamicCache(config=model.config)
    prefill(model, torch.tensor([text(60)]), cache, chunk=25, on_progress=lambda *call: calls.append(call))
    assert calls == [(0, 59), (25, 59), (50, 59), (59, 59)]
    assert cache.get_seq_length() == 59


def test_a_cache_that_holds_the_beginning(model, tokenizer):
    ids = torch.tensor([text(60)])
    cache, calls = DynamicCache(config=model.config), []
    prefill(model, ids[:, :31], cache)
    prefill(model, ids, cache, on_progress=lambda *call: calls.append(call))
    assert calls == [(30, 59), (59, 59)]


def test_pieces_make_up_the_answer(model, tokenizer):
    pieces = []
    answer = generate(model, tokenizer, text(), max_new_tokens=40, on_text=pieces.append)
    assert "".join(pieces) == answer.text
    assert answer.text == tokenizer.decode(list(answer.token_ids), skip_special_tokens=True)


def test_stop(model, tokenizer):
    whole = generate(model, tokenizer, text(), max_new_tokens=40)
    stop = next(letter for letter in whole.text[3:] if letter not in whole.text[:3])
    pieces = []
    answer = generate(model, tokenizer, text(), max_new_tokens=40, stop=stop, on_text=pieces.append)
    assert answer.text == whole.text.partition(stop)[0]
    assert "".join(pieces) == answer.text
    assert len(answer.token_ids) < 40


def test_sampling(model, tokenizer):
    torch.manual_seed(0)
    answers = {generate(model, tokenizer, text(), max_new_tokens=NEW, temperature=2.0).token_ids for _ in range(3)}
    assert len(answers) == 3


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_what_a_callback_raises_comes_out(model, tokenizer, error):
    def fail(*arguments):
        raise error

    with pytest.raises(error):
        generate(model, tokenizer, text(), max_new_tokens=NEW, on_text=fail)
    with pytest.raises(error):
        generate(model, tokenizer, text(), max_new_tokens=NEW, on_progress=fail)


def test_errors(model, tokenizer):
    with pytest.raises(ValueError, match="chunk must be 1 or more tokens, got 0"):
        generate(model, tokenizer, text(), max_new_tokens=NEW, chunk=0)
    with pytest.raises(ValueError, match="max_new_tokens must be 1 or more, got 0"):
        generate(model, tokenizer, text(), max_new_tokens=0)
    with pytest.raises(ValueError, match=r"temperature must be 0 or more, got -1"):
        generate(model, tokenizer, text(), max_new_tokens=NEW, temperature=-1.0)
    with pytest.raises(ValueError, match=r"a prompt must have 1 token or more, got an empty one"):
        generate(model, tokenizer, [], max_new_tokens=NEW)


def test_cost_of_a_prefill():
    fit = PrefillCost.fit([(n, 5e-4 * n + 2e-7 * n**2) for n in (1000, 2400)])
    assert fit.seconds(12_000) == pytest.approx(6 + 28.8)
    assert PrefillCost.fit([]).seconds(1000) == 0
    assert PrefillCost.fit([(1000, 2.0)]).seconds(3000) == pytest.approx(6.0)
    # Never below 0, whatever noise there is in the measurements.
    assert PrefillCost.fit([(1000, 2.0), (2000, 2.0)]).quadratic == 0
    assert PrefillCost.fit([(1000, 0.1), (2000, 2.0)]).linear == 0


@pytest.mark.parametrize("name", ["llama", "qwen2-sliding", "gpt-neox"])
@pytest.mark.parametrize("extend", [False, True])
@pytest.mark.parametrize("chunk", [5, 2048])
def test_prompts_side_by_side_answer_as_alone(name, extend, chunk, tokenizer):
    """Of several lengths: chunks of some rows hold nothing but padding."""
    prompts = [text(tokens, seed=tokens) for tokens in (3, TOKENS, 1, 24)]
    model = tiny_model(name)
    with ropewalk.extend(model, MAP) if extend else nullcontext():
        together = generate_batch(model, tokenizer, prompts, max_new_tokens=NEW, chunk=chunk)
        alone = [generate(model, tokenizer, prompt, max_new_tokens=NEW, chunk=chunk) for prompt in prompts]
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    assert [one.text for one in together] == [one.text for one in alone]
    assert [one.prompt_tokens for one in together] == [3, TOKENS, 1, 24]


def test_rows_end_where_they_would_alone(tokenizer):
    """By an end token, by `stop`, or by length: what a row is filled with afterwards is not its answer."""
    model = tiny_model("llama")
    prompts = [text(tokens, seed=tokens) for tokens in (30, 9, 17)]
    [first, *others] = generate_batch(model, tokenizer, prompts, max_new_tokens=NEW)
    model.generation_config.eos_token_id = first.token_ids[2]
    stop = tokenizer.decode(others[0].token_ids[1:3])
    together = generate_batch(model, tokenizer, prompts, max_new_tokens=NEW, stop=stop)
    alone = [generate(model, tokenizer, prompt, max_new_tokens=NEW, stop=stop) for prompt in prompts]
    assert [(one.text, one.ended) for one in together] == [(one.text, one.ended) for one in alone]
    assert together[0].token_ids == first.token_ids[:3]
    assert together[0].ended
    assert stop not in together[1].text
    assert together[1].ended


@pytest.mark.filterwarnings("ignore:a text of")
def test_a_text_past_eq_4_is_an_error_before_anything_is_read(model, tokenizer):
    longest, begun = MAP.max_length(64), []
    with ropewalk.extend(model, MAP):
        generate_batch(model, tokenizer, [text(longest), text(5)], max_new_tokens=1, chunk=16)
        with pytest.raises(ropewalk.LengthError, match=f"a text of {longest + 1} tokens"):
            generate(
                model,
                tokenizer,
                text(longest + 1),
                max_new_tokens=1,
                chunk=16,
                on_progress=lambda *done: begun.append(done),
            )
    assert not begun
