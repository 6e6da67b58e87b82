"""LongBench's examples, from a folder or from the hub. No code of the hub's is run: only the files are read."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ropewalk.eval.errors import first_problem, told

Subset = Literal["full", "mini"]
SUBSETS: tuple[Subset, ...] = get_args(Subset)

_ZIP = "data.zip"


class LongBenchError(ValueError):
    """Examples that cannot be had, or cannot be scored. One line, for users."""


class Record(BaseModel):
    """An example as LongBench writes it.

    Attributes:
        context: the long text.
        input: what is asked about it; empty where the prompt says all.
        answers: each is right.
        all_classes: of which the answer is one, for trec.
    """

    model_config = ConfigDict(frozen=True)

    context: str
    input: str
    answers: tuple[str, ...] = Field(min_length=1)
    all_classes: tuple[str, ...] | None = None


@dataclass(frozen=True)
class _Place:
    """Where a subset lies."""

    folder: str
    hub: str


_PLACES: dict[Subset, _Place] = {
    "full": _Place("longbench/full", "THUDM/LongBench"),
    "mini": _Place("longbench/minilongbench", "linggm/MiniLongBench"),
}


def files(tasks: Sequence[str], subset: Subset, data_dir: Path | None = None) -> dict[str, bytes]:
    """The file of each task.

    Args:
        data_dir: folder of data sets on this machine; None to load the subset from the hub.

    Raises:
        LongBenchError: one is not there, or the hub cannot be reached.
    """
    place = _PLACES[subset]
    if data_dir is None:
        return _from_hub(tasks, place)
    folder = data_dir / place.folder
    return {task: _from_folder(folder, task, place) for task in tasks}


def records(file: bytes, name: str) -> list[Record]:
    """The examples of a file, which has one a line.

    Args:
        name: of the file, for errors.

    Raises:
        LongBenchError: a line is no example.
    """
    found = []
    # No other character ends a line: texts hold some of those, unescaped.
    for number, line in enumerate(file.rstrip(b"\n").split(b"\n"), start=1):
        try:
            found.append(Record.model_validate_json(line))
        except ValidationError as error:
            raise LongBenchError(
                f"{name}.jsonl, line {number}, is no example of LongBench: {first_problem(error)}"
            ) from error
    return found


def _from_folder(folder: Path, task: str, place: _Place) -> bytes:
    path = folder / f"{task}.jsonl"
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise LongBenchError(
            f"there is no {path}: --data-dir must hold this subset as {place.folder}/TASK.jsonl. "
            "Name the --tasks that are there, or the other --subset"
        ) from None


def _from_hub(tasks: Sequence[str], place: _Place) -> dict[str, bytes]:
    hub: Any = import_module("huggingface_hub")
    try:
        path = hub.hf_hub_download(place.hub, _ZIP, repo_type="dataset")
        with zipfile.ZipFile(path) as archive:
            members = {PurePosixPath(name).name: name for name in archive.namelist()}
            return {task: archive.read(members[f"{task}.jsonl"]) for task in tasks}
    except KeyError as error:
        raise LongBenchError(f"{_ZIP} of {place.hub} holds no {error.args[0]}") from error
    except Exception as error:  # whatever stands between here and the hub
        raise LongBenchError(
            f"{place.hub} cannot be loaded ({told(error)}): "
            f"name a folder that holds {place.folder}/TASK.jsonl by --data-dir"
        ) from error
