import json

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
    first = run(*arguments, "--limit", "3")
    assert first.exit_code == 0, first.output
    assert first.stdout == f"6 examples done: {tmp_path / 'out'}\n"
    assert "no training questions of gsm8k: their shots are other questions" in first.stderr
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["settings"]["shots_from"] == {"gsm8k": "test"}
    # Four windows of the stand-in.
    assert config["methods"] == ["unmodified", "selfextend(group_size=11, window=1023)"]
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert all(row["facts"]["versions"]["lm_eval"] and row["prompt_tokens"] for row in rows)
    assert run(*arguments).stdout.startswith("6 were there already, 8 examples done")


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
        (["--method", "selfexend"], "Did you mean 'selfextend'?"),
        (["--dtype", "half"], "--dtype must be one of"),
        (["--batch-size", "0"], "--batch-size"),
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
