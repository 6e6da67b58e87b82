# SPDX-License-Identifier: Apache-2.0
"""The papers' experiments as data, experiments.toml beside this file: what to run, as what settings, on which model."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from pydantic import BaseModel, ConfigDict

from ropewalk.eval import papers
from ropewalk.eval.methods import UNMODIFIED, parse, parse_all
from ropewalk.eval.subjects import Dummy
from ropewalk.eval.tasks.base import Generation, PreparedTask, Task
from ropewalk.maps import PositionMap
from ropewalk.names import named

# FLOP/s of reading, seconds of a written token, bytes of a bfloat16 number.
_READING, _STEP, _BYTES = 500e12, 0.025, 2
_GIB = 1 << 30


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Line(_Data):
    """A model run in one way: a row of the paper's table, or a curve of its figure.

    Attributes:
        model: on the hub.
        method: as `ropewalk eval --method` takes it; a sweep is several.
        settings: of the task, beside those of the experiment.
        trained_window: of the model, where its configuration says another.
        row: its label in the paper's rows; empty where the paper prints none.
    """

    model: str
    method: str
    settings: dict[str, Any] = {}
    trained_window: int | None = None
    row: str = ""


class Experiment(_Data):
    """A table or a figure.

    Attributes:
        title: what it shows.
        task: of `ropewalk eval`; empty where nothing is measured, and `instead` says what shows the same.
        settings: of the task, in all lines.
        table: the paper's rows, by their name in `ropewalk.eval.papers`; empty where it prints none.
        by: the part of the cells that the columns of those rows are.
        score: the one that the paper gives; by default the task's first.
        scores: of parts for which it gives another one.
        lines: what the paper ran.
        otherwise: methods for a model that the paper did not run.
        prompts, tokens: for the forecast, the texts that each line reads, one for each choice of a question that has
            some, and how long they are on average.
        answers, new_tokens: likewise, how many of them are answered in words, by default all, and how long the answers
            are; a setting `new_tokens` goes before it.
        unknown: what the paper does not say, so that it was chosen here.
        instead: the command that shows the same, where nothing is measured.
        matrix: likewise, a map and tokens of a text, whose relative positions are shown.
        prompt: likewise, whether it is a prompt of the task.
    """

    title: str
    task: str = ""
    settings: dict[str, Any] = {}
    table: str = ""
    by: str = ""
    score: str = ""
    scores: dict[str, str] = {}
    lines: tuple[Line, ...] = ()
    otherwise: tuple[str, ...] = (UNMODIFIED, "selfextend")
    prompts: int = 0
    tokens: int = 0
    answers: int | None = None
    new_tokens: int = 0
    unknown: tuple[str, ...] = ()
    instead: str = ""
    matrix: tuple[str, int] | None = None
    prompt: bool = False

    @property
    def is_measured(self) -> bool:
        return not (self.instead or self.prompt)


class Size(_Data):
    """Of a model, for the forecast.

    Attributes:
        billions: of parameters.
        cache: numbers a token in the cache: twice layers, key heads and head dimension.
    """

    billions: float
    cache: int


class Run(_Data):
    """Lines that are one call of `ropewalk eval`: the same model and settings.

    Attributes:
        name: of its folder.
        rows: of each method, its label in the paper's rows; empty where the paper has none.
    """

    name: str
    settings: dict[str, Any]
    trained_window: int | None
    rows: dict[str, str]

    def row_of(self, method: str) -> str:
        """The label of a method by its complete name, which it was perhaps not asked for by."""
        for text, row in self.rows.items():
            if method in (one.name for one in parse_all([text], 1, 8192)):
                return row
        return self.rows.get(method.partition("(")[0], "")


class _File(_Data):
    models: dict[str, Size]
    experiments: dict[str, Experiment]
    not_run: dict[str, str]


@cache
def _file() -> _File:
    return _File.model_validate(tomllib.loads(files(__name__).joinpath("experiments.toml").read_text(encoding="utf-8")))


def experiments() -> Mapping[str, Experiment]:
    """All, by their names, such as "selfextend/table-2"."""
    return _file().experiments


def not_run() -> Mapping[str, str]:
    """Tables of the papers that are no experiments, and why not."""
    return _file().not_run


def names() -> list[str]:
    """All tables and figures of the papers, each paper's tables first."""
    order = [*papers.tables(), *papers.figures()]
    return sorted([*experiments(), *not_run()], key=lambda name: (name.startswith("self/"), order.index(name)))


