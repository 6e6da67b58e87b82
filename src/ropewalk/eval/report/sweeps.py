"""Sweeps: methods of a run that differ only in the parameters of one map, or of another change to the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ropewalk.eval.methods import Change, parse
from ropewalk.eval.report.runs import Series
from ropewalk.maps import PositionMap


@dataclass(frozen=True)
class Setting:
    """One method of a sweep: its parameters, and its rows."""

    change: Change
    series: Series

    def value(self, parameter: str) -> Any:
        return getattr(self.change, parameter)

    @property
    def knows_rules(self) -> bool:
        """Whether it can be said which lengths eq. 4 and 5 allow."""
        return isinstance(self.change, PositionMap) and self._window is not None

    def is_recommended(self, length: int) -> bool:
        """Whether a text so long keeps the rule of eq. 5."""
        return isinstance(self.change, PositionMap) and bool(
            self._window and self.change.meets_rule(length, self._window)
        )

    def is_beyond(self, length: int) -> bool:
        """Whether a text so long leaves the trained window (eq. 4)."""
        return isinstance(self.change, PositionMap) and bool(
            self._window and self.change.max_length(self._window) < length
        )

    @property
    def _window(self) -> int | None:
        return self.series.run.config.trained_window


@dataclass(frozen=True)
class Sweep:
    """The settings of one kind of change in one run.

    Attributes:
        varying: parameters that have more than one value, as the change has them.
        numeric: those of them that are numbers; one at least.
    """

    kind: str
    settings: tuple[Setting, ...]
    varying: tuple[str, ...]
    numeric: tuple[str, ...]

    def values(self, parameter: str) -> list[Any]:
        return sorted({one.value(parameter) for one in self.settings})

    def apart_from(self, *parameters: str) -> dict[str, list[Setting]]:
        """The settings that differ in nothing but these parameters, by the others that vary, in words."""
        rest = [name for name in self.varying if name not in parameters]
        found: dict[str, list[Setting]] = {}
        for one in self.settings:
            found.setdefault(", ".join(f"{name}={one.value(name)!r}" for name in rest), []).append(one)
        return found


def sweeps_of(series: Sequence[Series]) -> list[Sweep]:
    """Those of each run, in the order in which they were asked for."""
    together: dict[tuple[str, str], list[Setting]] = {}
    for one in series:
        change = _change_of(one.method)
        if change is not None:
            together.setdefault((one.run.folder, change.name), []).append(Setting(change, one))
    return [sweep for (_, kind), its in together.items() if (sweep := _sweep(kind, its)) is not None]


def _sweep(kind: str, settings: Sequence[Setting]) -> Sweep | None:
    names = [field.name for field in dataclasses.fields(settings[0].change)]
    varying = [name for name in names if len({one.value(name) for one in settings}) > 1]
    numeric = [name for name in varying if all(isinstance(one.value(name), int | float) for one in settings)]
    return Sweep(kind, tuple(settings), tuple(varying), tuple(numeric)) if numeric else None


def _change_of(method: str) -> Change | None:
    """None for the unmodified model, and for what this version does not know."""
    try:
        return parse(method, 1, 1).change
    except ValueError:
        return None
