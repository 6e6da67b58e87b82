# SPDX-License-Identifier: Apache-2.0
"""What makes the site of the pages (docs/site_pages.py): links lead where they led, nothing is fetched from elsewhere.
That the whole site builds, `make docs` says."""

from __future__ import annotations

import re
import runpy
from collections import Counter
from html import unescape
from pathlib import Path
from types import SimpleNamespace

import pytest

from ropewalk.cli.models import notes, rows

pytestmark = pytest.mark.docs

ROOT = Path(__file__).parents[2]
SITE = runpy.run_path(str(ROOT / "docs/site_pages.py"))


class Pages:
    """In the place of mkdocs' files: every Markdown file of the folder is a page."""

    def get_file_from_path(self, path):
        return path if path in SITE["SOURCES"] or path.endswith(".md") else None


def rewritten(markdown, page):
    return SITE["on_page_markdown"](markdown, SimpleNamespace(file=SimpleNamespace(src_uri=page)), None, Pages())


@pytest.mark.parametrize(
    ("page", "before", "after"),
    [
        ("gpu.md", "[the log](log.md#a)", "[the log](log.md#a)"),
        ("how-to/batch.md", "[Evaluate](../evaluation.md)", "[Evaluate](../evaluation.md)"),
        ("evaluation.md", "[found](results/README.md)", "[found](results/README.md)"),
        # Pages that live elsewhere in the repository, from here and from there.
        ("how-to/add-a-map.md", "[rules](../../CONTRIBUTING.md#commits)", "[rules](../contributing.md#commits)"),
        ("evaluation.md", "[p](../src/ropewalk/eval/tasks/passkey/README.md)", "[p](tasks/passkey.md)"),
        ("contributing.md", "[design](docs/design.md)", "[design](design.md)"),
        # Files that are no pages: plain text. What is nowhere stays, and the build complains.
        ("gpu.md", "[`fused.py`](../src/ropewalk/ops/fused.py)", "`fused.py`"),
        ("evaluation.md", "[Each task](../src/ropewalk/eval/tasks)", "Each task"),
        ("gpu.md", "[gone](../src/ropewalk/ops/gone.py)", "[gone](../src/ropewalk/ops/gone.py)"),
        ("gpu.md", "[paper](https://arxiv.org/abs/2401.01325)", "[paper](https://arxiv.org/abs/2401.01325)"),
    ],
)
def test_links(page, before, after):
    assert rewritten(f"See {before}.", page) == f"See {after}."


def cells(line):
    return [unescape(cell.strip()) for cell in line.removeprefix("|").removesuffix("|").split(" | ")]


def test_the_page_of_models_is_what_the_rows_say():
    lines = [cells(line) for line in SITE["models"]().splitlines() if line.startswith("|")]
    found, versions = rows(), list(rows()[0]["transformers"])
    assert lines[0] == ["", *(f"transformers {version}" for version in versions)]
    shown = {line[0].strip("`"): line for line in lines if line[0].startswith("`")}
    assert shown.keys() == {row["name"] for row in found}
    for row in found:
        assert shown[row["name"]][-1] == notes(row)
        assert len(shown[row["name"]]) == (5 if row["outcome"] == "right" else 2)
    for line in lines[2 : 2 + len({outcome for row in found for outcome in row["transformers"].values()})]:
        assert line[1:] == [str(sum(row["transformers"].get(one) == line[0] for row in found)) for one in versions]


def test_the_readme_counts_the_same_models():
    text = " ".join((ROOT / "README.md").read_text().split())
    counts = Counter(row["outcome"] for row in rows())
    assert f"of {counts.total()}, images and videos included, {counts['right']} are right and " in text
    assert f"{counts['refused']} refused" in text


@pytest.mark.parametrize(
    ("html", "fetched"),
    [
        ('<a href="https://arxiv.org/abs/2401.01325">', False),
        ('<link rel="stylesheet" href="assets/main.css">', False),
        ('<img alt="" src="images/tiles.png">', False),
        ('<script src="https://unpkg.com/shim"></script>', True),
        ('<link rel="stylesheet" href="https://fonts.googleapis.com/css">', True),
        ('<link href="//fonts.gstatic.com" rel="preconnect">', True),
        ('<img alt="a badge" src="https://img.shields.io/badge">', True),
    ],
)
def test_what_is_fetched_from_elsewhere_is_found(html, fetched):
    assert bool(SITE["FETCHED"].search(html)) == fetched


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_of_pages_outside_of_the_site(page):
    targets = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", (ROOT / page).read_text())
    assert [target for target in targets if not (ROOT / target).exists()] == []
