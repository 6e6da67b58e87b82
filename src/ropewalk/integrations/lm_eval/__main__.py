# SPDX-License-Identifier: Apache-2.0
"""lm-evaluation-harness's own command, which then knows the model `ropewalk` and makes RULER's tasks from local files;
every argument is passed on."""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from lm_eval.__main__ import cli_evaluate

from ropewalk.integrations.lm_eval import ruler
from ropewalk.integrations.transformers.refusals import UnsupportedModelError
from ropewalk.integrations.transformers.sources import ModelError
from ropewalk.maps import LengthError


def main() -> None:
    with TemporaryDirectory() as folder:
        # The command takes one such path alone: where there is one, RULER's tasks are lm-eval's own.
        if any("niah_" in one or "ruler" in one for one in sys.argv) and "--include_path" not in sys.argv:
            ruler.write_tasks(Path(folder))
            sys.argv += ["--include_path", folder]
        try:
            cli_evaluate()
        except (ModelError, UnsupportedModelError, LengthError, ruler.RulerError) as error:
            sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
