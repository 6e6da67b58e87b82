# SPDX-License-Identifier: Apache-2.0
"""What the site has beside the pages of this folder, for mkdocs (`hooks` in mkdocs.yml): pages that live elsewhere in
the repository, the command line's own help, the rows of `ropewalk models`, and a look at what was built.

Links between pages are those of the repository, so that they work there too. A link to a file that is no page becomes
plain text, because the repository has no address yet.
"""

from __future__ import annotations

import html
import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from posixpath import dirname, join, normpath, relpath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
TASKS = sorted((ROOT / "src/ropewalk/eval/tasks").glob("*/README.md"))
# Pages that live elsewhere: where in the repository, and where on the site.
ELSEWHERE = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    **{task.relative_to(ROOT).as_posix(): f"tasks/{task.parent.name}.md" for task in TASKS},
}
SOURCES = {page: source for source, page in ELSEWHERE.items()}
COMMAND_LINE = "reference/command-line.md"
MODELS = "reference/models.md"

# What models are extended stand for, and the heading of their table.
FAMILIES = {"causal": "Text", "vision-language": "Text and images", "variant": "Other kinds of the same architectures"}
# Of a rotary embedding: those of a tiny model say nothing of a real one's.
PERIODS = re.compile(r", periods from \S+ to [^;,]+")

# A link or a picture of Markdown: what stands before its target, the target, its anchor, what closes it.
LINK = re.compile(r"(!?\[(?P<text>[^\]]*)\]\()(?P<target>[^)#:\s]+)(?P<anchor>#[^)\s]*)?(\))")
# Whatever a browser would fetch to show a page.
FETCHED = re.compile(
    r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"?(https?:|//)"
    r"|<link\b(?=[^>]*\brel=\"?(?:stylesheet|preload|preconnect|icon))[^>]*\bhref=\"?(https?:|//)"
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    from mkdocs.structure.files import File, InclusionLevel

    for source, page in ELSEWHERE.items():
        # Tasks are reached from the page on evaluation, not from the menu.
        level = InclusionLevel.NOT_IN_NAV if source.startswith("src/") else InclusionLevel.INCLUDED
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source), inclusion=level))
    files.append(File.generated(config, COMMAND_LINE, content=command_line()))
    files.append(File.generated(config, MODELS, content=models()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    here = page.file.src_uri
    source = SOURCES.get(here, f"docs/{here}")

    def linked(found: re.Match[str]) -> str:
        opening, _, target, anchor, closing = found.groups()
        there = normpath(join(dirname(source), target))
        there = f"{there}/README.md" if (ROOT / there / "README.md").is_file() else there
        there = ELSEWHERE.get(there, there.removeprefix("docs/"))
        if files.get_file_from_path(there) is not None:
            return f"{opening}{relpath(there, dirname(here) or '.')}{anchor or ''}{closing}"
        exists = (ROOT / dirname(source) / target).exists()
        return found["text"] if exists else found[0]  # what is nowhere is for mkdocs to complain about

    return LINK.sub(linked, markdown)


def on_post_build(config: MkDocsConfig) -> None:
    from mkdocs.exceptions import PluginError

    for page in Path(config.site_dir).rglob("*.html"):
        if fetched := FETCHED.search(page.read_text(encoding="utf-8")):
            raise PluginError(f"{page.relative_to(config.site_dir)} would be fetched from elsewhere: {fetched[0]}")


def command_line() -> str:
    """The page of every command's help."""
    # Read when the command line is imported.
    os.environ |= {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    from typer.main import get_command
    from typer.testing import CliRunner

    from ropewalk.cli import app

    parts = ["# Command line\n"]

    def describe(command: object, words: list[str], level: int) -> None:
        shown = CliRunner().invoke(app, [*words, "--help"], prog_name="ropewalk").stdout.strip("\n")
        text = "\n".join(line.rstrip() for line in shown.splitlines())
        parts.append(f"{'#' * level} `{' '.join(['ropewalk', *words])}`\n\n```text\n{text}\n```\n")
        for name, inner in getattr(command, "commands", {}).items():
            describe(inner, [*words, name], level + 1 if words else level)

    describe(get_command(app), [], 2)
    return "\n".join(parts)


def models() -> str:
    """The page of what was tested on which architecture, from the rows that the package ships."""
    from ropewalk.cli.models import HOW, notes, rows

    found = rows()
    versions = max((list(row["transformers"]) for row in found), key=len)
    counts = Counter((version, outcome) for row in found for version, outcome in row["transformers"].items())
    outcomes = dict.fromkeys(outcome for (_, outcome), _ in counts.most_common())
    parts = [
        "# Models\n\nWhat `extend` does on a tiny model, with random weights, of every architecture of transformers. "
        f"`ropewalk models` shows the same, and `make test-matrix` computes it.\n\n{HOW}\n",
        table(
            ["", *(f"transformers {version}" for version in versions)],
            [
                *([outcome, *(counts[version, outcome] for version in versions)] for outcome in outcomes),
                ["together", *(sum(version in row["transformers"] for row in found) for version in versions)],
            ],
        ),
    ]
    for family, heading in FAMILIES.items():
        lines = [
            [
                f"`{row['name']}`",
                "; ".join(dict.fromkeys(PERIODS.sub("", row["positions"]).split("; "))),
                ", ".join(row["implementations"]),
                f"{row['error']:.0e}",
                notes(row),
            ]
            for row in found
            if (row["outcome"], row["family"]) == ("right", family)
        ]
        head = ["architecture", "positions", "attention runs on", "error", "notes"]
        parts.append(f"## {heading}\n\n{table(head, lines)}")
    for outcome in outcomes:
        # Those with one reason beside each other: most sentences begin with a name.
        others = sorted(
            (notes(row).partition(" ")[2], row["name"], notes(row)) for row in found if row["outcome"] == outcome
        )
        if outcome != "right" and others:
            lines = [[f"`{name}`", why] for _, name, why in others]
            parts.append(f"## {outcome.capitalize()}\n\n{table(['architecture', 'why'], lines)}")
    return "\n".join(parts)


def table(head: list[str], lines: Iterable[Iterable[object]]) -> str:
    def line(cells: Iterable[object]) -> str:
        return f"| {' | '.join(html.escape(str(cell), quote=False).replace('|', '&#124;') for cell in cells)} |\n"

    return line(head) + line("---" for _ in head) + "".join(map(line, lines))
