# SPDX-License-Identifier: Apache-2.0
"""The scripts in `examples` run, with a tiny model in the place of the one on the hub, and print what they are for."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.docs

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
PRINTS = {
    "batch": ["    77 tokens: ", "   452 tokens: ", "   527 tokens: "],
    "choose_parameters": [
        "SelfExtend(group_size=11, window=1023): positions up to 3908",
        "Identity reaches 8192 tokens",
    ],
    "compare_maps": ["unmodified: ", "\nSelfExtend(", "\nSELF(", "\nLeakyReRoPE(", "\nReRoPE("],
    "long_document": ["LlamaForCausalLM under SelfExtend(", "Reading "],
    "own_map": ["tensor([[ 0, -1, ", "TwoSizes(window=1024, reach=4096)"],
}


def test_every_example_is_run():
    assert [path.stem for path in EXAMPLES] == sorted(PRINTS)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, stand_in, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [path.name, str(stand_in)])
    runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    assert [text for text in PRINTS[path.stem] if text not in printed] == []
