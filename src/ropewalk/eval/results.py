# SPDX-License-Identifier: Apache-2.0
"""What an evaluation leaves behind: a folder with what was asked for, and one row an example, written as it goes.

DIR/config.json      what was asked for, saved first; a run can only be gone on with as it was started
DIR/results.jsonl    one `Row` a line
DIR/results-1.jsonl  those of a second process, where several share a run; and so on
DIR/facts-*.json     where and by what rows were computed: `Facts`, which rows name by the part behind "facts-"
DIR/.running-*       a lock, while a process writes

Rows that were written before facts had a file hold them themselves, and are read as well.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

from filelock import Timeout
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from ropewalk.eval.messages import first_problem
from ropewalk.eval.share import ALL, Share, release
from ropewalk.eval.tasks import TASKS, metrics_of
from ropewalk.files import naming, read_bytes, replacing
from ropewalk.maps.numbers import UNBOUNDED

_CONFIG, _ROWS, _FACTS = "config.json", "results*.jsonl", "facts-*.json"

_Whole = Annotated[int, Field(ge=-(2**63), lt=2**63)]
_Tokens = Annotated[int, Field(ge=0, le=UNBOUNDED)]
# Nothing measured comes near; the fourth power of what is less, as in the variance of a variance, is a float.
_LARGEST = 1e50
_LARGEST_LOG = 700  # its exponential is a float
_Number = Annotated[FiniteFloat, Field(ge=-_LARGEST, le=_LARGEST)]


class ResultsError(ValueError):
    """A folder of results that cannot be read, or belongs to another run. One line, for users."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


_R = TypeVar("_R", bound=_Record)


class Origin(_Record):
    """What was asked of what: the same in the configuration of a folder and in the facts of all its rows.

    Attributes:
        task: name of the task.
        version: of the task; another one may have other prompts or another metric.
        model: its name.
        model_hash: of the weights; empty where they have none, as the dummy's.
        config_hash, tokenizer_hash: of the files beside the weights; empty where there are none, None where that was
            not recorded.
        seed: of everything random.
    """

    task: str
    version: int
    model: str
    model_hash: str
    config_hash: str | None = None
    tokenizer_hash: str | None = None
    seed: int


class Config(Origin):
    """What was asked for, complete: the same configuration gives the same examples.

    Attributes:
        settings: of the task, as plain data.
        methods: how the model is run, in the words that `methods.parse` takes.
        trained_window: tokens that the model was trained on; None where that was not recorded.
        examples: of each method, in all, however few a run was limited to; None where that was not recorded.
    """

    settings: dict[str, Any]
    methods: tuple[str, ...]
    trained_window: _Tokens | None = None
    examples: _Whole | None = None

    @property
    def complete(self) -> Config:
        """With the settings that its task has been given since, at their defaults: so was what it says run."""
        if self.task not in TASKS:
            return self
        since = TASKS[self.task]().model_dump(mode="json", exclude={"data_dir"})
        return self.model_copy(update={"settings": {**since, **self.settings}})


class Facts(Origin):
    """What rows are of, and where and by what they were computed: the same for all that a process writes.

    Attributes:
        batch_size: prompts or passages at a time; how they are rounded depends on it.
    """

    dtype: str
    device: str
    batch_size: int = 1
    commit: str
    versions: dict[str, str]

    @property
    def name(self) -> str:
        """The same for the same facts, and for no others."""
        return _name_of(self.model_dump(mode="json"))


class Row(_Record):
    """One example under one method.

    Attributes:
        example: its name within the task and its settings.
        cluster: what was sampled that the example is one of, such as a book or a document: its examples do not tell as
            much as others would. Read from rows that were written before it was recorded it is what their task says.
        cell: what the example is one of, such as its length and depth: rows are averaged over cells.
        prompt_tokens: length of the prompt; None if it failed before that was known.
        target: what was to be answered.
        output: what was answered.
        scores: by name of the metric; empty where it failed.
        seconds: that the example took; of one in a batch, its part of the batch's.
        error: what went wrong, in one line; None if nothing did.
        facts: in a file their name.
    """

    method: str
    example: str
    cluster: str = ""
    cell: dict[str, _Whole | _Number | str]
    prompt_tokens: _Tokens | None = None
    target: str | None = None
    output: str | None = None
    scores: dict[str, _Number] = {}
    seconds: Annotated[_Number, Field(ge=0)]
    error: str | None = None
    facts: Facts

    @property
    def key(self) -> tuple[str, str]:
        return self.method, self.example

    @model_validator(mode="before")
    @classmethod
    def _as_once(cls, data: Any) -> Any:
        """A row that holds its facts itself, and beside them what is now one of them."""
        if isinstance(data, dict) and isinstance(data.get("facts"), dict):
            data = dict(data)
            beside = {name: data.pop(name) for name in ("task", "version") if name in data}
            data["facts"] = {**beside, **data["facts"]}
        return data

    @field_validator("facts", mode="before")
    @classmethod
    def _by_name(cls, facts: Any, info: ValidationInfo) -> Any:
        return info.context[facts] if isinstance(facts, str) and info.context is not None else facts

    @model_validator(mode="after")
    def _sampled(self) -> Self:
        """With what was not recorded."""
        if not self.cluster:
            task = TASKS.get(self.facts.task)
            object.__setattr__(self, "cluster", (task and task.cluster_of(self.example)) or self.example)
        return self

    @property
    def line(self) -> str:
        """As it stands in a file. No function of pydantic's names the facts: that would call Ctrl-C an error."""
        fields = self.model_dump(mode="json", exclude_defaults=True, exclude={"facts"}) | {"facts": self.facts.name}
        return json.dumps(fields, ensure_ascii=False, separators=(",", ":"))


