# SPDX-License-Identifier: Apache-2.0
"""Files that may be anybody's: read with errors that name them, and their words made safe to show."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def printable(text: str) -> str:
    """A text in one line, without what would steer a terminal or hide in a page: such characters are written out.

    Control characters, direction marks and lone surrogates come as `\\x1b`, `\\u202e`; all white space is one blank.
    """
    line = " ".join(text.split())
    if line.isprintable():
        return line
    return "".join(
        one if one.isprintable() else one.encode("unicode_escape", "surrogatepass").decode("ascii") for one in line
    )


def read_bytes(path: Path) -> bytes:
    """What a regular file holds.

    Raises:
        OSError: it cannot be read, or is a device or a pipe, which may never end.
    """
    if path.exists() and not path.is_file():
        raise OSError(None, "is no regular file", str(path))
    return path.read_bytes()


@contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Gives errors of the system the name of the file that is written, which those of a full disk lack."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
