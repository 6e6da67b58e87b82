# SPDX-License-Identifier: Apache-2.0
"""Portable kernels compile for every kind of GPU that they are meant for, and fit its shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from compile_for import SHARED_MEMORY

KERNELS = {"_partials_kernel", "_merge_kernel", "_rerotate", "_banded", "_views_kernel", "_narrow_kernel"}


@pytest.mark.parametrize(
    ("capability", "head_dim", "dtype"),
    [
        # 89 and 100 have the shared memory of 86 and 90.
        *(
            pytest.param(capability, 128, "bfloat16", marks=[pytest.mark.slow] if capability in (89, 100) else [])
            for capability in SHARED_MEMORY
        ),
        # The least shared memory, and what takes most of it.
        (86, 64, "bfloat16"),
        (86, 256, "bfloat16"),
        (86, 128, "float32"),
    ],
)
def test_portable_kernels_compile_and_fit(capability, head_dim, dtype):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).parent / "compile_for.py"
    command = [sys.executable, str(script), str(capability), str(head_dim), dtype]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert {row["kernel"] for row in rows} == KERNELS
    for row in rows:
        assert row["takes"] <= row["has"], row
