# SPDX-License-Identifier: Apache-2.0
"""Files that may be anybody's: read with errors that name them, and their words made safe to show."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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


def shown(path: Path | str) -> str:
    """A file's name as people see it: as it is, unless it would steer a terminal."""
    return str(path) if str(path).isprintable() else printable(str(path))


def read_bytes(path: Path, pipe: bool = False) -> bytes:
    """What a regular file holds, or with `pipe` what comes out of a pipe, as a shell makes of `<(command)`.

    Raises:
        OSError: it cannot be read, or is anything else, such as a device, which may never end.
    """
    if path.exists() and not (path.is_file() or path.is_dir() or (pipe and path.is_fifo())):
        raise OSError(errno.EINVAL, "is no regular file", str(path))
    return path.read_bytes()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives the path of a new file. Once it is written it takes the place of `path`: as a whole, or not at all.

    Of a symbolic link the file that it leads to is replaced. A file that was there leaves its permissions.

    Raises:
        OSError: something else than a file is there, or it cannot be written; it names `path`. What was there still is.
    """
    place = Path(os.path.realpath(path)) if path.is_symlink() else path
    # Beside it, so that the last step is a renaming within one file system.
    unfinished = place.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        if place.exists() and not place.is_file():
            raise OSError(errno.EINVAL, "is no regular file", str(path))
        yield unfinished
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())
        if place.exists():
            shutil.copymode(place, unfinished)
        unfinished.replace(place)
    except OSError as error:
        if error.filename in (None, str(unfinished), str(place)):
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)


@contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Gives errors of the system the name of the file that is written, which those of a full disk lack."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
