import json

import pytest
from typer.testing import CliRunner

from ropewalk.cli import app


@pytest.fixture
def data_dir(tmp_path):
    folder = tmp_path / "data" / "leval" / "closed"
    folder.mkdir(parents=True)
    paper = {
        "input": "long " * 900,
        "instructions": ["Question 1. Which?", "Question 2. What?"],
        "outputs": ["B", "BC"],
    }
    for name in ("coursera", "tpo"):
        (folder / f"{name}.jsonl").write_text(json.dumps(paper | ({"outputs": ["B", "A"]} if name == "tpo" else {})))
    return tmp_path / "data"


@pytest.fixture
def run(data_dir, tmp_path):
    def invoke(*arguments):
        given = ["--model", "dummy", "--data-dir", data_dir, "--tasks", "coursera,tpo", "--length", "300"]
        command = ["eval", "leval", *given, "-o", tmp_path / "out", *arguments]
        return CliRunner().invoke(app, [str(part) for part in command])

    return invoke


def rows_of(tmp_path):
    return [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]


def test_answers_in_words(run, tmp_path):
    first = run()
    assert first.exit_code == 0, first.output
    assert first.stdout == f"8 examples done: {tmp_path / 'out'}\n"
    assert "left out" not in first.stderr
    rows = rows_of(tmp_path)
    assert {row["cell"]["task"] for row in rows} == {"coursera", "tpo"}
    assert {row["prompt_tokens"] for row in rows} == {300}
    assert all(set(row["scores"]) == {"exact_match"} for row in rows)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["settings"]
    assert (settings["tasks"], settings["length"], settings["new_tokens"]) == (["coursera", "tpo"], 300, 512)
    assert run().stdout.startswith("8 were there already, 0 examples done")


def test_options(run, tmp_path):
    first = run("--mode", "options", "--tasks", " coursera , tpo")
    assert first.exit_code == 0, first.output
    assert first.stdout.startswith("6 examples done")
    assert "coursera: questions left out because several options are right: 1\n" in first.stderr
    assert all(row["scores"] == {"accuracy": 0.25, "probability": 0.25} for row in rows_of(tmp_path))
    assert "was started with settings" in run("--mode", "generate").stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "gsm"], "--tasks must be one of coursera, gsm100, quality, tpo, sci_fi, codeU, got 'gsm'"),
        (["--tasks", "gsm"], "Did you mean 'gsm100'?"),
        (["--tasks", "gsm100", "--mode", "options"], "--tasks: gsm100 has no options to choose from"),
        (["--mode", "option"], "--mode must be one of generate, options, got 'option'. Did you mean 'options'?"),
        (["--tasks", "codeU"], "--data-dir must hold leval/closed/codeU.jsonl, or leave codeU out of --tasks"),
        (["--length", "1k,2k"], "--length is one number of tokens, got '1k,2k'"),
        (["--length", "0"], "--length must be whole numbers"),
        (["--new-tokens", "0"], "--new-tokens"),
    ],
)
def test_bad_input(run, tmp_path, arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert not (tmp_path / "out").exists()