@dataclass(frozen=True)
class Run:
    """A run as its folder has it, finished or not.

    Attributes:
        rows: of all processes; of an example that was tried again, the latest that did not fail.
        damaged: lines that are no rows, and why.
    """

    folder: str
    config: Config
    rows: tuple[Row, ...]
    damaged: tuple[str, ...] = ()

    @property
    def methods(self) -> list[str]:
        """Those that have rows, in the order in which they were asked for."""
        there = {row.method for row in self.rows}
        return [method for method in self.config.methods if method in there] + sorted(there - {*self.config.methods})


class Results:
    """A folder of results, opened to be added to; nobody else can while it is open.

    Attributes:
        share, limit: what of the examples this process asks, and of how many of each method; None for all.
        done: methods and examples that have a row which did not fail.
        damaged: lines that are no rows, and why; they stay where they are.
    """

    def __init__(self, folder: Path, config: Config, share: Share = ALL, limit: int | None = None) -> None:
        """Starts a run in an empty or missing folder, or goes on with the one that is there.

        Raises:
            ResultsError: the folder holds another run, or something else; or another process does the same examples.
            OSError: it cannot be written.
        """
        self._folder, self.share, self.limit = folder, share, limit
        self._rows = folder / (f"results-{share.index}.jsonl" if share.index else "results.jsonl")
        self._written: set[str] = set()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock = share.lock(folder, limit)
        except Timeout:
            raise ResultsError(
                f"another process is writing to {folder}: wait until it has ended, or name another folder"
            ) from None
        try:
            self._start(config)
        except BaseException:
            self.close()
            raise

    def _start(self, config: Config) -> None:
        check(self._folder, config)
        if not (path := self._folder / _CONFIG).exists():
            _write(path, config)
        self._cut_half_a_line()
        there = _read(self._folder, config)
        self.done, self.damaged = {row.key for row in there.rows if row.error is None}, there.damaged

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets others write."""
        release(self._lock)

    def add(self, row: Row) -> None:
        """Writes a row; it is on the disk when this returns."""
        facts = row.facts.name
        if facts not in self._written:
            _write(self._folder / f"facts-{facts}.json", row.facts)
            self._written.add(facts)
        with naming(self._rows), self._rows.open("a", encoding="utf-8") as file:
            file.write(row.line + "\n")
            file.flush()
            os.fsync(file.fileno())
        if row.error is None:
            self.done.add(row.key)

    def _cut_half_a_line(self) -> None:
        """What a killed process was writing."""
        if self._rows.exists():
            written = read_bytes(self._rows)
            whole = written[: written.rfind(b"\n") + 1]
            if len(whole) < len(written):
                with self._rows.open("r+b") as file:
                    file.truncate(len(whole))


def check(folder: Path, config: Config) -> None:
    """Looks whether a run can be started in a folder, or gone on with. Nothing is written.

    Raises:
        ResultsError: the folder holds another run, or something else.
    """
    # Looked for first: another process that shares the run writes its rows after the configuration.
    rows = sorted(folder.glob(_ROWS))
    if (folder / _CONFIG).exists():
        check_same(read_config(folder), config, folder)
    elif rows:
        raise ResultsError(f"{folder} holds {rows[0].name} without a {_CONFIG}: name another folder")


def read(folder: Path) -> Run:
    """A run, which may have no rows yet. Raises ResultsError: there is none, or the folder holds other things."""
    if not folder.is_dir():
        raise ResultsError(f"there is no folder {folder}")
    return _read(folder, read_config(folder))


def read_config(folder: Path) -> Config:
    """Raises ResultsError: there is none, or it cannot be read."""
    try:
        return _record(folder / _CONFIG, Config)
    except FileNotFoundError:
        raise ResultsError(f"{folder} holds no results: there is no {_CONFIG}") from None


def _read(folder: Path, config: Config) -> Run:
    known = {path.stem.removeprefix("facts-"): _facts(path) for path in sorted(folder.glob(_FACTS))}
    latest: dict[tuple[str, str], Row] = {}
    damaged = []
    for path in sorted(folder.glob(_ROWS)):
        # Answers may hold other characters that end lines, unescaped. After the last "\n" is what was being written.
        for number, line in enumerate(read_bytes(path).split(b"\n")[:-1], start=1):
            try:
                row = Row.model_validate_json(line, context=known)
                problem = _no_score(row)
            except ValidationError as error:
                problem = first_problem(error)
            except KeyError as error:
                raise ResultsError(
                    f"{path}, line {number}, needs facts-{error.args[0]}.json, which is not there: put it back, or "
                    "move the line elsewhere, and its example is asked again"
                ) from None
            if problem:
                damaged.append(f"{path.name}, line {number}, is no row: {problem}")
                continue
            config = _of(row.facts, config, f"{path}, line {number},")
            if row.error is None or row.key not in latest or latest[row.key].error is not None:
                latest[row.key] = row
    return Run(str(folder), config, tuple(latest.values()), tuple(damaged))


def _no_score(row: Row) -> str:
    """Which score is none that the row's task gives, and why; empty where each is one."""
    for name, metric in metrics_of(row.facts.task).items():
        if metric.pooled is None:
            if not 0 <= row.scores.get(name, 0) <= 1:
                return f"scores.{name}: Input should be from 0 to 1"
            continue
        above, below = metric.pooled
        for one, value in row.scores.items():
            # Also those of a part, such as "nll_1024".
            part = one.removeprefix(above)
            count = row.scores.get(below + part)
            if one.startswith(above) and count is not None and not (count >= 1 and 0 <= value <= _LARGEST_LOG * count):
                return (
                    f"scores.{one}: Input should be from 0 to {_LARGEST_LOG} times {below + part}, which is 1 or more"
                )
    return ""


def _facts(path: Path) -> Facts:
    """Raises ResultsError: they cannot be read, or are not those that rows name."""
    facts = _record(path, Facts)
    # By what is written, as earlier versions had another order.
    if path.stem != (name := f"facts-{_name_of(json.loads(read_bytes(path)))}"):
        raise ResultsError(f"{path} was changed or renamed: what it holds is called {name}.json; put the old file back")
    return facts


def _name_of(facts: dict[str, Any]) -> str:
    """What was not recorded changes no name."""
    said = {name: its for name, its in facts.items() if its is not None}
    return hashlib.sha256(json.dumps(said, ensure_ascii=False, separators=(",", ":")).encode()).hexdigest()[:8]


def _record(path: Path, kind: type[_R]) -> _R:
    try:
        return kind.model_validate_json(read_bytes(path))
    except ValidationError as error:
        raise ResultsError(f"{path} cannot be read: {first_problem(error)}") from error


def _write(path: Path, record: _Record) -> None:
    with replacing(path) as unfinished:
        unfinished.write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")


def known_to_differ(old: Any, new: Any, name: str) -> bool:
    """Whether two configurations or facts are known to differ in this: what was not recorded is held against none."""
    its, others = getattr(old, name), getattr(new, name)
    return bool(its != others and None not in (its, others))


def check_same(started: Config, wanted: Config, folder: Path) -> None:
    """Raises ResultsError: the folder was started with something else."""
    started, wanted = started.complete, wanted.complete
    # The version may be that of a setting, which is then what differs.
    for name in sorted(Config.model_fields, key="version".__eq__):
        if known_to_differ(started, wanted, name):
            old, new = getattr(started, name), getattr(wanted, name)
            raise ResultsError(
                f"{folder} was started with {name} {json.dumps(old)}, not {json.dumps(new)}: "
                "go on with what it was started with, or name another folder"
            )


def _of(facts: Facts, config: Config, where: str) -> Config:
    """The configuration, with what the row knows of it and it does not itself.

    Raises:
        ResultsError: the row is of something else than the folder.
    """
    for name in Origin.model_fields:
        its, ours = getattr(facts, name), getattr(config, name)
        if known_to_differ(facts, config, name):
            raise ResultsError(
                f"{where} is of {name.replace('_', ' ')} {json.dumps(its)}, and the folder of {json.dumps(ours)}: "
                "move it to a folder of its own"
            )
        if ours is None and its is not None:
            config = config.model_copy(update={name: its})
    return config
