# SPDX-License-Identifier: Apache-2.0
"""What is said of a name that nothing has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import TypeVar

_Named = TypeVar("_Named")


def as_option(name: str) -> str:
    """A name as the command line writes it."""
    return f"--{name.replace('_', '-')}"


def did_you_mean(typed: str, known: Iterable[str]) -> str:
    """` Did you mean 'selfextend'?`, or nothing where no known name resembles the typed one."""
    others = [name for name in known if name != typed]
    close = get_close_matches(typed.lower(), others, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def unknown(what: str, typed: str, known: Iterable[str]) -> str:
    """`no map is called 'rerop'. Did you mean 'rerope'? The maps are ...`, in one sentence for each kind of thing."""
    known = list(known)
    return f"no {what} is called {typed!r}.{did_you_mean(typed, known)} The {what}s are {', '.join(known)}"


def named(what: str, name: str, known: Mapping[str, _Named]) -> _Named:
    """What has a name, among things of a kind.

    Raises:
        ValueError: nothing has it; see `unknown`.
    """
    if name not in known:
        raise ValueError(unknown(what, name, known))
    return known[name]
