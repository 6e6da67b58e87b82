# SPDX-License-Identifier: Apache-2.0
"""`ropewalk reproduce`."""

import json
import re
import sys

import pytest
from typer.testing import CliRunner

from ropewalk.cli import app
from ropewalk.eval.reproduce import experiments, names
from ropewalk.eval.tasks import TASKS
from ropewalk.testing.saved import save_tiny_model

FIGURE = ["reproduce", "selfextend/figure-4", "--model", "dummy", "--set", "lengths=256,512", "--limit", "10"]


def run(*arguments):
    return CliRunner().invoke(app, [str(each) for each in arguments], env={"COLUMNS": "200"})


def test_the_list_has_all():
    shown = run("reproduce", "list")
    assert shown.exit_code == 0
    lines = shown.stdout.splitlines()
    assert [line.partition(": ")[0] for line in lines if re.match(r"self(extend)?/", line)] == names()
    assert "selfextend/table-6: not run: nobody here has read it" in shown.stdout
    assert "HF_TOKEN" in shown.stdout


def test_a_figure_and_again(tmp_path):
    first = run(*FIGURE, "--output", tmp_path / "out")
    assert first.exit_code == 0, first.stderr
    assert "20 examples done" in first.stdout
    assert "selfextend/figure-4: exact match" in first.stdout
    assert "of a part of the examples: difference to the unmodified model" in " ".join(first.stdout.split())
    assert "+0.00 ≈" in first.stdout
    page = (tmp_path / "out" / "comparison.md").read_text()
    assert "| 512 |" in page
    assert "lengths is 256,512" in page
    assert "of a part of the examples" in page
    assert "Of a part of the examples alone: 10 of 200 of each method" in page
    again = run(*FIGURE, "--output", tmp_path / "out")
    assert "20 were there already, 0 examples done" in again.stdout
    other = run(*FIGURE[:-4], "--set", "lengths=512", "--output", tmp_path / "out")
    assert other.exit_code == 2
    assert "was started with settings" in other.stderr


