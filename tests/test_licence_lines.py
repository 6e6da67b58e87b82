# SPDX-License-Identifier: Apache-2.0
"""Every source file says under which licence it is, in its first lines, as SPDX has it."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[1]
LINE = "SPDX-License-Identifier: Apache-2.0"
FOLDERS = ("src", "tests", "benchmarks", "examples", "docs")


def test_every_source_file_names_its_licence():
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 100
    without = [path for path in files if LINE not in "".join(path.read_text(encoding="utf-8").splitlines(True)[:2])]
    assert [path.relative_to(ROOT).as_posix() for path in without] == []
