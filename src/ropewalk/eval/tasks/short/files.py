"""The short tasks' data from files on this machine, in the columns that the hub has and lm-eval's tasks read.

DIR/short/arc/ARC-Challenge-{Test,Train}.jsonl             as the Allen Institute gives them
DIR/short/hellaswag/hellaswag_{val,train}.jsonl            as its authors give them; or hellaswag_val_1000.jsonl, a part
DIR/short/mmlu/{test,dev}/SUBJECT_{test,dev}.csv           as its authors give them, with a line of names or without
DIR/short/truthfulqa/TruthfulQA.csv                        as its authors give it
DIR/short/gsm8k/{test,train}.jsonl                         as its authors give them

Files of training questions may be missing; `None` stands for them.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Question = dict[str, Any]


class DataError(ValueError):
    """Data that are missing or cannot be read. One line, for users."""


@dataclass(frozen=True)
class Questions:
    """Of one task of lm-eval: those to be asked, and those that examples are taken from, if there are any."""

    asked: list[Question]
    shots: list[Question] | None


def arc_challenge(folder: Path) -> Questions:
    """Questions of ARC-Challenge (Clark et al., arXiv 1803.05457)."""

    def question(line: Question) -> Question:
        choices = line["question"]["choices"]
        return {
            "id": line["id"],
            "question": line["question"]["stem"],
            "choices": {name: [choice[name] for choice in choices] for name in ("text", "label")},
            "answerKey": line["answerKey"],
        }

    files = folder / "arc"
    return _questions(files, ["ARC-Challenge-Test.jsonl"], "ARC-Challenge-Train.jsonl", question)


def hellaswag(folder: Path) -> Questions:
    """Questions of HellaSwag (Zellers et al., arXiv 1905.07830): the validation set; the test set has no answers."""
    columns = ("activity_label", "ctx_a", "ctx_b", "endings", "label")
    files = folder / "hellaswag"
    return _questions(
        files,
        ["hellaswag_val.jsonl", "hellaswag_val_1000.jsonl"],
        "hellaswag_train.jsonl",
        lambda line: {name: line[name] for name in columns},
    )


def gsm8k(folder: Path) -> Questions:
    """Questions of GSM8K (Cobbe et al., arXiv 2110.14168)."""
    files = folder / "gsm8k"
    return _questions(
        files, ["test.jsonl"], "train.jsonl", lambda line: {name: line[name] for name in ("question", "answer")}
    )


def truthfulqa_mc2(folder: Path) -> Questions:
    """Questions of TruthfulQA (Lin et al., arXiv 2109.07958) with all answers that it lists, the true ones first."""

    def question(line: Question) -> Question:
        true, false = (_split(line[f"{kind} Answers"]) for kind in ("Correct", "Incorrect"))
        targets = {"choices": true + false, "labels": [1] * len(true) + [0] * len(false)}
        return {"question": line["Question"], "mc2_targets": targets}

    path = folder / "truthfulqa" / "TruthfulQA.csv"
    return Questions([_made(question, line, path) for line in csv.DictReader(_lines(path))], None)


def mmlu(folder: Path, subject: str) -> Questions:
    """Questions of one subject of MMLU (Hendrycks et al., arXiv 2009.03300)."""

    def questions(split: str) -> list[Question]:
        path = folder / "mmlu" / split / f"{subject}_{split}.csv"
        lines = list(csv.reader(_lines(path)))
        return [_made(question, line, path) for line in (lines[1:] if lines and lines[0][-1] == "answer" else lines)]

    def question(line: Sequence[str]) -> Question:
        text, *choices, answer = line
        number = "ABCD".index(answer) if answer.isalpha() else int(answer)
        return {"question": text, "choices": choices, "answer": number, "subject": subject}

    return Questions(questions("test"), questions("dev"))


def _questions(folder: Path, asked: Sequence[str], shots: str, question: Callable[[Question], Question]) -> Questions:
    """From JSON lines: those of the first of the files `asked` that is there, and those of `shots` if it is."""

    def read(path: Path) -> list[Question]:
        return [_made(lambda text: question(json.loads(text)), line, path) for line in _lines(path) if line.strip()]

    found = next((folder / name for name in asked if (folder / name).is_file()), folder / asked[0])
    return Questions(read(found), read(folder / shots) if (folder / shots).is_file() else None)


def _made(question: Callable[[Any], Question], line: Any, path: Path) -> Question:
    try:
        return question(line)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} holds something else than questions: {type(error).__name__} {error}") from error


def _split(answers: str) -> list[str]:
    return [answer.strip() for answer in answers.split(";") if answer.strip()]


def _lines(path: Path) -> io.StringIO:
    # Not splitlines: questions hold other characters that it takes for ends of lines.
    return io.StringIO(_text(path), newline="")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read {path} ({error.strerror}): --data-dir must hold it as short/...") from error
