# SPDX-License-Identifier: Apache-2.0
"""Every benchmark starts, and those of a CPU measure something."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ropewalk.testing import tiny_model

FOLDER = Path(__file__).parents[2] / "benchmarks"


def run(name, *arguments):
    command = [sys.executable, FOLDER / f"{name}.py", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["attention_cpu", "attention_gpu", "model_cpu", "model_gpu"])
def test_it_starts(name):
    assert "--output" in run(name, "--help")


def test_attention_on_a_cpu(tmp_path):
    run("attention_cpu", "--lengths", 64, "--rounds", 2, "--output", tmp_path / "rows.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {(row["work"], row["dtype"]) for row in rows} == {
        (work, dtype) for work in ("prefill", "decode") for dtype in ("bfloat16", "float32")
    }
    assert all(row["ms_p50"] > 0 for row in rows)


def test_a_model_on_a_cpu(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    for _ in range(2):  # added to what is there
        run(
            "model_cpu",
            "--model",
            tmp_path / "model",
            "--tokens",
            100,
            "--rounds",
            2,
            "--output",
            tmp_path / "rows.jsonl",
        )
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    assert all(row["ms_p50"] > 0 and row["tokens"] == 100 for row in rows)
    assert str(tmp_path) not in (tmp_path / "rows.jsonl").read_text()
