from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Read where a kernel is decorated, so before the first import of one.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
