# SPDX-License-Identifier: Apache-2.0
"""Text files as they come: with byte order marks, in other encodings, with the line ends of any system."""

from __future__ import annotations

import codecs
import encodings.aliases
import sys
from pathlib import Path

from ropewalk.cli.errors import UserError, did_you_mean
from ropewalk.files import read_bytes

# Longer ones first: that of UTF-32 begins like that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def check_encoding(encoding: str | None) -> None:
    """Refuses what is no encoding of text.

    Raises:
        UserError: with a suggestion where one resembles it.
    """
    if encoding is None:
        return
    if not _is_of_text(encoding):
        known = filter(_is_of_text, [*encodings.aliases.aliases.values(), *encodings.aliases.aliases])
        raise UserError(
            f"--encoding must name an encoding of text, such as utf-16-le, cp1252 or latin-1, got {encoding!r}."
            f"{did_you_mean(encoding.replace('-', '_'), known)}"
        )


def _is_of_text(encoding: str) -> bool:
    try:
        b"a".decode(encoding)
    except UnicodeDecodeError:  # a letter is half a character of some
        return True
    except (LookupError, ValueError, ImportError):  # some are of other systems
        return False
    return True


def read_files(names: list[str], encoding: str | None = None) -> list[str]:
    """The texts of files; `-` is standard input. Line ends become "\\n", as where Python opens a file.

    Args:
        names: of files, in their order.
        encoding: of all of them; by default UTF-8, or what a byte order mark says.

    Raises:
        UserError: one is missing, empty, or no text.
    """
    if names.count("-") > 1:
        raise UserError("--file - reads standard input, which can be read only once")
    return [_read(name, encoding) for name in names]


def check_question(option: str, text: str) -> None:
    """Refuses a question that came as bytes which are no text.

    Raises:
        UserError: it did.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{option} is not text in the encoding it came in (at character {error.start})") from None


def _read(name: str, encoding: str | None) -> str:
    shown = "standard input" if name == "-" else f"the file {name!r}"
    if not name.strip():
        raise UserError(f"--file must name a text file, or be - for standard input, got {name!r}")
    data = _bytes(name, shown)
    if encoding is None:
        mark, encoding = next(((mark, known) for mark, known in _MARKS if data.startswith(mark)), (b"", "utf-8"))
        data = data[len(mark) :]
        if encoding == "utf-8" and b"\0" in data:
            raise UserError(
                f"{shown} is binary (it holds NUL bytes): --file takes a text file in UTF-8, or in the encoding that "
                "--encoding names (utf-16-le, where it is UTF-16 without a byte order mark)"
            )
    try:
        text = data.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{shown} is not {encoding.upper()} text (byte {error.start} does not fit): name its encoding, such as "
            "--encoding cp1252 or --encoding latin-1, or convert it first"
        ) from None
    if "\0" in text:
        raise UserError(f"{shown} is binary (it holds NUL characters when read as {encoding})")
    if not text.strip():
        raise UserError(f"{shown} is empty")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _bytes(name: str, shown: str) -> bytes:
    try:
        if name != "-":
            return read_bytes(Path(name).expanduser(), pipe=True)
        if sys.stdin is None:
            raise UserError("standard input is closed, and --file - reads it")
        return sys.stdin.buffer.read()
    except FileNotFoundError:
        raise UserError(f"{shown} does not exist") from None
    except IsADirectoryError:
        raise UserError(f"{shown.removeprefix('the file ')} is a folder: --file takes a text file") from None
    except (OSError, RuntimeError) as error:  # a RuntimeError where the user of ~user is unknown
        raise UserError(f"cannot read {shown}: {getattr(error, 'strerror', None) or error}") from error
