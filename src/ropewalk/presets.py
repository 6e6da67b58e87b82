# SPDX-License-Identifier: Apache-2.0
"""Presets: how a model is extended where nobody says it. Plain data, built in or in a file, also beside a model's."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, Self, get_args

from ropewalk.files import printable, read_bytes, replacing
from ropewalk.maps import MAPS, PositionMap, from_dict
from ropewalk.maps.numbers import whole
from ropewalk.maps.query_scaling import QueryScaling, QueryScalingKind
from ropewalk.names import unknown

SlidingWindowChoice = Literal["keep", "disable"]

# What a preset's file is called beside a model's files.
FILE_NAME = "ropewalk.json"

_BUILT_IN = "built in"
# What the fields are called in a file, where not as here.
_IN_FILES = {"position_map": "map"}


@dataclass(frozen=True)
class Preset:
    """How a model is extended: a map, and what goes with it.

    Args:
        position_map: the map, its `start` included.
        trained_window: tokens that the model was trained on.
        query_scaling: as in `extend`; None for none.
        sliding_window: as in `extend`.
        source: where the settings come from, such as a paper and its table.
        published: whether the source gives these settings; False where they are somebody's own, by eq. 5 or measured.
        name: to show; of a built-in preset also to ask for.
        where: what it was read from, a path or "built in"; not part of its file, nor of what makes presets equal.

    Raises:
        ValueError: an argument does not fit.
    """

    position_map: PositionMap
    trained_window: int
    query_scaling: QueryScalingKind | None = None
    sliding_window: SlidingWindowChoice = "keep"
    source: str = ""
    published: bool = False
    name: str = ""
    where: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.position_map, PositionMap):
            raise ValueError(
                f"a preset's map must be a position map such as SelfExtend(8, 1024), got {self.position_map!r}"
            )
        object.__setattr__(self, "trained_window", whole("trained_window", self.trained_window, at_least=1))
        if self.query_scaling is not None:
            QueryScaling(self.query_scaling, self.trained_window)
        check_sliding_window(self.sliding_window)
        if not isinstance(self.published, bool):
            raise ValueError(f"published must be true or false, got {self.published!r}")
        for name in ("source", "name", "where"):
            text = getattr(self, name)
            if not isinstance(text, str):
                raise ValueError(f"{name} must be text, got {text!r}")
            # A file may be anybody's, and these are shown.
            object.__setattr__(self, name, printable(text))

    def map_for(self, target_length: int | None = None, trained_window: int | None = None) -> PositionMap:
        """The preset's map if it reaches `target_length` (eq. 4), else one of its kind chosen for that length (eq. 5).

        Args:
            target_length: tokens; None for whatever the map reaches.
            trained_window: in the place of the preset's.

        Raises:
            LengthError: no map of its kind reaches that far.
            ValueError: a length that no text has, or a window that no model has.
        """
        window = self.trained_window if trained_window is None else trained_window
        own = self.position_map
        if target_length is None or whole("target_length", target_length, at_least=1) <= own.max_length(window):
            return own
        return replace(type(own).for_length(target_length, window), start=own.start)

    def to_dict(self) -> dict[str, Any]:
        """The preset as plain data, as its file holds it."""
        data = {_IN_FILES.get(name, name): getattr(self, name) for name in _FIELDS}
        return {**data, "map": self.position_map.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "") -> Self:
        """The preset that `to_dict` described; `trained_window` and `map` must be there.

        Raises:
            ValueError: a value is missing, unknown or does not fit.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"a preset is an object with a map and a trained_window, got {data!r}")
        values = dict(data)
        known = [_IN_FILES.get(name, name) for name in _FIELDS]
        if strange := [key for key in values if key not in known]:
            raise ValueError(unknown("preset value", str(strange[0]), known))
        if missing := [key for key in ("map", "trained_window") if key not in values]:
            raise ValueError(f"a preset needs {' and '.join(missing)}, got {', '.join(values) or 'nothing'}")
        return cls(position_map=from_dict(values.pop("map")), where=where, **values)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """The preset in a JSON file.

        Raises:
            OSError: the file cannot be read.
            ValueError: it holds no preset; says what is wrong.
        """
        try:
            data = json.loads(read_bytes(Path(path)).decode("utf-8-sig"), object_pairs_hook=_once)
            return cls.from_dict(data, where=os.fspath(path))
        except (ValueError, RecursionError) as error:
            reason = "is nested too deep" if isinstance(error, RecursionError) else str(error)
            raise ValueError(f"no preset in {os.fspath(path)!r}: {printable(reason)}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the preset to a JSON file, in the place of what was there. Beside a model's files, as
        `ropewalk.json`, it is found by itself.

        Raises:
            OSError: the file cannot be written.
            ValueError: its map is of a kind that no name stands for, so that nobody could read it.
        """
        if MAPS.get(self.position_map.name) is not type(self.position_map):
            raise ValueError(
                f"{self.position_map} is of no kind in ropewalk.MAPS, by whose names files are read: offer it through "
                "the entry point group 'ropewalk.maps'"
            )
        with replacing(Path(path)) as unfinished:
            unfinished.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    def __str__(self) -> str:
        """What it is called and where it is from, in a line: `mpt-7b-chat, built in: SelfExtend ..., table 8`."""
        called = ", ".join(dict.fromkeys(word for word in (self.name, self.where) if word)) or "without a name"
        return called + (f": {self.source}" if self.source else "")


# Of a file, in its order.
_FIELDS = [each.name for each in fields(Preset) if each.name != "where"]


@dataclass(frozen=True)
class BuiltIn:
    """A built-in preset, and the models that it is for.

    Attributes:
        models: what they are called, in small letters.
        sizes: values that their configurations have, by name (dots lead inside); a list is any of them.
        layers: that they have. A model that was cut to fewer was trained on the same positions.
    """

    preset: Preset
    models: tuple[str, ...]
    sizes: Mapping[str, Any]
    layers: int


@cache
def built_in() -> Mapping[str, BuiltIn]:
    """The built-in presets by their names."""
    found = {}
    for entry in json.loads(files("ropewalk.data").joinpath("presets.json").read_text(encoding="utf-8")):
        preset = Preset.from_dict({**entry["preset"], "name": entry["name"]}, where=_BUILT_IN)
        found[preset.name] = BuiltIn(preset, tuple(entry["models"]), entry["sizes"], entry["layers"])
    return found


def read_preset(preset: Preset | str | os.PathLike[str]) -> Preset:
    """A preset, the built-in one of that name (or of a model of that name), or the one in a file.

    Raises:
        OSError: the file cannot be read.
        ValueError: there is no such preset, or none in the file.
        TypeError: it is none of these.
    """
    if isinstance(preset, Preset):
        return preset
    if not isinstance(preset, str | os.PathLike):
        raise TypeError(f"preset must be a Preset, the name of one or a path, got {preset!r}")
    if isinstance(preset, str):
        for entry in built_in().values():
            if preset.lower() in (entry.preset.name, *entry.models):
                return entry.preset
    path = Path(preset)
    if not os.fspath(preset):
        raise ValueError("preset must be the name of one or a path, got ''")
    if isinstance(preset, str) and path.name == preset and not preset.endswith(".json") and not path.exists():
        raise ValueError(f"{unknown('preset', preset, built_in())}; or name a file, such as ./{FILE_NAME}")
    return Preset.load(path)


def check_sliding_window(value: object) -> None:
    """Refuses what is no choice.

    Raises:
        ValueError: with the value.
    """
    if value not in get_args(SlidingWindowChoice):
        raise ValueError(f"sliding_window must be 'keep' or 'disable', got {value!r}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are there once: of two, nobody could tell which was meant."""
    if len(found := dict(pairs)) < len(pairs):
        twice = next(key for index, (key, _) in enumerate(pairs) if key in dict(pairs[:index]))
        raise ValueError(f"{twice!r} is there twice")
    return found