def experiment(name: str) -> Experiment:
    """Raises ValueError: there is none of that name, or it is not run, and why."""
    if name in not_run():
        raise ValueError(f"{name} is not run: {not_run()[name]}")
    if name not in experiments() and (close := [one for one in experiments() if one.endswith(f"/{name}")]):
        raise ValueError(f"no experiment is called {name!r}. Did you mean {' or '.join(map(repr, close))}?")
    return named("experiment", name, experiments())


def models_of(one: Experiment) -> list[str]:
    """Those that the paper ran, each once."""
    return list(dict.fromkeys(line.model for line in one.lines))


def lines_of(one: Experiment, model: str | None) -> list[Line]:
    """What the paper ran of a model; none of None, a model that it does not name."""
    return [line for line in one.lines if model is not None and _plain(line.model) == _plain(model)]


def runs_of(one: Experiment, model: str | None, overrides: Mapping[str, Any]) -> list[Run]:
    """What to run on a model: the paper's lines of it, or, on a model that the paper did not run, the settings of the
    first that it extended, each under the methods that are for others.

    Args:
        model: a folder, a file or a name on the hub; None for one that the paper did not run.
        overrides: settings in the place of the paper's.
    """
    known = lines_of(one, model)
    # Settings of what the paper extends: others belong to a model's own window.
    extended = [line for line in one.lines if line.method != UNMODIFIED] or list(one.lines)
    lines = known or [
        Line(model=line.model, method=method, settings=line.settings)
        for line in extended if line.model == extended[0].model for method in one.otherwise
    ]  # fmt: skip
    found: dict[str, Run] = {}
    for line in lines:
        settings = {**one.settings, **line.settings, **overrides}
        window = line.trained_window if known else None
        varied = {key: settings[key] for key in line.settings} | ({"window": window} if window else {})
        name = "-".join(re.sub(r"[^\w.]+", "-", f"{key}-{value}").strip("-") for key, value in varied.items()) or "run"
        run = found.setdefault(name, Run(name=name, settings=settings, trained_window=window, rows={}))
        # What made lines of one method two may be one by an override: the paper's figures stay beside it.
        run.rows[line.method] = run.rows.get(line.method) or (line.row if known else "")
    return list(found.values())


def forecast(one: Experiment, model: str) -> tuple[float, float] | None:
    """About how many hours an experiment takes for all lines of a model on one H100, and how many GiB of memory; None
    where its size is not known.

    Counted as docs/gpu.md has it for a whole model of 8 billion parameters, by transformers' own `generate`. No text is
    read faster than a token is written: both are one pass, and the host's part of it is the same.
    """
    size = _file().models.get(model)
    if size is None or not one.prompts:
        return None
    seconds, longest = 0.0, 0
    for line in (line for line in one.lines if line.model == model):
        settings = {**one.settings, **line.settings}
        lengths, new_tokens = _lengths(settings) or [one.tokens], settings.get("new_tokens", one.new_tokens)
        reading = max(2e9 * size.billions * min(one.tokens, max(lengths)) / _READING, _STEP)
        writing = _STEP * new_tokens * (one.prompts if one.answers is None else one.answers)
        seconds += len(parse_all([line.method], 1, 8192)) * (one.prompts * reading + writing)
        longest = max(longest, max(lengths) + new_tokens)
    memory = _BYTES * (1e9 * size.billions + size.cache * longest)
    return seconds / 3600, memory / _GIB


class _Letters(Dummy):
    """Whose tokens are letters, so that a prompt can be read again."""

    def encode(self, text: str, chat: bool = False) -> list[int]:
        return [*map(ord, text)]

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(map(chr, token_ids))


def first_prompt(task: Task) -> tuple[str, str]:
    """The first prompt of a task that is answered in words, whose lengths are letters then, and the right answer."""
    letters = _Letters()
    assert isinstance(task, PreparedTask)
    prepared = task.prepare(next(iter(task.examples())), letters)
    assert isinstance(prepared, Generation)
    return letters.decode(prepared.prompt.token_ids), prepared.target


def matrix(method: str, length: int) -> str:
    """The relative positions of a text of `length` tokens under a map: a line a query, from its first key on."""
    change = parse(method, length, length).change
    assert isinstance(change, PositionMap)
    positions = change.relative_positions(length).tolist()
    return "\n".join("".join(f"{one:4}" for one in row if one >= 0) for row in positions)


def _lengths(settings: Mapping[str, Any]) -> list[int]:
    """Of prompts, at most."""
    return [settings["length"]] if "length" in settings else list(settings.get("lengths", ()))


def _plain(model: str) -> str:
    """A model's name without who published it and how it is written."""
    return re.sub(r"[^a-z0-9]+", "-", re.split(r"[/\\]", model.rstrip("/\\"))[-1].lower()).removesuffix("-hf")
