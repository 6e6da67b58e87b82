# SPDX-License-Identifier: Apache-2.0
"""`ropewalk reproduce`."""

import pytest
from typer.testing import CliRunner

from ropewalk.cli import app
from ropewalk.eval.reproduce import experiments

FIGURE = ["reproduce", "selfextend/figure-4", "--model", "dummy", "--set", "lengths=256,512", "--limit", "10"]


def run(*arguments):
    return CliRunner().invoke(app, [str(each) for each in arguments], env={"COLUMNS": "200"})


def test_the_list_has_all():
    shown = run("reproduce", "list")
    assert shown.exit_code == 0
    for name in experiments():
        assert f"{name}: " in shown.stdout
    assert "HF_TOKEN" in shown.stdout


def test_a_figure_and_again(tmp_path):
    first = run(*FIGURE, "--output", tmp_path / "out")
    assert first.exit_code == 0, first.stderr
    assert "20 examples done" in first.stdout
    assert "selfextend/figure-4: exact match" in first.stdout
    page = (tmp_path / "out" / "comparison.md").read_text()
    assert "| 512 |" in page
    assert "lengths is 256,512" in page
    again = run(*FIGURE, "--output", tmp_path / "out")
    assert "20 were there already, 0 examples done" in again.stdout
    other = run(*FIGURE[:-4], "--set", "lengths=512", "--output", tmp_path / "out")
    assert other.exit_code == 2
    assert "was started with settings" in other.stderr


@pytest.mark.parametrize("name", [name for name, one in experiments().items() if one.instead])
def test_what_is_no_experiment_says_what_shows_the_same(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = run("reproduce", name)
    assert shown.exit_code == 0
    assert experiments()[name].instead in shown.stdout
    assert run(*experiments()[name].instead.split()[1:]).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["selfextend/table-22"], "Did you mean 'selfextend/table-2'?"),
        (["selfextend/figure-4", "--set", "lengths"], "--set must be NAME=VALUE, such as subset=mini, got 'lengths'"),
        (["selfextend/figure-4", "--set", "length=4k"], "passkey has no setting 'length'"),
        (["selfextend/figure-4", "--set", "lengths=x"], "--lengths must be whole numbers such as 4096 or 16k, got 'x'"),
        (["selfextend/figure-4", "--model", "no/such/folder"], "no/such/folder"),
        (["selfextend/table-2", "--model", "dummy", "--data-dir", "nowhere"], "--data-dir must hold longbench/full/"),
    ],
)
def test_mistakes(tmp_path, arguments, message):
    failed = run("reproduce", *arguments, "--output", tmp_path / "out")
    assert failed.exit_code == 2
    assert message in " ".join(failed.stderr.split())
    assert not (tmp_path / "out" / "comparison.md").exists()
