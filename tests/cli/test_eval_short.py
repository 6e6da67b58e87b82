import json
import subprocess
import sys
from importlib.metadata import version

import pytest
from typer.testing import CliRunner

from ropewalk.cli import app


def run(*arguments):
    return CliRunner().invoke(app, ["eval", "short", "--model", "dummy", *map(str, arguments)])


def write_questions(folder, count=7):
    folder.mkdir(parents=True)
    lines = ({"question": f"Two and {i}?", "answer": f"It is so.\n#### {i + 2}"} for i in range(count))
    (folder / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def data(tmp_path):
    pytest.importorskip("lm_eval")
    write_questions(tmp_path / "data" / "short" / "gsm8k")
    return tmp_path / "data"


def test_a_run_and_the_same_again(data, tmp_path):
    arguments = ["--tasks", "gsm8k", "--data-dir", data, "-o", tmp_path / "out"]
    first = run(*arguments, "--limit", "3")  # the questions 0, 2 and 4 of 7
    assert first.exit_code == 0, first.output
    assert first.stdout == f"6 examples done: {tmp_path / 'out'}\n"
    assert "no training questions of gsm8k: their shots are other questions" in first.stderr
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    settings = config["settings"]
    assert (settings["shots_from"], settings["questions"], settings["lm_eval"]) == (
        {"gsm8k": "test"},
        None,
        version("lm-eval"),
    )
    # Four windows of the stand-in.
    assert config["methods"] == ["unmodified", "selfextend(group_size=11, window=1023)"]
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [row["example"] for row in rows] == ["gsm8k-0", "gsm8k-2", "gsm8k-4"] * 2
    assert all(row["prompt_tokens"] for row in rows)
    assert run(*arguments).stdout.startswith("6 were there already, 8 examples done")


def test_the_first_questions(data, tmp_path):
    arguments = ["--tasks", "gsm8k", "--data-dir", data, "-o", tmp_path / "out"]
    assert run(*arguments, "--questions", "2").stdout.startswith("4 examples done")
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["settings"]
    assert (settings["questions"], settings["asked"]) == (2, {"gsm8k": 2})
    assert run(*arguments, "--questions", "2").stdout.startswith("4 were there already, 0 examples done")
    assert "was started with settings" in run(*arguments, "--questions", "3").stderr


def test_processes_share_the_questions_and_one_says_the_note(data, tmp_path):
    command = [sys.executable, "-m", "ropewalk", "eval", "short", "--model", "dummy", "--processes", "2"]
    arguments = ["--tasks", "gsm8k", "--data-dir", data, "-o", tmp_path / "out", "--questions", "3"]
    done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(line.partition(" examples")[0] for line in done.stdout.splitlines()) == [
        "process 1 of 2: 4",
        "process 2 of 2: 2",
    ]
    assert done.stderr.count("note: ") == 1


def test_a_training_file_makes_another_run(data, tmp_path):
    arguments = ["--tasks", "gsm8k", "--data-dir", data, "-o", tmp_path / "out", "--limit", "1"]
    run(*arguments)
    (data / "short" / "gsm8k" / "train.jsonl").write_text((data / "short" / "gsm8k" / "test.jsonl").read_text())
    result = run(*arguments)
    assert result.exit_code == 2
    assert "was started with settings" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "gsm8k,helaswag"], "--tasks must be one of arc_challenge, hellaswag, mmlu, truthfulqa_mc2, gsm8k"),
        (["--tasks", "helaswag"], "Did you mean 'hellaswag'?"),
        (["--method", "selfexend", "--data-dir", "nowhere"], "Did you mean 'selfextend'?"),
        (["--dtype", "half"], "--dtype must be one of"),
        (["--batch-size", "0"], "--batch-size"),
        (["--questions", "0"], "--questions"),
        (["--data-dir", "nowhere"], "cannot read nowhere/short/gsm8k/test.jsonl"),
    ],
)
def test_bad_input_is_told_before_anything_is_done(data, tmp_path, arguments, message):
    result = run("--tasks", "gsm8k", "-o", tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_infinite_is_refused(data, tmp_path):
    arguments = ["--tasks", "gsm8k", "--data-dir", data, "--method", "unmodified", "--method", "infinite"]
    result = run(*arguments, "-o", tmp_path / "out")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.splitlines()[-1] == (
        "error: infinite(window=8192) reads texts block by block, which lm-eval's tasks do not: leave it out"
    )


def test_without_lm_eval(monkeypatch, tmp_path):
    import ropewalk.eval.tasks.short.harness as harness

    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name="lm_eval")

    monkeypatch.setattr(harness, "import_module", missing)
    result = run("-o", tmp_path / "out")
    assert result.exit_code == 2
    assert result.stderr == (
        "error: the short tasks are lm-eval's, and lm_eval is not installed: run 'pip install \"ropewalk[lm-eval]\"'\n"
    )
