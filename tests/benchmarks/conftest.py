# SPDX-License-Identifier: Apache-2.0
import sys
from pathlib import Path

import pytest
import torch

# The commands are scripts, which find each other beside themselves.
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield
