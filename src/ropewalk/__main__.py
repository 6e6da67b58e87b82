# SPDX-License-Identifier: Apache-2.0
"""`python -m ropewalk`: the `ropewalk` command."""

from __future__ import annotations

from ropewalk.cli import main

if __name__ == "__main__":
    main()
