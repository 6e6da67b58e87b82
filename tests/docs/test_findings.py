# SPDX-License-Identifier: Apache-2.0
"""The committed results: their pages are what the rows give, and the findings point at what is there."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ropewalk.cli import app
from ropewalk.eval.report.estimates import Estimate

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


@pytest.mark.parametrize(
    ("is_", "interval"), [("more", (-0.1, 0.4)), ("less", (-0.4, 0.1)), ("alike", (0.1, 0.4)), ("more", None)]
)
def test_what_an_interval_does_not_support_is_not_said(findings, is_, interval):
    with pytest.raises(ValueError, match=r"is not|too few"):
        findings["said"](Estimate(0.2, 9, 9, interval), 0, is_)


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
