import json

import pytest
from typer.testing import CliRunner

from ropewalk.cli import app

SMALL = ["--model", "dummy", "--tasks", "passage_count, trec", "--length", "200"]


def run(data_dir, *arguments):
    return CliRunner().invoke(app, ["eval", "longbench", "--data-dir", str(data_dir), *map(str, arguments)])


@pytest.fixture
def data_dir(tmp_path):
    folder = tmp_path / "data" / "longbench" / "full"
    folder.mkdir(parents=True)
    for task, answer, classes in (("passage_count", "12345", None), ("trec", "Food", ["Food", "City"])):
        example = {"context": "a word " * 400, "input": "Which?", "answers": [answer], "all_classes": classes}
        (folder / f"{task}.jsonl").write_text(f"{json.dumps(example)}\n" * 3)
    return tmp_path / "data"


def test_a_run_and_the_same_again(data_dir, tmp_path):
    output = tmp_path / "out"
    first = run(data_dir, *SMALL, "-o", output)
    assert first.exit_code == 0, first.output
    assert first.stdout == f"12 examples done: {output}\n"
    settings = json.loads((output / "config.json").read_text())["settings"]
    assert (settings["tasks"], settings["length"], settings["chat"]) == (["trec", "passage_count"], 200, True)
    assert len(settings["sha256"]) == 64
    rows = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    assert {(row["cell"]["task"], row["scores"]["score"]) for row in rows} == {("passage_count", 1.0), ("trec", 0.0)}
    assert all(row["prompt_tokens"] <= 200 for row in rows)
    assert run(data_dir, *SMALL, "-o", output).stdout.startswith("12 were there already, 0 examples done")
    assert "was started with settings" in run(data_dir, *SMALL, "--no-chat", "-o", output).stderr
    (data_dir / "longbench" / "full" / "trec.jsonl").write_text('{"context": "", "input": "", "answers": ["x"]}')
    assert "was started with settings" in run(data_dir, *SMALL, "-o", output).stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "hotpot"], "--tasks must be one of narrativeqa, "),
        (["--tasks", "trek"], "got 'trek'. Did you mean 'trec'?"),
        (["--subset", "min"], "--subset must be one of full, mini, got 'min'. Did you mean 'mini'?"),
        (["--length", "1k,2k"], "--length is one number of tokens, got '1k,2k'"),
        (["--length", "1"], "--length: Input should be greater than or equal to 2, got 1"),
        (["--tasks", "qasper"], "qasper.jsonl: --data-dir must hold this subset as longbench/full/TASK.jsonl"),
        (["--subset", "mini"], "--data-dir must hold this subset as longbench/minilongbench/TASK.jsonl"),
    ],
)
def test_bad_input(data_dir, tmp_path, arguments, message):
    result = run(data_dir, *SMALL, "-o", tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert not (tmp_path / "out").exists()
