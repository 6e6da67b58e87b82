# SPDX-License-Identifier: Apache-2.0
"""Folders of results put together: a series of rows for each method."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

from pydantic import BaseModel

from ropewalk.eval.methods import UNMODIFIED, Change, Method, parse
from ropewalk.eval.results import Row, Run, known_to_differ
from ropewalk.eval.tasks import about
from ropewalk.files import printable

T = TypeVar("T")


@dataclass(frozen=True)
class Series:
    """The rows of one method of one run, and what to call them."""

    label: str
    method: str
    run: Run

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """Those that failed too."""
        return tuple(row for row in self.run.rows if row.method == self.method)

    @cached_property
    def known(self) -> Method | None:
        """The method; None for what this version does not know."""
        try:
            return parse(self.method, 1, 2)  # a window that has a logarithm
        except ValueError:
            return None

    @property
    def change(self) -> Change | None:
        """What the method does to the model; None for nothing, and for what this version does not know."""
        return None if self.known is None else self.known.change

    @property
    def apart(self) -> str:
        """What tells it from the same method of another run; empty where there is none."""
        return self.label.removeprefix(self.method)

    @property
    def done(self) -> list[Row]:
        return [row for row in self.rows if row.error is None]

    @property
    def failed(self) -> list[Row]:
        return [row for row in self.rows if row.error is not None]

    def done_in(self, cell: Mapping[str, int | float | str]) -> list[Row]:
        """Those of a cell, by the names and values that it has; of one without any, all."""
        return [row for row in self.done if cell.items() <= row.cell.items()]


def shown(value: T) -> T:
    """A run, or a part of it: nothing of anybody's files gets into a page but what can be seen there."""
    match value:
        case str():
            return printable(value)  # type: ignore[return-value]
        case dict():
            return {shown(key): shown(its) for key, its in value.items()}  # type: ignore[return-value]
        case list() | tuple():
            return type(value)(map(shown, value))
        case BaseModel():
            return value.model_copy(update={name: shown(its) for name, its in value})
        case Run():
            return replace(value, **shown(vars(value)))
    return value


def together(runs: Sequence[Run]) -> list[Series]:
    """The methods of runs of one task, the unmodified model first; what is there twice stays apart."""
    times = Counter(method for run in runs for method in run.methods)
    several_models = len({(run.config.model, run.config.model_hash) for run in runs}) > 1
    series = []
    for run, apart in zip(runs, _told_apart(runs), strict=True):
        for method in run.methods:
            model = f" on {run.config.model}" if several_models else ""
            series.append(Series(method + model + (apart if times[method] > 1 else ""), method, run))
    order = [UNMODIFIED, *times]
    return sorted(series, key=lambda one: order.index(one.method))


def _told_apart(runs: Sequence[Run]) -> list[str]:
    """What each run alone is: the one setting that is another in each, such as a length; or else its folder."""
    given = [run.config.complete.settings for run in runs]
    keys = dict.fromkeys(key for its in given for key in its)
    settings = {key: [plain(its.get(key)) for its in given] for key in keys}
    differ = {key: values for key, values in settings.items() if len({*values}) > 1}
    for key, values in differ.items():
        if len(differ) == 1 and len({*values}) == len(runs):
            return [f" at {key.replace('_', ' ')} {value}" for value in values]
    return [f" in {run.folder}" for run in runs]


def baseline(one: Series, series: Sequence[Series]) -> Series | None:
    """The unmodified model to compare with: of the same run, else the only one that was asked the same."""
    if one.method == UNMODIFIED:
        return None
    others = [other for other in series if other.method == UNMODIFIED and not differences(other.run, one.run)]
    same_run = [other for other in others if other.run is one.run]
    candidates = same_run or others
    return candidates[0] if len(candidates) == 1 else None


def differences(one: Run, other: Run) -> list[str]:
    """In what is asked, but for methods; a setting by its own name."""
    old, new = one.config.complete, other.config.complete
    compared = ("model", "model_hash", "config_hash", "tokenizer_hash", "version", "seed", "trained_window")
    names = [name for name in compared if known_to_differ(old, new, name)]
    keys = dict.fromkeys([*old.settings, *new.settings])
    return [name.replace("_", " ") for name in names] + [
        key for key in keys if key not in names and old.settings.get(key) != new.settings.get(key)
    ]


def counts_of(run: Run) -> dict[str, tuple[int, int]]:
    """Of each method, those without rows too: its rows, and how many of them failed."""
    rows = Counter(row.method for row in run.rows)
    failed = Counter(row.method for row in run.rows if row.error is not None)
    return {method: (rows[method], failed[method]) for method in dict.fromkeys([*run.config.methods, *run.methods])}


def asked_for(run: Run) -> int:
    """Examples of each method, in all: so many as were recorded, else as the settings ask for or, where that is not
    known, as any method has."""
    there = len({row.example for row in run.rows})
    if run.config.examples is not None:
        return max(run.config.examples, there)
    named = about(run.config.task).examples
    # Not all are there in the settings of other versions.
    given = map(run.config.settings.get, named)
    counts = [len(one) if isinstance(one, list) else one if isinstance(one, int) else 0 for one in given]
    wanted = math.prod(counts) if named else 0
    return max(wanted, there)


def plural(count: int, what: str) -> str:
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def plain(value: object) -> str:
    """A setting in words: no quotes and brackets, and no more digits than one cares for."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value))
    return value if isinstance(value, str) else "none" if value is None else json.dumps(value)
