# SPDX-License-Identifier: Apache-2.0
"""The short tasks, and their questions from files on this machine in the columns that the hub has and lm-eval reads."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from ropewalk.eval.data_files import DataError, lines_of, read_file, text_of

Question = dict[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """A short task.

    Attributes:
        shots: solved examples in a prompt, as on the Open LLM Leaderboard.
        folder: of lm-eval's tasks, where its definition is.
        files: of each part of the data, by lm-eval's name of it, below DIR/short; of several the first that is there.
            The first part is asked, and the second, which may be missing, is what shots are taken from.
        columns: of a file's lines, JSON values or rows of CSV.
        subjects: whether it is a task of lm-eval for each of several.
        in_words: whether it is answered in words, and not by choices.
    """

    shots: int
    folder: str
    files: dict[str, tuple[str, ...]]
    columns: Callable[[Iterable[Any]], Iterator[Question]]
    subjects: bool = False
    in_words: bool = False

    @property
    def asked(self) -> str:
        return next(iter(self.files))

    @property
    def examples(self) -> str:
        """What shots are taken from; "" where there are none."""
        return [*self.files, ""][1]

    def questions(self, data_dir: Path, subject: str) -> dict[str, list[Question]]:
        """Those of each part.

        Raises:
            DataError: the part that is asked is missing, or a file is something else.
        """
        found = {}
        for part, names in self.files.items():
            paths = [data_dir / "short" / name.format(subject=subject) for name in names]
            there = [path for path in paths if path.is_file()]
            if there or part == self.asked:
                found[part] = self._read((there or paths)[0], data_dir, subject)
        return found

    def _read(self, path: Path, data_dir: Path, subject: str) -> list[Question]:
        content = read_file(path, f"--data-dir must hold {path.relative_to(data_dir)}")
        if path.suffix == ".csv":
            lines: Iterable[Any] = csv.reader(StringIO(text_of(content, path).removeprefix("\ufeff"), newline=""))
        else:
            lines = lines_of(content, dict[str, Any], path)
        more = {"subject": subject} if subject else {}
        try:
            return [{**question, **more} for question in self.columns(lines)]
        except (KeyError, TypeError, ValueError, StopIteration) as error:
            raise DataError(f"{path} holds something else than questions: {type(error).__name__} {error}") from error


def _some(*names: str) -> Callable[[Iterable[Question]], Iterator[Question]]:
    return lambda lines: ({name: line[name] for name in names} for line in lines)


def _arc(lines: Iterable[Question]) -> Iterator[Question]:
    for line in lines:
        choices = line["question"]["choices"]
        yield {
            "id": line["id"],
            "question": line["question"]["stem"],
            "choices": {name: [choice[name] for choice in choices] for name in ("text", "label")},
            "answerKey": line["answerKey"],
        }


def _truthfulqa(lines: Iterable[list[str]]) -> Iterator[Question]:
    """With all answers that it lists, the true ones first."""
    header, *rows = lines
    for row in rows:
        line = dict(zip(header, row, strict=True))
        true, false = (
            [answer.strip() for answer in line[f"{kind} Answers"].split(";") if answer.strip()]
            for kind in ("Correct", "Incorrect")
        )
        targets = {"choices": true + false, "labels": [1] * len(true) + [0] * len(false)}
        yield {"question": line["Question"], "mc2_targets": targets}


def _mmlu(lines: Iterable[list[str]]) -> Iterator[Question]:
    for text, *choices, answer in lines:
        if answer != "answer":  # a line of names
            number = "ABCD".index(answer) if answer.isalpha() else int(answer)
            yield {"question": text, "choices": choices, "answer": number}


# As each one's authors give the files. Clark et al., arXiv 1803.05457; Zellers et al., arXiv 1905.07830 (its test set
# has no answers); Hendrycks et al., arXiv 2009.03300; Lin et al., arXiv 2109.07958; Cobbe et al., arXiv 2110.14168.
BENCHMARKS = {
    "arc_challenge": Benchmark(
        25, "arc", {"test": ("arc/ARC-Challenge-Test.jsonl",), "train": ("arc/ARC-Challenge-Train.jsonl",)}, _arc
    ),
    "hellaswag": Benchmark(
        10,
        "hellaswag",
        {
            "validation": ("hellaswag/hellaswag_val.jsonl", "hellaswag/hellaswag_val_1000.jsonl"),
            "train": ("hellaswag/hellaswag_train.jsonl",),
        },
        _some("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    ),
    "mmlu": Benchmark(
        5,
        "mmlu/default",
        {"test": ("mmlu/test/{subject}_test.csv",), "dev": ("mmlu/dev/{subject}_dev.csv",)},
        _mmlu,
        subjects=True,
    ),
    "truthfulqa_mc2": Benchmark(0, "truthfulqa", {"validation": ("truthfulqa/TruthfulQA.csv",)}, _truthfulqa),
    "gsm8k": Benchmark(
        5,
        "gsm8k",
        {"test": ("gsm8k/test.jsonl",), "train": ("gsm8k/train.jsonl",)},
        _some("question", "answer"),
        in_words=True,
    ),
}
