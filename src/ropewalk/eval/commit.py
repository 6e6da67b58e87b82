# SPDX-License-Identifier: Apache-2.0
"""The commit that a figure was computed at."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

# Names the commit where the checkout does not know it, such as a copy of it on another machine.
COMMIT_VARIABLE = "ROPEWALK_COMMIT"


def commit_of(file: Path, *paths: str) -> str:
    """Of the checkout that a file belongs to, "+" where any of the paths, seen from its folder, was changed since.

    Returns:
        What ROPEWALK_COMMIT says, if it is set; empty where there is no checkout, or it does not know the file: an
        environment's folder may lie in somebody else's.
    """
    if named := os.environ.get(COMMIT_VARIABLE):
        return named
    here = file.resolve().parent

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=False)
        except OSError:
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    if not git("ls-files", "--error-unmatch", file.name):
        return ""
    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--", *paths) else "")
