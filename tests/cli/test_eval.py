# SPDX-License-Identifier: Apache-2.0
import json

import pytest
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from ropewalk.cli import app
from ropewalk.testing.saved import save_tiny_model

SMALL = ["--model", "dummy", "--lengths", "200,1k", "--depths", "3", "--samples", "2"]


def run(*arguments):
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


def rows_of(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_a_run_and_the_same_again(tmp_path):
    first = run("passkey", *SMALL, "-o", tmp_path / "out")
    assert first.exit_code == 0, first.output
    assert first.stdout == f"24 examples done: {tmp_path / 'out'}\n"
    assert "24 of 24 examples" in first.stderr
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["settings"]["lengths"] == [200, 1024]
    assert config["settings"]["depths"] == [0, 0.5, 1]
    rows = rows_of(tmp_path / "out")
    assert {row["method"] for row in rows} == {"unmodified", "selfextend(group_size=1, window=1024)"}
    [facts] = (tmp_path / "out").glob("facts-*.json")
    assert {f"facts-{row['facts']}.json" for row in rows} == {facts.name}
    assert json.loads(facts.read_text())["versions"]["torch"]
    again = run("passkey", *SMALL, "-o", tmp_path / "out")
    assert again.stdout == f"24 were there already, 0 examples done: {tmp_path / 'out'}\n"
    assert rows_of(tmp_path / "out") == rows


def test_failures_are_told_and_are_no_success(tmp_path, monkeypatch):
    from ropewalk.eval.subjects import Dummy

    def fails(self, prompts):
        if len(prompts[0].token_ids) > limit:
            raise RuntimeError(f"out of \x1b[31mmemory at {len(prompts[0].token_ids) // 1000}")
        return ["no"]

    few = [*SMALL, "--depths", "0,1", "--samples", "1", "--method", "unmodified", "-o", tmp_path]
    monkeypatch.setattr(Dummy, "answers", fails)
    limit = 0
    result = run("passkey", *few)
    assert result.exit_code == 3
    assert result.stdout == f"0 examples done, 4 failed (run the same again to try those): {tmp_path}\n"
    assert "failed: unmodified, 200-0.000-0 and 1 more: RuntimeError: out of \\x1b[31mmemory at 0\n" in result.stderr
    limit = 500
    result = run("passkey", *few)
    assert (result.exit_code, result.stdout.partition(":")[0]) == (
        0,
        "2 examples done, 2 failed (run the same again to try those)",
    )
    limit = 5000
    assert run("passkey", *few).stdout.startswith("2 were there already, 2 ")


def test_damaged_lines_are_told_and_asked_again(tmp_path):
    run("passkey", *SMALL, "-o", tmp_path)
    lines = (tmp_path / "results.jsonl").read_text().splitlines(keepends=True)
    lines[4] = lines[4][:30] + "\n"
    (tmp_path / "results.jsonl").write_text("".join(lines))
    again = run("passkey", *SMALL, "-o", tmp_path)
    assert (again.exit_code, again.stdout) == (0, f"23 were there already, 1 examples done: {tmp_path}\n")
    assert "note: results.jsonl, line 5, is no row: Invalid JSON" in again.stderr
    assert (tmp_path / "results.jsonl").read_text().startswith("".join(lines))


def test_eval_alone_shows_its_help():
    result = run()
    assert result.exit_code == 2
    assert "passkey-length" in result.stdout
    assert result.stderr == ""


def test_a_limit_can_be_lifted(tmp_path):
    assert run("passkey", *SMALL, "--limit", "3", "-o", tmp_path).stdout.startswith("6 examples done")
    assert run("passkey", *SMALL, "-o", tmp_path).stdout.startswith("6 were there already, 18 examples done")
    assert len(rows_of(tmp_path)) == 24


def test_baselines(tmp_path):
    names = ("unmodified", "linear", "ntk", "dynamic-ntk(factor=3)", "yarn", "sliding-window", "infinite(window=64)")
    methods = [part for name in names for part in ("--method", name)]
    arguments = [*SMALL, "--lengths", "200,498", "--trained-window", "256", "-o", tmp_path, *methods]
    result = run("passkey", *arguments)
    assert result.exit_code == 0, result.output
    assert {row["method"] for row in rows_of(tmp_path)} == {
        "unmodified",
        "linear(factor=2.0078125)",
        "ntk(factor=4.015625)",
        "dynamic-ntk(factor=3.0)",
        "yarn(factor=2.0078125)",
        "sliding-window(window=256)",
        "infinite(window=64)",
    }
    assert run("passkey", *arguments).stdout.startswith("84 were there already, 0 examples done")


def test_a_sweep(tmp_path):
    sweep = "selfextend(group_size={2, 4}, window={64, 128})"
    arguments = [*SMALL, "--trained-window", "256", "--method", sweep, "--method", "unmodified", "-o", tmp_path]
    assert run("passkey", *arguments).stdout.startswith("60 examples done")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["methods"] == [
        "selfextend(group_size=2, window=64)",
        "selfextend(group_size=2, window=128)",
        "selfextend(group_size=4, window=64)",
        "selfextend(group_size=4, window=128)",
        "unmodified",
    ]
    assert config["trained_window"] == 256
    assert run("passkey", *arguments).stdout.startswith("60 were there already, 0 examples done")


def test_a_model_that_a_method_does_not_take(tmp_path):
    folder = save_tiny_model(tmp_path / "model", "llama-yarn")
    result = run("passkey", "--model", folder, "--lengths", "400", "--method", "linear", "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == (
        "error: method linear(factor=6.5): LlamaForCausalLM is scaled already: its rope_type is 'yarn', and only "
        "'default' ones can be scaled"
    )


WINDOWED = ["--lengths", "700", "--depths", "2", "--samples", "1", "--method", "unmodified"]


@pytest.mark.parametrize(
    ("method", "told"),
    [
        ("selfextend(group_size=16, window=16)", "sliding_window='disable'"),
        (
            "selfextend(group_size=8, window=16, sliding_window='disable')",
            "reaches 400 tokens on a trained window of 64",
        ),
    ],
)
def test_methods_are_tried_before_anything_is_asked(tmp_path, method, told):
    """What is refused leaves no folder behind, which would then be another run's."""
    folder = save_tiny_model(tmp_path / "model", "mistral-sliding")
    result = run("passkey", "--model", folder, *WINDOWED, "--method", method, "-o", tmp_path / "out")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.splitlines()[-1].startswith(f"error: method {method}")
    assert told in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_what_extend_takes_a_method_takes(tmp_path):
    """Mistral with and without its window, ReRoPE as its author runs it, true distances at the start."""
    folder = save_tiny_model(tmp_path / "model", "mistral-sliding")
    how = [
        "selfextend(group_size=16, window=16, sliding_window='disable')",
        "selfextend(group_size=16, window=16, sliding_window='disable', query_scaling='log-n')",
        "rerope(window=16, sliding_window='disable', query_scaling='log-n')",
        "leaky-rerope(factor=16, window=16, sliding_window='disable', query_scaling='log-n')",
        "selfextend(group_size=16, window=16, start=48, sliding_window='disable')",
    ]
    methods = [part for one in how for part in ("--method", one)]
    result = run("passkey", "--model", folder, *WINDOWED, *methods, "--new-tokens", "24", "-o", tmp_path / "out")
    assert (result.exit_code, result.stdout) == (0, f"12 examples done: {tmp_path / 'out'}\n"), result.stderr
    outputs = {method: [] for method in json.loads((tmp_path / "out" / "config.json").read_text())["methods"]}
    for row in rows_of(tmp_path / "out"):
        outputs[row["method"]].append(row.get("output"))
    assert len({*map(tuple, outputs.values())}) == 6, "each reads otherwise"


def test_texts_are_read_in_chunks(tmp_path, monkeypatch):
    folder = save_tiny_model(tmp_path / "model")
    read, forward = [], LlamaForCausalLM.forward

    def watched(self, *args, **options):
        read.append(options["input_ids"].shape[1])
        return forward(self, *args, **options)

    monkeypatch.setattr(LlamaForCausalLM, "forward", watched)
    arguments = ["--text", "alice", "--lengths", "100", "--stride", "16", "--windows", "1", "--method", "unmodified"]
    result = run("perplexity", *arguments, "--model", folder, "--chunk", "30", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert read == [30, 30, 23, 16]  # what comes before the tokens that are scored, and those


@pytest.mark.parametrize("option", ["--limit", "--seed", "--batch-size", "--processes", "--chunk", "--trained-window"])
@pytest.mark.parametrize("value", ["-1", "nan", "1.5", str(10**18), "9" * 6000, ""])
def test_numbers_are_named(tmp_path, option, value):
    for given in ([option, value], [f"{option}={value}"]):
        result = run("passkey", "--model", "dummy", "-o", tmp_path / "out", *given)
        assert result.exit_code == 2
        assert result.stderr.startswith("error: ")
        assert option in result.stderr
        assert value in result.stderr
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", ""], "must name a file or a folder, got ''"),
        (["--method", "linear(factor=0.5)"], "factor of linear must be a number from 1 to 1024, got 0.5"),
        *(
            (["--method", f"{name}(factor=1e300)"], f"factor of {name} must be a number from 1 to 1024, got 1e+300")
            for name in ("linear", "ntk", "dynamic-ntk", "yarn")
        ),
        *(
            ([option, value], f"{option} must be from 1 to {2**48}, got {value}")
            for option in ("--trained-window", "--chunk")
            for value in ("0", "-1", str(10**18))
        ),
        (
            ["--samples", "1000000"],
            "3 lengths, 10 depths and 1000000 samples are 30000000 examples, and at most 1000000",
        ),
        (["--depths", "99999999999"], "--depths must be numbers from 0 to 1, or how many there are, up to 1000, got"),
        (["--lengths", "200,99999999k"], f"--lengths must be at most {2**24}, got {99999999 * 1024}"),
        (["--method", "selfexend"], "Did you mean 'selfextend'?"),
        (["--dtype", "half"], "--dtype must be one of"),
        (["--method", "selfextend(group_size=8)"], "window"),
        (
            ["--method", "selfextend(group_size={8, 0}, window=64)"],
            "method selfextend(group_size=0, window=64): ",
        ),
    ],
)
def test_bad_input_is_told_before_anything_is_done(tmp_path, arguments, message):
    result = run("passkey", "--model", "dummy", "-o", tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_another_run_in_the_same_folder_is_refused(tmp_path):
    run("passkey", *SMALL, "-o", tmp_path)
    rows = rows_of(tmp_path)
    result = run("passkey", *SMALL, "--digits", "8", "-o", tmp_path)
    assert result.exit_code == 2
    assert "was started with settings" in result.stderr
    assert rows_of(tmp_path) == rows


def changed(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("file", "values", "told"),
    [
        ("config.json", {"rms_norm_eps": 1e-2}, "config_hash"),
        ("config.json", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, "config_hash"),
        ("generation_config.json", {"eos_token_id": 3}, "config_hash"),
        ("tokenizer_config.json", {"chat_template": "{{ messages[0]['content'] }}"}, "tokenizer_hash"),
        ("tokenizer.json", {"normalizer": {"type": "Lowercase"}}, "tokenizer_hash"),
        ("config.json", {"transformers_version": "5.0.0", "_name_or_path": "elsewhere"}, None),
    ],
)
def test_a_model_whose_folder_changed_is_another(tmp_path, file, values, told):
    folder = save_tiny_model(tmp_path / "model")
    arguments = ["passkey", "--model", folder, "--lengths", "300", "--depths", "2", "--samples", "1", "--method"]
    arguments += ["unmodified", "-o", tmp_path / "out"]
    assert run(*arguments).exit_code == 0
    rows = rows_of(tmp_path / "out")
    changed(folder / file, **values)
    again = run(*arguments)
    if told is None:
        assert again.stdout.startswith("2 were there already, 0 examples done")
    else:
        assert again.exit_code == 2
        assert again.stderr.splitlines()[-1].startswith(f"error: {tmp_path / 'out'} was started with {told} ")
    assert rows_of(tmp_path / "out") == rows


def test_data_may_have_moved(tmp_path):
    for place in ("here", "there"):
        folder = tmp_path / place / "pg19" / "test_books"
        folder.mkdir(parents=True)
        (folder / "1.txt").write_text("many words " * 3000)
    arguments = ["perplexity", "--model", "dummy", "--lengths", "1k", "-o", tmp_path / "out"]
    assert run(*arguments, "--data-dir", tmp_path / "here").stdout.startswith("2 examples done")
    assert run(*arguments, "--data-dir", tmp_path / "there").stdout.startswith("2 were there already, 0")
    (tmp_path / "there" / "pg19" / "test_books" / "1.txt").write_text("other words " * 3000)
    changed = run(*arguments, "--data-dir", tmp_path / "there")
    assert changed.exit_code == 2
    assert "was started with settings" in changed.stderr