@pytest.mark.parametrize("name", [name for name, one in experiments().items() if not one.is_measured])
def test_what_is_no_experiment_is_shown(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = run("reproduce", name)
    assert shown.exit_code == 0
    if instead := experiments()[name].instead:
        assert instead in shown.stdout
        assert run(*instead.split()[1:]).stdout in shown.stdout
    else:
        assert "What is the pass key? The pass key is\n" in shown.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def theirs(tmp_path):
    """A small model that is called as one of the paper's, and an exam: two runs of table 3, of unlike lengths."""
    (tmp_path / "data/leval/closed").mkdir(parents=True)
    paper = {"input": "A text.", "instructions": ["Which? A. this B. that"], "outputs": ["A"]}
    (tmp_path / "data/leval/closed/tpo.jsonl").write_text(json.dumps(paper))
    folder = save_tiny_model(tmp_path / "Llama-2-7b-chat-hf", trained_window=4096)
    settings = ["--set", "tasks=tpo", "--set", "new-tokens=2"]
    return ["reproduce", "selfextend/table-3", "--model", folder, "--data-dir", tmp_path / "data", *settings]


def test_runs_of_one_experiment_share_the_model(theirs, tmp_path):
    done = run(*theirs, "--output", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    assert done.stderr.count("Loading ") == 1
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"comparison.md", "length-3584", "length-16384"}
    assert "paper: SE-Llama-2-7b-chat" in done.stdout
    assert "part" not in (tmp_path / "out/comparison.md").read_text().partition("\n")[0]


def other_run(folder, name):
    (folder / "length-16384").mkdir(parents=True)
    (folder / "length-16384" / name).write_text("{}\n")


@pytest.mark.parametrize(
    ("arguments", "before", "message"),
    [
        ([], lambda folder: other_run(folder, "results.jsonl"), "holds results.jsonl without a config.json"),
        ([], lambda folder: other_run(folder, "config.json"), "config.json cannot be read"),
        ([], lambda folder: (folder.mkdir(), (folder / "length-16384").touch()), "--output must be a folder"),
        ([], lambda folder: folder.touch(), "--output must be a folder"),
        (
            [],
            lambda folder: (folder.mkdir(), (folder / "comparison.md").write_text("mine")),
            "comparison.md is no comparison of selfextend/table-3: name another folder with --output",
        ),
        (
            ["--trained-window", "1100"],
            lambda folder: None,
            "reaches 2240 tokens on a trained window of 1100 (eq. 4), and the longest text with its answer has 16386: "
            "the methods here are the paper's; give other lengths by --set, or methods of your own to 'ropewalk eval "
            "leval --method'",
        ),
    ],
)
def test_what_refuses_the_second_run_does_so_before_the_first(theirs, tmp_path, arguments, before, message):
    folder = tmp_path / "out"
    before(folder)
    there = sorted(tmp_path.rglob("*"))
    failed = run(*theirs, *arguments, "--output", folder)
    assert failed.exit_code == 2
    assert message in " ".join(failed.stderr.split())
    assert sorted(tmp_path.rglob("*")) == there  # nothing is written


def test_without_lm_eval_nothing_is_started(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "ropewalk.eval.tasks.short.harness", raising=False)
    monkeypatch.delattr("ropewalk.eval.tasks.short.harness", raising=False)  # a test before may have imported it
    failed = run("reproduce", "selfextend/table-4", "--model", "dummy", "--output", tmp_path / "out")
    assert failed.exit_code == 2
    assert 'pip install "ropewalk[lm-eval]"' in failed.stderr
    assert not (tmp_path / "out").exists()


def test_a_model_of_the_hub_that_cannot_be_loaded_is_told_of_tokens(tmp_path, monkeypatch):
    from ropewalk.integrations.transformers import models

    def gated(*_, **__):
        raise models.ModelError("cannot load the model: you are not in the list of those who may")

    monkeypatch.setattr("ropewalk.cli.model_options.load", gated)
    failed = run(
        "reproduce", "selfextend/figure-4", "--model", "mistralai/Mistral-7B-Instruct-v0.1", "-o", tmp_path / "out"
    )
    assert failed.exit_code == 2
    assert "HF_TOKEN" in failed.stderr


@pytest.mark.parametrize("option", sorted({name for kind in TASKS.values() for name in kind.model_fields}))
def test_options_of_eval_are_answered_with_what_there_is_here(option):
    """As are those that methods have."""
    given = f"--{option.replace('_', '-')}"
    if given in run("reproduce", "--help").stdout:
        return
    failed = run("reproduce", "selfextend/table-1", given, "1")
    assert failed.exit_code == 2
    assert f"there is no option {given}: settings are given as --set {option}=VALUE" in failed.stderr


def test_methods_are_the_papers():
    assert "'ropewalk eval' takes others" in run("reproduce", "selfextend/table-1", "--method", "yarn").stderr


@pytest.mark.parametrize("name", [name for name, one in experiments().items() if one.is_measured])
def test_errors_name_no_option_that_there_is_not_here(name, tmp_path):
    """Of each setting of each task, and of data that are not there."""
    known = {*re.findall(r"--[a-z][a-z-]+", run("reproduce", "--help").stdout)}
    common = ["reproduce", name, "--model", "dummy", "--data-dir", tmp_path / "none", "--output", tmp_path / "out"]
    told = [run(*common, "--set", f"{setting}=?") for setting in TASKS[experiments()[name].task].model_fields]
    for failed in [*told, run(*common)] if "data_dir" in TASKS[experiments()[name].task].model_fields else told:
        assert failed.exit_code in (2, 3)
        assert {*re.findall(r"--[a-z][a-z-]+", failed.stderr)} <= known, failed.stderr


def test_tables_are_no_wider_than_the_terminal(theirs, tmp_path):
    """And no word is cut."""
    wide = run(*theirs, "--output", tmp_path / "out").stdout
    narrow = CliRunner().invoke(app, [*map(str, theirs), "--output", str(tmp_path / "out")], env={"COLUMNS": "80"})
    lines = [line for line in narrow.stdout.splitlines() if line[:1] in "┏┃│"]
    assert lines
    assert max(map(len, lines)) <= 80
    for shown in (wide, narrow.stdout):
        assert "…" not in shown
        assert "paper: SE-Llama-2-7b-chat" in shown
    assert narrow.stdout.count(", continued") > wide.count(", continued") == 0
    lengths = "lengths=300,400,500,600,700,800"
    few = ["reproduce", "selfextend/figure-2", "--model", "dummy", "--set", "text=alice", "--set", lengths]
    several = CliRunner().invoke(app, [*few, "--output", str(tmp_path / "few")], env={"COLUMNS": "80"}).stdout
    assert "…" not in several
    assert max(len(line) for line in several.splitlines() if line[:1] in "┏┃│") <= 80


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["selfextend/table-22"], "Did you mean 'selfextend/table-2'?"),
        (["selfextend/figure-4", "--set", "lengths"], "--set must be NAME=VALUE, such as subset=mini, got 'lengths'"),
        (["selfextend/figure-4", "--set", "length=4k"], "passkey has no setting 'length'"),
        (
            ["selfextend/figure-4", "--set", "lengths=x"],
            "--set lengths must be whole numbers such as 4096 or 16k, got 'x'",
        ),
        (["selfextend/table-2", "--set", "data-dir=x"], "the folder of data sets is given by --data-dir"),
        (["selfextend/table-6"], "selfextend/table-6 is not run: nobody here has read it"),
        (["selfextend/figure-4", "--model", "no/such/folder"], "no/such/folder"),
        (["selfextend/table-2", "--model", "dummy", "--data-dir", "nowhere"], "--data-dir must hold longbench/full/"),
    ],
)
def test_mistakes(tmp_path, arguments, message):
    failed = run("reproduce", *arguments, "--output", tmp_path / "out")
    assert failed.exit_code == 2
    assert message in " ".join(failed.stderr.split())
    assert not (tmp_path / "out" / "comparison.md").exists()
