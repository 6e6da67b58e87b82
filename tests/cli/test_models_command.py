# SPDX-License-Identifier: Apache-2.0
"""`ropewalk models`: the rows of the test of all architectures, and nothing else."""

import json
import re

import pytest
from typer.testing import CliRunner

from ropewalk.cli import app
from ropewalk.cli.models import rows
from ropewalk.testing.zoo import ZOO


def invoke(*arguments):
    return CliRunner().invoke(app, ["models", *arguments], env={"COLUMNS": "200"})


def test_rows_are_of_every_model_of_the_zoo():
    """One a name, those of the newest transformers first."""
    found = {row["name"]: row for row in rows()}
    assert found.keys() == ZOO.keys()
    assert len(found) == len(rows())
    assert not {row["outcome"] for row in found.values()} - {"right", "refused", "not made"}
    assert sum(row["outcome"] == "right" for row in found.values()) >= 280
    versions = {tuple(row["transformers"]) for row in found.values()}
    assert max(versions, key=len)[0] > max(versions, key=len)[1]


def test_every_refusal_is_a_sentence_that_says_what_to_do():
    refused = {row["name"]: row["message"] for row in rows() if row["outcome"] == "refused"}
    advice = ("use it as it is", "give it longer texts as it is", "cut longer texts into parts", "reads text alone")
    assert [name for name, message in refused.items() if not any(what in message for what in advice)] == []
    assert [name for name, message in refused.items() if ". " in message or message.endswith(".")] == []


def test_a_table():
    result = invoke("llama", "mpt", "deepseek_v32")
    assert result.exit_code == 0
    lines = [line.split() for line in result.stdout.splitlines()]
    assert [line[:2] for line in lines if line and line[0] in ("llama", "mpt", "deepseek_v32")] == [
        ["deepseek_v32", "refused"],
        ["llama", "right"],
        ["mpt", "right"],
    ]
    assert "sparse attention" in result.stdout
    assert re.search(r"\d+ right, 1 refused\. Tiny models with random weights", result.stdout)


def test_json_and_patterns():
    found = json.loads(invoke("qwen2_vl*", "--json").stdout)
    assert {row["name"] for row in found} == {"qwen2_vl", "qwen2_vl, an image", "qwen2_vl, a video"}
    assert all(row["outcome"] == "right" and row["checks"]["computed by rows"] < 3e-4 for row in found)


@pytest.mark.parametrize("columns", ["20", "80"])
def test_narrow_terminals(columns):
    assert CliRunner().invoke(app, ["models", "llama"], env={"COLUMNS": columns}).exit_code == 0


def test_no_such_architecture():
    result = invoke("lama")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "no architecture is called lama: `ropewalk models` shows all" in result.stderr
