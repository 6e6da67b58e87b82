"""Runs the README's examples, so that they stay true.

- ```` ```python ```` blocks run in their order, in one namespace that has a small `model` and its `inputs`, as a reader
  types them; ```` ```python no-run ```` blocks are left out;
- `$ ropewalk explain ...` lines of ```` ```console ```` blocks run, and the output that the block shows must appear.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

pytestmark = pytest.mark.docs

README = Path(__file__).parents[2] / "README.md"
FENCES = [
    (token.info.split(), token.map[0] + 1, token.content)
    for token in MarkdownIt().parse(README.read_text())
    if token.type == "fence" and token.map
]


def console_commands():
    """The commands to run in the README: (line of the block, command, output lines that the block shows)."""
    for info, line, text in FENCES:
        if info[:1] != ["console"]:
            continue
        for part in ("\n" + text.replace("\\\n", " ")).split("\n$ ")[1:]:
            command, *shown = part.splitlines()
            if shlex.split(command)[:2] == ["ropewalk", "explain"]:
                yield pytest.param(command, shown, id=f"line{line}")


@pytest.fixture
def model():
    """A tiny random-weight model that says it was trained on 8192 tokens, so that examples can use real lengths."""
    from ropewalk.testing import tiny_model

    model = tiny_model("llama")
    model.config.max_position_embeddings = 8192
    return model


def test_python(model, tmp_path, monkeypatch):
    import torch

    torch.manual_seed(0)
    input_ids = torch.randint(model.config.vocab_size, (1, 96))
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    monkeypatch.chdir(tmp_path)
    blocks = [(line, code) for info, line, code in FENCES if info[:1] == ["python"] and "no-run" not in info]
    assert blocks
    namespace = {"__name__": "readme", "model": model, "inputs": inputs}
    for line, code in blocks:
        padded = "\n" * line + code  # a traceback then shows the README's own line
        exec(compile(padded, README, "exec"), namespace)


@pytest.mark.parametrize(("command", "shown"), list(console_commands()))
def test_console(command, shown, tmp_path):
    arguments = shlex.split(command)[1:]
    script = Path(sys.executable).with_name("ropewalk")
    plain = os.environ | {"COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb"}
    done = subprocess.run([script, *arguments], cwd=tmp_path, env=plain, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed = iter(line.rstrip() for line in done.stdout.splitlines())
    for line in shown:
        if line.strip() not in ("", "..."):
            assert line.rstrip() in printed, f"{line!r} is not in the output, or not in this order:\n{done.stdout}"
