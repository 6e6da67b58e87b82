# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    # Read where a kernel is decorated, those of Triton's own library too: before anything imports Triton.
    os.environ.setdefault("TRITON_INTERPRET", "1")
