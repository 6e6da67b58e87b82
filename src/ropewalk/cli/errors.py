# SPDX-License-Identifier: Apache-2.0
"""How what goes wrong is shown: one line on stderr, exit code 2, never a traceback."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any, NoReturn, TextIO

import typer
from typer.core import TyperGroup

from ropewalk.files import naming, printable
from ropewalk.maps import MapEntryPointError
from ropewalk.names import did_you_mean as did_you_mean

# What the parser raises for a wrong option, value or command; its name and place differ between typer's releases.
_ParserError: type[Exception] = typer.BadParameter.__bases__[0]

EXIT_CODE = 2

# What is not installed with Ropewalk alone, by the extra that it comes with.
_EXTRAS = {name: "eval" for name in ("filelock", "jinja2", "pydantic", "pydantic_core", "scipy")} | {
    "lm_eval": "lm-eval",
    "matplotlib": "plot",
}


class UserError(Exception):
    """A mistake of the user's, told in one sentence: what was wrong, what was expected, what to do."""


class Commands(TyperGroup):
    """A group of commands that shows in one line what users and their systems do wrong: `UserError`, the parser's
    errors, files that cannot be read or written, and packages that are not there.

    With `--json` among the arguments the line is `{"error": "..."}`; stdout stays empty either way.
    """

    def main(  # type: ignore[override]
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any
    ) -> Any:
        arguments = list(sys.argv[1:] if args is None else args)
        extra["standalone_mode"] = False
        if sys.stderr is None:
            # Else what is meant for it would go to stdout.
            sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115
        try:
            if sys.stdout is None:
                raise UserError("standard output is closed: there is nowhere to show anything")
            _write_anything(sys.stdout)
            _write_anything(sys.stderr)
            with redirect_stdout(_Stdout(sys.stdout)) as stdout:
                status = super().main(args=arguments, prog_name=prog_name, **extra)
                stdout.flush()
        except typer.Abort:
            sys.exit(1)
        except (UserError, MapEntryPointError, OSError, ImportError, _ParserError) as error:
            _end(error, arguments)
        sys.exit(status if isinstance(status, int) else 0)


def _end(error: Exception, arguments: Sequence[str]) -> NoReturn:
    if getattr(error, "filename", None) == _Stdout.name:
        _Stdout.give_up()
    message = told(error) + _given(error, arguments)
    # Where even this cannot be shown the exit code has to do. Nothing is to be said where help was shown instead.
    with suppress(OSError):
        if message:
            show(message, as_json="--json" in arguments)
    sys.exit(EXIT_CODE)


def _given(error: Exception, arguments: Sequence[str]) -> str:
    """What an option was given that is of no such type: the parser does not say it."""
    names = getattr(getattr(error, "param", None), "opts", ())
    for at in reversed(range(len(arguments))):
        name, has_value, value = arguments[at].partition("=")
        if name in names and ", got " not in told(error):
            following = value if has_value else next(iter(arguments[at + 1 : at + 2]), None)
            return "" if following is None else f", got {following!r}"
    return ""


def _write_anything(stream: TextIO) -> None:
    """Characters that the console's encoding lacks, or that are none, are written as escapes."""
    if (reconfigure := getattr(stream, "reconfigure", None)) is not None:
        reconfigure(errors="backslashreplace")


class _Stdout:
    """Standard output, whose errors have a name.

    Where nobody reads it any more, as behind `head`, the program ends with exit code 0: enough was seen, and a short
    output is taken by the system even so.
    """

    name = "standard output"

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._watched():
            return self._stream.write(text)

    def flush(self) -> None:
        with self._watched():
            self._stream.flush()

    @contextmanager
    def _watched(self) -> Iterator[None]:
        try:
            with naming(self.name):
                yield
        except BrokenPipeError:
            self.give_up()
            sys.exit(0)

    @staticmethod
    def give_up() -> None:
        """What is still to be written cannot be: Python would try once more, at its end, and fail."""
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def told(error: Exception) -> str:
    """An error for users: of the system with the name of the file, of a missing package with what to install."""
    if isinstance(error, OSError) and error.strerror:
        name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes | os.PathLike) else None
        if name is None:
            return error.strerror
        what = f"write to {name}" if name == _Stdout.name else f"read or write {name!r}"
        return f"cannot {what}: {error.strerror}"
    if isinstance(error, ImportError):
        package = (error.name or "").partition(".")[0]
        if package in _EXTRAS:
            return f"this needs {package}, which is not installed: pip install 'ropewalk[{_EXTRAS[package]}]'"
    return getattr(error, "format_message", error.__str__)()


def show(message: str, as_json: bool) -> None:
    """Writes an error to stderr, in one line."""
    message = printable(message)
    print(json.dumps({"error": message}) if as_json else f"error: {message}", file=sys.stderr)
