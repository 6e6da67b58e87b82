"""L-Eval's files, from a folder or from the hub: one document a line, with its questions and what is right."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from ropewalk.eval.errors import told
from ropewalk.eval.tasks.leval.exams import ExamName
from ropewalk.eval.texts import TextsError

_FOLDER = "leval/closed"
_HUB, _HUB_FOLDER = "L4NLP/LEval", "LEval/Exam"


class Paper(BaseModel):
    """A document, its questions, and to each what is right."""

    input: str
    instructions: list[str]
    outputs: list[str]


@dataclass(frozen=True)
class Exams:
    """The papers of some exams.

    Attributes:
        sha256: of their files.
    """

    papers: dict[ExamName, list[Paper]]
    sha256: str


def read(names: Sequence[ExamName], data_dir: Path | None) -> Exams:
    """The exams, from DIR/leval/closed/NAME.jsonl, or without a folder from the hub.

    Only files of data are loaded from the hub: its own way to load them would run a program.

    Raises:
        TextsError: a file does not exist, cannot be loaded or is none of L-Eval's.
    """
    digest = hashlib.sha256()
    papers = {}
    for name in names:
        content = _from_hub(name) if data_dir is None else _from_folder(name, data_dir / _FOLDER)
        digest.update(f"{name} {len(content)} ".encode() + content)
        papers[name] = _parsed(name, content)
    return Exams(papers, digest.hexdigest())


def _from_folder(name: ExamName, folder: Path) -> bytes:
    path = folder / f"{name}.jsonl"
    try:
        return path.read_bytes()
    except OSError as error:
        raise TextsError(
            f"{path} cannot be read ({error.strerror}): --data-dir must hold {_FOLDER}/{name}.jsonl, "
            f"or leave {name} out of --tasks"
        ) from error


def _from_hub(name: ExamName) -> bytes:
    file = f"{_HUB_FOLDER}/{name}.jsonl"
    try:
        hub: Any = import_module("huggingface_hub")
        return Path(hub.hf_hub_download(_HUB, file, repo_type="dataset")).read_bytes()
    except Exception as error:  # whatever stands between here and the hub
        raise TextsError(
            f"{file} of {_HUB} cannot be loaded ({told(error)}): "
            f"name a folder that holds {_FOLDER}/{name}.jsonl by --data-dir"
        ) from error


def _parsed(name: ExamName, content: bytes) -> list[Paper]:
    papers = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            paper = Paper.model_validate_json(line)
        except ValidationError as error:
            raise TextsError(f"{name}.jsonl, line {number}, is none of L-Eval's: {error.errors()[0]['msg']}") from error
        if len(paper.instructions) != len(paper.outputs):
            raise TextsError(
                f"{name}.jsonl, line {number}, has {len(paper.instructions)} questions and {len(paper.outputs)} answers"
            )
        papers.append(paper)
    if not papers:
        raise TextsError(f"{name}.jsonl is empty: load it again")
    return papers
