"""What an evaluation leaves behind: a folder with the configuration, saved first, and one row an example as it goes.

DIR/config.json     what was asked for; a run can only be gone on with as it was started
DIR/results.jsonl   one `Row` a line
DIR/results-1.jsonl those of a second process, where several share a run; and so on
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ropewalk.eval.errors import first_problem

_CONFIG, _ROWS = "config.json", "results*.jsonl"


class ResultsError(ValueError):
    """A folder of results that cannot be read, or belongs to another run. One line, for users."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Config(_Record):
    """What was asked for, complete: the same configuration gives the same examples.

    Attributes:
        task: name of the task.
        version: of the task; another one may have other prompts or another metric.
        settings: of the task, as plain data.
        methods: how the model is run, in the words that `methods.parse` takes.
        model: its name.
        model_hash: of the weights; empty where they have none, as the dummy's.
        seed: of everything random.
        trained_window: tokens that the model was trained on; None where that was not recorded.
    """

    task: str
    version: int
    settings: dict[str, Any]
    methods: tuple[str, ...]
    model: str
    model_hash: str
    seed: int
    trained_window: int | None = None


class Facts(_Record):
    """Where and by what a row was computed.

    Attributes:
        batch_size: prompts or passages at a time; how they are rounded depends on it.
    """

    model: str
    model_hash: str
    dtype: str
    device: str
    batch_size: int = 1
    seed: int
    commit: str
    versions: dict[str, str]


class Row(_Record):
    """One example under one method.

    Attributes:
        example: its name within the task and its settings.
        cell: what the example is one of, such as its length and depth: rows are averaged over cells.
        prompt_tokens: length of the prompt; None if it failed before that was known.
        target: what was to be answered.
        output: what was answered.
        scores: by name of the metric; empty where it failed.
        seconds: that the example took; of one in a batch, its part of the batch's.
        error: what went wrong, in one line; None if nothing did.
    """

    task: str
    version: int
    method: str
    example: str
    cell: dict[str, int | float | str]
    prompt_tokens: int | None = None
    target: str | None = None
    output: str | None = None
    scores: dict[str, float] = {}
    seconds: float
    error: str | None = None
    facts: Facts

    @property
    def key(self) -> tuple[str, str]:
        return self.method, self.example


class Results:
    """A folder of results, opened to be added to."""

    def __init__(self, folder: Path, config: Config, process: int = 0) -> None:
        """Starts a run in an empty or missing folder, or goes on with the one that is there.

        Args:
            process: number of this process among those that share the run: each has a file of its own.

        Raises:
            ResultsError: the folder holds another run, or something else.
        """
        self._rows = folder / (f"results-{process}.jsonl" if process else "results.jsonl")
        folder.mkdir(parents=True, exist_ok=True)
        # Looked for first: another process that shares the run writes its rows after the configuration.
        rows = sorted(folder.glob(_ROWS))
        path = folder / _CONFIG
        if path.exists():
            _check_same(read_config(folder), config, folder)
        elif rows:
            raise ResultsError(f"{folder} holds {rows[0].name} without a {_CONFIG}: name another folder")
        else:
            # Whole or not at all, whenever the process is killed.
            temporary = path.with_suffix(f".tmp{process}")
            temporary.write_text(config.model_dump_json(indent=2) + "\n")
            temporary.replace(path)
        self._cut_half_a_line()
        self.done = {row.key for row in read_rows(folder) if row.error is None}

    def add(self, row: Row) -> None:
        """Writes a row; it is on the disk when this returns."""
        with self._rows.open("a") as file:
            file.write(row.model_dump_json() + "\n")
            file.flush()
            os.fsync(file.fileno())
        if row.error is None:
            self.done.add(row.key)

    def _cut_half_a_line(self) -> None:
        """What a killed process was writing."""
        if self._rows.exists():
            written = self._rows.read_bytes()
            whole = written[: written.rfind(b"\n") + 1]
            if len(whole) < len(written):
                with self._rows.open("r+b") as file:
                    file.truncate(len(whole))


def read_config(folder: Path) -> Config:
    """Raises ResultsError: there is none, or it cannot be read."""
    path = folder / _CONFIG
    try:
        return Config.model_validate_json(path.read_text())
    except FileNotFoundError:
        raise ResultsError(f"{folder} holds no results: there is no {_CONFIG}") from None
    except ValidationError as error:
        raise ResultsError(f"{path} cannot be read: {first_problem(error)}") from error


def read_rows(folder: Path) -> Iterator[Row]:
    """The rows of a run, of all its processes; of an example that was tried again, the latest that did not fail.

    Raises:
        ResultsError: a line is no row.
    """
    latest: dict[tuple[str, str], Row] = {}
    for path in sorted(folder.glob(_ROWS)):
        # Answers may hold other characters that end lines, unescaped. After the last "\n" is what was being written.
        for number, line in enumerate(path.read_text().split("\n")[:-1], start=1):
            try:
                row = Row.model_validate_json(line)
            except ValidationError as error:
                raise ResultsError(f"{path}, line {number}, is no row: {first_problem(error)}") from error
            if row.error is None or row.key not in latest or latest[row.key].error is not None:
                latest[row.key] = row
    yield from latest.values()


def _check_same(started: Config, wanted: Config, folder: Path) -> None:
    for name in Config.model_fields:
        old, new = getattr(started, name), getattr(wanted, name)
        # What was not recorded cannot be held against a run.
        if old != new and not (name == "trained_window" and None in (old, new)):
            raise ResultsError(
                f"{folder} was started with {name} {json.dumps(old)}, not {json.dumps(new)}: "
                "go on with what it was started with, or name another folder"
            )
