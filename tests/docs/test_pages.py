# SPDX-License-Identifier: Apache-2.0
"""Runs the examples of the README and of the documentation, so that they stay true.

- ```` ```python ```` blocks of a page run in their order, in one namespace, with a tiny model in the place of the one
  on the hub; a ```` ```text ```` block right after one is what it prints;
- every `$ ropewalk ...` line of ```` ```console ```` blocks runs, and the output that the block shows must appear;
- every `ropewalk ...` or `make ...` line of ```` ```sh ```` blocks must be one that there is, with its options.

In what is shown, `...` stands for any lines.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from typer.main import get_command
from typer.testing import CliRunner

from ropewalk.cli import app

pytestmark = pytest.mark.docs

ROOT = Path(__file__).parents[2]
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
# The findings have a test of their own; the log is of what was tried once.
PAGES = [
    ROOT / "README.md",
    *sorted(
        page
        for page in (ROOT / "docs").rglob("*.md")
        if "results" not in page.relative_to(ROOT).parts and page.name != "log.md"
    ),
]


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the page's line that it begins after, its text, and where the block ends."""

    language: str
    line: int
    text: str
    end: int


def blocks(page):
    return [
        Block(token.info.partition(" ")[0], token.map[0] + 1, token.content, token.map[1])
        for token in MarkdownIt().parse(page.read_text())
        if token.type == "fence"
    ]


def named(page):
    return page.relative_to(ROOT).as_posix()


def with_blocks(language):
    return [pytest.param(page, id=named(page)) for page in PAGES if any(b.language == language for b in blocks(page))]


def commands(page):
    """Of the console blocks: (line of the block, command, output lines that the block shows)."""
    for block in blocks(page):
        if block.language == "console":
            before, *parts = ("\n" + block.text.replace("\\\n", " ")).split("\n$ ")
            assert not before.strip(), f"{named(page)}:{block.line}: output before a command"
            for part in parts:
                command, *shown = part.splitlines()
                yield block.line, command, shown


def assert_shown(shown, printed):
    """Each shown line appears in what was printed, in this order; next to each other where no `...` is between."""
    lines = [line.rstrip() for line in printed.splitlines() if line.strip()]
    at, anywhere = 0, True
    for line in (line.rstrip() for line in shown if line.strip()):
        if line.strip() == "...":
            anywhere = True
            continue
        found = lines.index(line, at) if line in lines[at:] else None
        assert found is not None, f"{line!r} is not in the output, or not in this order:\n{printed}"
        assert anywhere or found == at, f"{line!r} does not follow in the output at once:\n{printed}"
        at, anywhere = found + 1, False


@pytest.mark.parametrize("page", with_blocks("python"))
def test_python(page, workplace, capsys):
    namespace = {"__name__": "__main__"}
    found = [*blocks(page), Block("", 0, "", 0)]
    for block, following in pairwise(found):
        if block.language != "python":
            continue
        code = block.text.replace(HUB, "./my-model")
        capsys.readouterr()
        # A traceback then shows the page's own line.
        exec(compile("\n" * block.line + code, page, "exec", dont_inherit=True), namespace)
        if following.language == "text" and following.line - 1 - block.end <= 1:
            assert_shown(following.text.splitlines(), capsys.readouterr().out)


@pytest.mark.parametrize("page", with_blocks("console"))
def test_console(page, workplace):
    for line, command, shown in commands(page):
        program, *arguments = shlex.split(command.replace(HUB, "./my-model"))
        assert program == "ropewalk", f"{named(page)}:{line}: only ropewalk's commands are run"
        environment = {"COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb"}
        done = CliRunner().invoke(app, arguments, env=environment, prog_name="ropewalk")
        assert done.exit_code == 0, f"{named(page)}:{line}: {done.output}"
        assert_shown(shown, done.stdout)


@pytest.mark.parametrize("page", with_blocks("sh"))
def test_commands_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for block in blocks(page):
        if block.language != "sh":
            continue
        for line in block.text.replace("\\\n", " ").splitlines():
            program, *arguments = shlex.split(line, comments=True) or [""]
            if program == "make":
                assert arguments[0] in targets, f"{named(page)}:{block.line}: make {arguments[0]}"
            elif program == "ropewalk":
                parse(arguments)


def parse(arguments):
    """Reads a command's arguments as the command line does, and runs nothing."""
    command, parent = get_command(app), None
    while hasattr(command, "commands"):
        name, *arguments = arguments
        parent = command.make_context(command.name, [name], parent=parent)
        command = command.get_command(parent, name)
        if command is None:
            raise KeyError(name)
    command.make_context(command.name, arguments, parent=parent)


def test_shown_lines_must_follow_each_other():
    assert_shown(["a", "...", "d"], "a\nb\nc\nd\n")
    for shown in (["a", "c"], ["c", "...", "a"], ["e"]):
        with pytest.raises(AssertionError):
            assert_shown(shown, "a\nb\nc\nd\n")


def test_a_command_that_is_not_there_is_found():
    parse(["eval", "passkey", "--lengths", "8k", "--output", "results"])
    for arguments in (["generate", "--fiel", "report.txt"], ["eval", "paskey"], ["answer"]):
        with pytest.raises(Exception, match=arguments[-2] if len(arguments) > 2 else arguments[-1]):
            parse(arguments)


@pytest.mark.slow
def test_the_readme_begins_with_lines_that_run(tmp_path, monkeypatch, capsys):
    """On the real model, which answers as the README says."""
    from ropewalk.integrations.transformers.models import load
    from ropewalk.integrations.transformers.sources import embedded

    loaded = load(embedded())
    loaded.model.save_pretrained(tmp_path / "model")
    loaded.tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    code = next(block.text for block in blocks(ROOT / "README.md") if block.language == "python")
    exec(compile(code.replace(HUB, "./model"), "README.md", "exec", dont_inherit=True), {})
    assert capsys.readouterr().out == "The pass key is 71432\n"
