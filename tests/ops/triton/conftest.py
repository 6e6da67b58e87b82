# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import importlib.util

# A finder takes this folder itself for a package `triton` where Triton is not installed.
if importlib.util.find_spec("triton.language") is None:
    collect_ignore_glob = ["test_*.py"]
