# SPDX-License-Identifier: Apache-2.0
"""The options that choose a position map, shared by every command that takes one.

They are read off the maps' own fields: a new map brings its options along, also one that another package brings.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Container, Mapping
from dataclasses import MISSING, Field, dataclass, fields, replace
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
from rich.markup import escape

from ropewalk.cli.errors import UserError
from ropewalk.maps import MAPS, MapEntryPointError, PositionMap
from ropewalk.names import as_option, unknown
from ropewalk.presets import Preset, read_preset

_PANEL = "Map"
_READERS: dict[Any, Callable[[str], Any]] = {int: int, float: float, bool: {"true": True, "false": False}.__getitem__}
PresetOption = Annotated[
    str | None,
    typer.Option(
        "--preset",
        help="For what is not given: a built-in preset (see ropewalk presets) or a file. \\[default: the model's own]",
        metavar="NAME|FILE",
        rich_help_panel=_PANEL,
    ),
]
_START_HELP = "Queries before this position keep true distances. \\[default: 0]"


@dataclass(frozen=True)
class MapOptions:
    """The map that was asked for: its name, and the parameters that were given.

    Attributes:
        given: whether a map was asked for at all. The name is the default one where none was.
        preset: that was asked for.
    """

    name: str
    parameters: dict[str, Any]
    given: bool = True
    preset: Preset | None = None

    @property
    def kind(self) -> str | None:
        """Name of the kind of map that was asked for, by itself or by a preset."""
        if self.given:
            return self.name
        return None if self.preset is None else self.preset.position_map.name

    def choose(self, length: int | None = None, trained_window: int | None = None) -> PositionMap:
        """The map; without parameters, the one that its kind recommends for `length` on `trained_window` (tokens).

        The preset's where there is one and no map was asked for, if it reaches `length`.

        Raises:
            UserError: no such map, a parameter that it lacks, needs or cannot take, or no map for that length.
        """
        if self.preset is not None and not self.given:
            try:
                return self.preset.map_for(length, trained_window)
            except ValueError as error:
                raise UserError(str(error)) from error
        kind = _kind(self.name)
        own = {field.name: field for field in fields(kind)}
        for name in self.parameters:
            if name not in own:
                options = ", ".join(map(as_option, own))
                raise UserError(f"--map {kind.name} has no {as_option(name)}; its options are {options}")
        parameters = {name: _converted(kind, name, value) for name, value in self.parameters.items()}
        shape = {name for name in own if name != "start"}
        try:
            if shape and not shape & parameters.keys() and length is not None and trained_window is not None:
                return replace(kind.for_length(length, trained_window), **parameters)
            missing = [name for name, field in own.items() if _is_needed(field) and name not in parameters]
            if missing:
                _check_each(kind, parameters)
                beyond = [name for name in missing if _types(kind)[name] is None]
                hint = f"; no option can hold {' and '.join(beyond)}: make the map in Python" if beyond else ""
                raise UserError(f"--map {kind.name} needs {', '.join(map(as_option, missing))}{hint}")
            return kind(**parameters)
        except ValueError as error:
            raise UserError(str(error)) from error


def with_map_options(default: str = "selfextend") -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command `--preset`, `--map` and the parameters of every map; it receives them as
    `map_options: MapOptions`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = [parameter for parameter in signature.parameters.values() if parameter.name != "map_options"]
        broken: MapEntryPointError | None = None
        try:
            kinds = dict(MAPS)
        except MapEntryPointError as error:  # raised where the command runs: here the command line is only being built
            kinds, broken = dict(MAPS.built_in), error
        options = _parameters(default, kinds, taken={parameter.name for parameter in own})

        @functools.wraps(command)
        def wrapper(**values: Any) -> None:
            if broken:
                raise broken
            preset, name = (values.pop(option.name) for option in options[:2])
            given = {option.name: values.pop(option.name) for option in options[2:]}
            given = {parameter: value for parameter, value in given.items() if value is not None}
            asked = name is not None or bool(given)
            command(map_options=MapOptions(name or default, given, asked, preset_option(preset)), **values)

        # typer reads the options off the signature and the annotations.
        everything = [*own, *options]
        wrapper.__signature__ = inspect.Signature(everything)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in everything}
        return wrapper

    return decorate


def preset_option(preset: str | None) -> Preset | None:
    """What `--preset` names.

    Raises:
        UserError: there is no such preset, or none in the file.
    """
    try:
        return None if preset is None else read_preset(preset)
    except ValueError as error:
        raise UserError(f"--preset: {error}") from error


def _kind(name: str) -> type[PositionMap]:
    if name in MAPS:
        return MAPS[name]
    raise UserError(unknown("map", name, MAPS))


def _parameters(default: str, kinds: Mapping[str, type[PositionMap]], taken: Container[str]) -> list[inspect.Parameter]:
    """`--preset` and `--map`, then one option for every field of any map that an option can hold and no other option is
    called."""
    map_help = f"Position map: {', '.join(kinds)}. \\[default: the preset's, or {default}]"
    map_type = Annotated[str | None, typer.Option("--map", help=map_help, metavar="NAME", rich_help_panel=_PANEL)]
    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in (("preset_name", PresetOption), ("map_name", map_type))
    ]
    holders: dict[str, list[type[PositionMap]]] = {}
    for kind in kinds.values():
        for name, written in _types(kind).items():
            if name not in taken and written is not None:
                holders.setdefault(name, []).append(kind)
    holders["start"] = holders.pop("start")  # every map has it: last
    for name, own in holders.items():
        written = dict.fromkeys(_types(kind)[name] for kind in own)
        # Where maps differ, the text is read as the map that was asked for writes it.
        parsed = next(iter(written)) if len(written) == 1 else str
        metavar = "|".join(dict.fromkeys(map(_metavar, written)))
        declared = f"{as_option(name)}/--no-{as_option(name)[2:]}" if parsed is bool else as_option(name)
        option = typer.Option(
            declared, help=_help(name, own), metavar=None if parsed is bool else metavar, rich_help_panel=_PANEL
        )
        annotation = Annotated[(parsed if isinstance(parsed, type) else str) | None, option]  # type: ignore[valid-type]
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))
    return parameters


def _types(kind: type[PositionMap]) -> dict[str, Any]:
    """The type of each of a map's fields: a number, a bool, a str or a Literal, or None where no option can hold it."""
    hints = get_type_hints(kind)
    found = {}
    for field in fields(kind):
        choices = [hint for hint in get_args(hints[field.name]) if hint is not type(None)]
        is_optional = get_origin(hints[field.name]) in (Union, UnionType) and len(choices) == 1
        hint = choices[0] if is_optional else hints[field.name]
        found[field.name] = hint if hint in (int, float, bool, str) or get_origin(hint) is Literal else None
    return found


