# SPDX-License-Identifier: Apache-2.0
"""Peak memory grows linearly with the length, measured on a process of its own."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

_SCRIPT = """
import resource, torch
from ropewalk.maps import SELF, SelfExtend
from ropewalk.ops import Rotary, attention
keys, queries, position_map, impl = {keys}, {queries}, {position_map}, {impl!r}
rotary = Rotary(1e4 ** -(torch.arange(0, 16, 2) / 16))
query, key, value = (torch.randn(1, 2, n, 16) for n in (queries, keys, keys))
attention(query[:, :, :64], key[:, :, :64], value[:, :, :64], position_map, rotary, impl=impl)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with torch.inference_mode():
    attention(query, key, value, position_map, rotary, impl=impl)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def _extra_mebibytes(keys: int, queries: int, position_map: str, impl: str) -> float:
    script = _SCRIPT.format(keys=keys, queries=queries, position_map=position_map, impl=impl)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    unit = 1024 if sys.platform == "darwin" else 1  # ru_maxrss is in bytes there
    return int(run.stdout) / unit / 1024


@pytest.mark.skipif(not hasattr(resource, "getrusage"), reason="no getrusage on this platform")
@pytest.mark.parametrize(
    ("queries", "position_map", "impl"),
    [(32768, "SelfExtend(8, 1024)", "flash"), (2048, 'SELF(17, 0.02, 1024, "distance")', "flash")],
)
def test_32k_tokens(queries, position_map, impl):
    """One float32 query x key matrix would take 4096 MiB a head at 32k queries, 256 MiB at 2k."""
    inputs = 3 * 2 * 32768 * 16 * 4 / 2**20  # query, key and value: 12 MiB
    assert _extra_mebibytes(32768, queries, position_map, impl) < 12 * inputs


def test_blocks_hold_one_block_of_scores():
    assert _extra_mebibytes(32768, 512, "SelfExtend(8, 1024)", "blocks") < 600
