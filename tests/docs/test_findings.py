# SPDX-License-Identifier: Apache-2.0
"""The committed results: their pages are what the rows give, and the findings point at what is there."""

from __future__ import annotations

import math
import re
import runpy
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ropewalk.cli import app
from ropewalk.data import alice
from ropewalk.eval.results import read

pytestmark = pytest.mark.docs

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs/results"
COMMANDS = [
    shlex.split(line)
    for line in (RESULTS / "commands.sh").read_text().replace("\\\n", " ").splitlines()
    if line.startswith("ropewalk ")
]


def output_of(command):
    return ROOT / command[command.index("--output") + 1]


@pytest.mark.parametrize(
    "command", [pytest.param(one, id=output_of(one).stem) for one in COMMANDS if one[1] == "report"]
)
def test_a_page_is_what_the_rows_give(command, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    committed = output_of(command).with_suffix(".md")
    page = tmp_path / f"{committed.stem}.html"
    result = CliRunner().invoke(app, [*command[1 : command.index("--output")], "--output", str(page)])
    assert result.exit_code == 0, result.output
    assert page.with_suffix(".md").read_text() == committed.read_text()


def test_comparisons_are_what_the_rows_give():
    assert runpy.run_path(str(RESULTS / "comparisons.py"))["text"]() == (RESULTS / "comparisons.md").read_text()


def test_a_tiny_mpt_is_trained_and_measured(tmp_path):
    """A few steps: of what comes out, that it was trained, is read past its window, and what a map changes there."""
    tiny = runpy.run_path(str(RESULTS / "tiny_mpt.py"))
    seen, unseen = tiny["split"](alice()[:20_000])
    assert seen + unseen == alice()[:20_000]
    tokenizer = tiny["tokenizer_for"](seen)
    assert tokenizer.decode(tokenizer(unseen + "\u20ac")["input_ids"]) == unseen + "\u20ac"
    book = tmp_path / "book.txt"
    book.write_text(alice()[:20_000])
    tiny["main"](tmp_path / "mpt", book, window=16, steps=20, batch=4, seed=0)
    asked = [
        *("eval", "perplexity", "--model", tmp_path / "mpt", "--data-dir", tmp_path / "mpt", "--trained-window", "16"),
        *("--lengths", "8,256", "--stride", "4", "--books", "2", "--windows", "1", "--dtype", "float32"),
        *("--method", "selfextend(group_size=40, window=8)", "--method", "unmodified", "--output", tmp_path / "rows"),
    ]
    done = CliRunner().invoke(app, [str(one) for one in asked])
    assert done.exit_code == 0, done.output
    nll = {(row.method, row.example): row.scores["nll"] for row in read(tmp_path / "rows").rows}
    assert len(nll) == 8
    for (method, example), its in nll.items():
        length, _, _ = example.partition("-")
        untrained = 4 * math.log(tiny["VOCABULARY"])
        assert its < untrained
        same = its == pytest.approx(nll["unmodified", example], abs=1e-5)
        assert same == (method == "unmodified" or length == "8")


def test_every_folder_has_its_command():
    written = {output_of(command) for command in COMMANDS if command[1] == "eval"}
    assert written == {config.parent for config in RESULTS.glob("*/config.json")}


def test_the_findings_point_at_what_is_there():
    text = (RESULTS / "README.md").read_text()
    targets = re.findall(r"\]\(([^)#]+)\)|<img src=\"([^\"]+)\"", text)
    assert len(targets) > 10
    missing = [link or image for link, image in targets if not (RESULTS / (link or image)).is_file()]
    assert not missing
    for command in COMMANDS:
        if command[1] == "eval":
            assert f"`{output_of(command).name}`" in text
