# SPDX-License-Identifier: Apache-2.0
"""lm-evaluation-harness's own command, which then knows the model `ropewalk`; every argument is passed on."""

from __future__ import annotations

from lm_eval.__main__ import cli_evaluate

if __name__ == "__main__":
    cli_evaluate()
