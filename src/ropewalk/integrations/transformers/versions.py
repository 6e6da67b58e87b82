# SPDX-License-Identifier: Apache-2.0
"""Versions of what a result depends on."""

from __future__ import annotations

import platform


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    import torch
    import transformers

    import ropewalk

    return {
        "ropewalk": ropewalk.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
