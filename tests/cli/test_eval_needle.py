import json

import pytest
from typer.testing import CliRunner

from ropewalk.cli import app

SMALL = ["--model", "dummy", "--text", "alice", "--lengths", "200,1k", "--depths", "3", "--samples", "2"]


def run(*arguments):
    return CliRunner().invoke(app, ["eval", "needle", *map(str, arguments)])


def test_a_run_and_the_same_again(tmp_path):
    first = run(*SMALL, "-o", tmp_path)
    assert first.exit_code == 0, first.output
    assert first.stdout == f"24 examples done: {tmp_path}\n"
    settings = json.loads((tmp_path / "config.json").read_text())["settings"]
    assert (settings["text"], settings["lengths"], settings["chat"]) == ("alice", [200, 1024], True)
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {(row["cell"]["length"], row["prompt_tokens"]) for row in rows} == {(200, 200), (1024, 1024)}
    assert all(row["scores"] == {"recall": 0, "exact_match": 0} for row in rows)
    assert run(*SMALL, "-o", tmp_path).stdout.startswith("24 were there already, 0 examples done")
    assert "was started with settings" in run(*SMALL, "--no-chat", "-o", tmp_path).stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "esays"], "no text is called 'esays'. Did you mean 'essays'?"),
        (["--text", "essays", "--data-dir", "nowhere"], "holds no essays: --data-dir must hold them as needle/Paul"),
        (["--lengths", "no"], "--lengths must be whole numbers such as 4096 or 16k, got 'no'"),
        (["--depths", "2.5"], "--depths must be numbers from 0 to 1"),
        (["--samples", "0"], "--samples"),
    ],
)
def test_bad_input(tmp_path, arguments, message):
    result = run(*SMALL, "-o", tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert not (tmp_path / "out").exists()
