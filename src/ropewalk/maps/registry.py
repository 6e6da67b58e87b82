# SPDX-License-Identifier: Apache-2.0
"""The maps by their names: those of Ropewalk, and those that other packages bring."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points

from ropewalk.maps.base import PositionMap

# A package brings maps with entry points of this group: `name = "package.module:Class"`.
GROUP = "ropewalk.maps"


class MapEntryPointError(ImportError):
    """A map that an installed package brings and that cannot be used."""


class Registry(Mapping[str, type[PositionMap]]):
    """Position maps by name: the built-in ones first, then those of installed packages.

    Entry points are read when a name is looked up that is not built in, or when all are asked for; a package is
    imported when its own map is.

    Raises:
        MapEntryPointError: a package's map cannot be imported, is no position map, or has a name that is taken.
    """

    def __init__(self, *built_in: type[PositionMap]) -> None:
        self.built_in: Mapping[str, type[PositionMap]] = {kind.name: kind for kind in built_in}
        self._loaded: dict[str, type[PositionMap]] = {}

    def __getitem__(self, name: str) -> type[PositionMap]:
        if name in self.built_in:
            return self.built_in[name]
        if name not in self._loaded:
            self._loaded[name] = _load(self._brought[name])
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter([*self.built_in, *self._brought])

    def __len__(self) -> int:
        return len(self.built_in) + len(self._brought)

    @cached_property
    def _brought(self) -> dict[str, EntryPoint]:
        brought: dict[str, EntryPoint] = {}
        for point in sorted(entry_points(group=GROUP)):
            if point.name in self.built_in:
                raise _error(point, "Ropewalk has a map of that name")
            if point.name in brought:
                raise _error(point, f"so does {_distribution(brought[point.name])}")
            brought[point.name] = point
        return brought


def _load(point: EntryPoint) -> type[PositionMap]:
    try:
        kind = point.load()
    except Exception as error:  # whatever their code does when it is imported
        raise _error(point, f"{point.value} cannot be imported ({type(error).__name__}: {error})") from error
    if not (isinstance(kind, type) and issubclass(kind, PositionMap)):
        raise _error(point, f"{point.value} is not a subclass of ropewalk.PositionMap")
    if getattr(kind, "name", None) != point.name:
        raise _error(point, f"{point.value} calls itself {getattr(kind, 'name', None)!r}")
    return kind


def _error(point: EntryPoint, reason: str) -> MapEntryPointError:
    return MapEntryPointError(
        f"{_distribution(point)} brings the position map {point.name!r}, but {reason}: update or uninstall it"
    )


def _distribution(point: EntryPoint) -> str:
    return f"the installed package {point.dist.name} {point.dist.version}" if point.dist else "an installed package"
