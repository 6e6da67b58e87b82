# SPDX-License-Identifier: Apache-2.0
"""The demo on the real model shows what it says: far facts are lost without a map and found with one."""

import json

import pytest
from typer.testing import CliRunner

from ropewalk.cli import app

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

WINDOW = 8192


def test_demo():
    result = CliRunner().invoke(app, ["demo", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert all(fact["text_tokens"] > WINDOW for fact in report["facts"])
    far = [fact for fact in report["facts"] if fact["tokens_back"] > WINDOW]
    assert len(far) == 3
    assert not any(fact["unmodified"]["right"] for fact in far)
    assert sum(fact["extended"]["right"] for fact in far) >= 2
    assert report["facts"][0]["extended"]["right"]
    assert report["right"]["extended"] > report["right"]["unmodified"] + 2
