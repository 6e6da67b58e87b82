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
from ropewalk.eval.report.estimates import Estimate
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


@pytest.fixture
def findings(monkeypatch):
    monkeypatch.syspath_prepend(RESULTS)
    return runpy.run_path(str(RESULTS / "findings.py"))


def test_findings_are_what_the_rows_give(findings):
    """Every measured figure, in headings too; and no sentence says what its interval does not support."""
    assert findings["text"]() == (RESULTS / "README.md").read_text()


def test_findings_quote_no_figure_by_hand():
    literal = re.sub(r"\{\{.*?\}\}|\{%.*?%\}", "", (RESULTS / "findings.md.jinja").read_text(), flags=re.DOTALL)
    not_measured = r"width=\"\d+%\"|Qwen2\.5-\S+|95% intervals|; 0\.05 would take"
    assert not re.findall(r"\d+\.\d+|\d ?%|\d+ of \d+", re.sub(not_measured, "", literal))


def test_figures_quoted_on_other_pages(findings):
    value, se = findings["value"], findings["SELFEXTEND"]
    page = " ".join((ROOT / "docs/how-to/parameters.md").read_text().split())
    found, unmodified = (round(100 * float(value("passkey", method))) for method in (se, "unmodified"))
    books, rerope = (float(value("perplexity", method, 32)) for method in (se, "rerope"))
    assert findings["hits"]("passkey", "rerope") == "400 of 400"
    assert (
        f"ReRoPE found every pass key to 32k, SelfExtend {found}% of them, the unmodified model {unmodified}%." in page
    )
    assert f"perplexity {books:.1f} with SelfExtend, {rerope:.1f} with ReRoPE" in page


@pytest.mark.parametrize(
    ("is_", "interval"), [("more", (-0.1, 0.4)), ("less", (-0.4, 0.1)), ("alike", (0.1, 0.4)), ("more", None)]
)
def test_what_an_interval_does_not_support_is_not_said(findings, is_, interval):
    with pytest.raises(ValueError, match=r"is not|too few"):
        findings["said"](Estimate(0.2, 9, 9, interval), 0, is_)


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