def _converted(kind: type[PositionMap], name: str, value: Any) -> Any:
    """What was given for a parameter of this map, as the map writes it: another's may have been of another type."""
    written = _types(kind)[name]
    if not isinstance(value, str) or written is str:
        return value
    if get_origin(written) is Literal:  # the map itself refuses what is none of them
        return next((choice for choice in get_args(written) if str(choice) == value), value)
    try:
        return _READERS[written](value)
    except (KeyError, ValueError):
        raise UserError(f"{as_option(name)} of --map {kind.name} must be {_metavar(written)}, got {value!r}") from None


def _check_each(kind: type[PositionMap], parameters: dict[str, Any]) -> None:
    """Refuses a value that no map of this kind takes: to give the parameters that are missing would not help.

    Raises:
        ValueError: one of them.
    """
    try:
        examples = kind.examples()
    except (TypeError, ValueError):  # a package's map that has none
        return
    for name, value in parameters.items():
        refused = None
        for example in examples:
            try:
                replace(example, **{name: value})
                break
            except ValueError as error:
                refused = error
        else:
            if refused is not None:
                raise refused


def _metavar(hint: Any) -> str:
    """How the value of an option is written in the help."""
    if get_origin(hint) is Literal:
        return "|".join(map(str, get_args(hint)))
    return {int: "INTEGER", float: "NUMBER", bool: "true|false"}.get(hint, "TEXT")


def _is_needed(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _help(name: str, kinds: list[type[PositionMap]]) -> str:
    """`selfextend, rerope: W, the neighbor window, in tokens. self: ...`, from the maps' docstrings."""
    if name == "start":
        return _START_HELP
    said: dict[tuple[str, str], list[str]] = {}
    for kind in kinds:
        field = next(field for field in fields(kind) if field.name == name)
        default = f" \\[default: {field.default}]" if field.default not in (MISSING, None) else ""
        said.setdefault((escape(_described(kind, name)), default), []).append(kind.name)
    return " ".join(
        f"{', '.join(names)}{f': {meaning}' if meaning else '.'}{default}" for (meaning, default), names in said.items()
    )


def _described(kind: type[PositionMap], name: str) -> str:
    """What the docstring's `Args:` say of a parameter, up to the end of its first sentence."""
    found = re.search(rf"^ +{name}: (.+?)(?:\. |\n +\w+: |\n *\n|\Z)", inspect.getdoc(kind) or "", re.M | re.S)
    return " ".join(found[1].split()).rstrip(".") + "." if found else ""
