"""The options that choose a position map, shared by every command that takes one.

They are read off the maps' own fields: a new map brings its options along.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, fields, replace
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from ropewalk.cli.errors import UserError, did_you_mean
from ropewalk.maps import MAPS, PositionMap
from ropewalk.maps.positions import UNBOUNDED

_PANEL = "Map"
_START_HELP = "Queries before this position keep true distances. \\[default: 0]"


@dataclass(frozen=True)
class MapOptions:
    """The map that was asked for: its name, and the parameters that were given."""

    name: str
    parameters: dict[str, Any]

    def choose(self, length: int | None = None, trained_window: int | None = None) -> PositionMap:
        """The map; without parameters, the one that its kind recommends for `length` on `trained_window` (tokens).

        Raises:
            UserError: no such map, a parameter that it lacks, needs or cannot take, or no map for that length.
        """
        kind = _kind(self.name)
        own = {field.name: field for field in fields(kind)}
        for name in self.parameters:
            if name not in own:
                options = ", ".join(map(_option, own))
                raise UserError(f"--map {kind.name} has no {_option(name)}; its options are {options}")
        for name, value in self.parameters.items():
            if isinstance(value, int):
                check_tokens(_option(name), value, at_least=0)
        shape = {name for name in own if name != "start"}
        if shape and not shape & self.parameters.keys() and length is not None and trained_window is not None:
            try:
                return replace(kind.for_length(length, trained_window), **self.parameters)
            except ValueError as error:
                raise UserError(str(error)) from error
        missing = [name for name, field in own.items() if field.default is MISSING and name not in self.parameters]
        if missing:
            raise UserError(f"--map {kind.name} needs {', '.join(map(_option, missing))}")
        try:
            return kind(**self.parameters)
        except ValueError as error:
            raise UserError(str(error)) from error


def with_map_options(default: str = "selfextend") -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command `--map` and the parameters of every map; it receives them as `map_options: MapOptions`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = [parameter for parameter in signature.parameters.values() if parameter.name != "map_options"]
        options = _parameters(default)

        @functools.wraps(command)
        def wrapper(**values: Any) -> None:
            name = values.pop("map_name")
            given = {option.name: values.pop(option.name) for option in options[1:]}
            given = {parameter: value for parameter, value in given.items() if value is not None}
            command(map_options=MapOptions(name, given), **values)

        # typer reads the options off the signature and the annotations.
        everything = [*own, *options]
        wrapper.__signature__ = inspect.Signature(everything)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in everything}
        return wrapper

    return decorate


def check_tokens(option: str, value: int, at_least: int = 1) -> None:
    """Refuses a number of tokens that no text has.

    Raises:
        UserError: `value` is below `at_least`, or past every length that positions are computed for.
    """
    if not at_least <= value <= UNBOUNDED:
        raise UserError(f"{option} must be from {at_least} to {UNBOUNDED}, got {value}")


def _kind(name: str) -> type[PositionMap]:
    if name in MAPS:
        return MAPS[name]
    suggestion = did_you_mean(name, MAPS)
    raise UserError(f"no map is called {name!r}.{suggestion} The maps are {', '.join(MAPS)}")


def _parameters(default: str) -> list[inspect.Parameter]:
    """`--map`, then one option for every field of any map."""
    map_type = Annotated[
        str, typer.Option("--map", help=f"Position map: {', '.join(MAPS)}.", metavar="NAME", rich_help_panel=_PANEL)
    ]
    parameters = [inspect.Parameter("map_name", inspect.Parameter.KEYWORD_ONLY, default=default, annotation=map_type)]
    seen: dict[str, list[type[PositionMap]]] = {}
    for kind in MAPS.values():
        for field in fields(kind):
            seen.setdefault(field.name, []).append(kind)
    seen["start"] = seen.pop("start")  # every map has it: last
    for name, kinds in seen.items():
        option_type, metavar = _type(get_type_hints(kinds[0])[name])
        option = typer.Option(_option(name), help=_help(name, kinds), metavar=metavar, rich_help_panel=_PANEL)
        annotation = Annotated[option_type | None, option]  # type: ignore[valid-type]
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))
    return parameters


def _type(hint: Any) -> tuple[type, str]:
    """The type that the parser converts to, and how the option's value is written in the help."""
    if get_origin(hint) is Literal:  # the map itself checks the choice
        return str, "|".join(map(str, get_args(hint)))
    return hint, {int: "INTEGER", float: "NUMBER"}.get(hint, "TEXT")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _help(name: str, kinds: list[type[PositionMap]]) -> str:
    """`selfextend, rerope: W, the neighbor window, in tokens.`, from the maps' docstrings."""
    if name == "start":
        return _START_HELP
    described = _described(kinds[0], name)
    own: Field[Any] = next(field for field in fields(kinds[0]) if field.name == name)
    default = f" \\[default: {own.default}]" if own.default is not MISSING and len(kinds) == 1 else ""
    return f"{', '.join(kind.name for kind in kinds)}: {described}{default}"


def _described(kind: type[PositionMap], name: str) -> str:
    """What the docstring's `Args:` say of a parameter, up to the end of its first sentence."""
    found = re.search(rf"^ +{name}: (.+?)(?:\. |\n +\w+: |\n *\n|\Z)", inspect.getdoc(kind) or "", re.M | re.S)
    return " ".join(found[1].split()).rstrip(".") + "." if found else ""
