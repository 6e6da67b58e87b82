"""How a user's mistakes are shown: one line on stderr, exit code 2, never a traceback."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any

import typer
from typer.core import TyperGroup

from ropewalk.maps import MapEntryPointError

# What the parser raises for a wrong option, value or command; its name and place differ between typer's releases.
_ParserError: type[Exception] = typer.BadParameter.__bases__[0]

EXIT_CODE = 2


class UserError(Exception):
    """A mistake of the user's, told in one sentence: what was wrong, what was expected, what to do."""


class Commands(TyperGroup):
    """A group of commands that shows `UserError` and the parser's errors in one line.

    With `--json` among the arguments the line is `{"error": "..."}`; stdout stays empty either way.
    """

    def main(  # type: ignore[override]
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any
    ) -> Any:
        arguments = list(sys.argv[1:] if args is None else args)
        extra["standalone_mode"] = False
        try:
            status = super().main(args=arguments, prog_name=prog_name, **extra)
        except typer.Abort:
            sys.exit(1)
        except (UserError, MapEntryPointError) as error:
            message = str(error)
        except _ParserError as error:
            message = getattr(error, "format_message", error.__str__)()
        else:
            sys.exit(status if isinstance(status, int) else 0)
        show(message, as_json="--json" in arguments)
        sys.exit(EXIT_CODE)


def show(message: str, as_json: bool) -> None:
    """Writes an error to stderr, in one line."""
    message = " ".join(message.split())
    print(json.dumps({"error": message}) if as_json else f"error: {message}", file=sys.stderr)


def did_you_mean(typed: str, known: Iterable[str]) -> str:
    """` Did you mean 'selfextend'?`, or nothing where no known name resembles the typed one."""
    close = get_close_matches(typed.lower(), list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
