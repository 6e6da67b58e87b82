# SPDX-License-Identifier: Apache-2.0
"""The short tasks as lm-eval defines them: its prompts, shots and scores, by its `evaluate`."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from itertools import chain
from pathlib import Path
from typing import Any

import lm_eval
import lm_eval.tasks
from datasets import Dataset  # type: ignore[import-untyped]
from lm_eval.api.model import LM
from lm_eval.models.dummy import DummyLM

from ropewalk.eval.data_files import DataError, loading
from ropewalk.eval.subjects import Dummy, Model, Subject
from ropewalk.eval.tasks.base import Outcome
from ropewalk.eval.tasks.short.benchmarks import BENCHMARKS, Benchmark
from ropewalk.integrations.lm_eval import RopewalkLM


@contextmanager
def _quietly() -> Iterator[None]:
    """Without lm-eval's advice and progress bars."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        logger.setLevel(level)


@dataclass(frozen=True, eq=False)
class Loaded:
    """A task of lm-eval; a benchmark is one, or one a subject.

    Attributes:
        task: lm-eval's own object.
        subject: "" where the benchmark has none.
        shots_from: the part of the data that solved examples are from; "" without any.
        asked: so many questions are asked, the first.
    """

    task: Any
    benchmark: str
    subject: str
    shots_from: str
    asked: int

    @property
    def name(self) -> str:
        return str(self.task.task_name)

    @_quietly()
    def digest(self) -> str:
        """SHA-256 of all questions and, if there are shots, of what those are from."""
        digest = hashlib.sha256()
        for document in chain(self.task.eval_docs, self.task.fewshot_docs() if self.shots_from else ()):
            digest.update(json.dumps(document, sort_keys=True, default=str).encode() + b"\n")
        return digest.hexdigest()


@_quietly()
def load(names: Sequence[str], data_dir: Path | None, questions: int | None, new_tokens: int | None) -> list[Loaded]:
    """The tasks of some benchmarks.

    Args:
        data_dir: folder that holds short/...; None to load from the hub, as lm-eval does.
        questions: of each benchmark, the first so many are asked, of MMLU the first of each subject; None for all.
        new_tokens: of an answer in words, at most; None for lm-eval's own.

    Raises:
        DataError: data are missing or cannot be read.
    """
    loaded = []
    for name in names:
        benchmark = BENCHMARKS[name]
        # Its whole catalogue takes ten seconds to read.
        folder = Path(lm_eval.tasks.__file__).parent / benchmark.folder
        manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=folder)
        tasks = [task for task in manager.all_subtasks if task.startswith(f"{name}_")] if benchmark.subjects else [name]
        for i, task in enumerate(tasks):
            subject = task.removeprefix(name).removeprefix("_")
            changes, shots_from = _changes(benchmark, data_dir, task, subject)
            # Only as part of a group does lm-eval put changes on top of what it has under that name.
            group = {"group": "ropewalk", "task": [{"task": task, **changes}]}
            with loading(task, "name a folder that holds short/... by --data-dir, or mend the connection to the hub"):
                [its] = manager.load([group])["tasks"].values()
            if new_tokens is not None and its.config.generation_kwargs is not None:
                its.set_config("generation_kwargs", {"max_gen_toks": new_tokens}, update=True)
            there = len(its.eval_docs)
            asked = there if questions is None else questions // len(tasks) + (i < questions % len(tasks))
            loaded.append(Loaded(its, name, subject, shots_from, min(asked, there)))
    return loaded


def _changes(benchmark: Benchmark, data_dir: Path | None, task: str, subject: str) -> tuple[dict[str, Any], str]:
    """Of lm-eval's configuration of a task, and the part of the data that shots are from."""
    changes: dict[str, Any] = {"num_fewshot": benchmark.shots}
    if data_dir is None:
        return changes, benchmark.examples
    questions = benchmark.questions(data_dir, subject)
    asked, shots_from = questions[benchmark.asked], benchmark.examples
    others = len(questions.get(shots_from, asked[1:]))
    if not asked or others < benchmark.shots:
        raise DataError(
            f"{task} asks with {benchmark.shots} solved examples, and the data folder holds {len(asked)} questions to "
            f"ask and {others} to take those from: pass --data-dir with all of its files"
        )
    if benchmark.shots and shots_from not in questions:
        shots_from = benchmark.asked
        # The same part for both, so that lm-eval leaves the question out that it asks.
        changes |= {"training_split": None, "validation_split": None}
        changes |= {"test_split": shots_from, "fewshot_split": shots_from}
    changes["custom_dataset"] = lambda **_: {part: Dataset.from_list(its) for part, its in questions.items()}
    return changes, shots_from


@_quietly()
def evaluate(subject: Subject, wanted: Mapping[Loaded, Set[int]], seed: int) -> dict[tuple[str, int], Outcome]:
    """Asks questions of tasks, by their numbers: what each gave, by its task's name and its number.

    lm-eval draws the shots of a task's questions one after the other. So the prompts of all up to the last are made: a
    question has the shots that it has in a run of lm-eval with this seed, whichever others are asked.
    """
    by_name = {one.name: numbers for one, numbers in wanted.items()}
    for one in wanted:
        one.task.set_fewshot_seed(seed)
    # `simple_evaluate` calls this, and also runs git and pip to write down where it runs, their errors on the terminal.
    # It gives results to the first process of a machine alone: it takes others for parts of its own run.
    given = lm_eval.evaluate(
        _Asking(_language_model(subject), by_name),
        lm_eval.tasks.TaskManager(include_defaults=False).load([one.task for one in wanted]),
        samples={name: range(max(numbers) + 1) for name, numbers in by_name.items()},
        bootstrap_iters=0,
    )
    samples: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for name, numbers in by_name.items():
        for sample in given["samples"][name]:
            if sample["doc_id"] in numbers:
                samples.setdefault((name, sample["doc_id"]), []).append(sample)
    return {key: _outcome(one, subject) for key, one in samples.items()}


def _outcome(samples: Sequence[Mapping[str, Any]], subject: Subject) -> Outcome:
    """Of a question, for which lm-eval has a sample for each of its filters."""
    first = samples[0]
    arguments, answers = first["arguments"], [answer for answer, *_ in first["resps"]]
    target, output = first["target"], answers[0]
    if not isinstance(output, str):
        # The right choice, of several the first; and the likeliest.
        target = arguments[target][1]
        output = arguments[max(range(len(answers)), key=lambda i: answers[i][0])][1].strip()
    scores = {
        metric if one["filter"] == "none" else f"{metric},{one['filter']}": float(one[metric])
        for one in samples
        for metric in one["metrics"]
    }
    return Outcome(len(subject.encode(arguments[0][0])), scores, str(target).strip(), output)


class _Asking(LM):  # type: ignore[misc]
    """A language model that is asked the wanted questions alone; the others get an answer that nobody looks at.

    Args:
        wanted: numbers of questions, by their task's name.
    """

    def __init__(self, model: Any, wanted: Mapping[str, Set[int]]) -> None:
        super().__init__()
        self.model, self.wanted = model, wanted

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        return self._answers("loglikelihood", requests, (0.0, False))

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        return self._answers("loglikelihood_rolling", requests, 0.0)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        return self._answers("generate_until", requests, "")

    def _answers(self, kind: str, requests: Sequence[Any], nothing: Any) -> list[Any]:
        asked = [one for one in requests if one.doc_id in self.wanted[one.task_name]]
        answers = iter(getattr(self.model, kind)(asked, disable_tqdm=True))
        return [next(answers) if one.doc_id in self.wanted[one.task_name] else nothing for one in requests]


def _language_model(subject: Subject) -> Any:
    """A subject as lm-eval's language model.

    Texts longer than the trained window are cut at their beginning, under every method alike: the tasks are to be the
    same for all.
    """
    if isinstance(subject, Dummy):
        return DummyLM()
    assert isinstance(subject, Model)
    return RopewalkLM(
        subject.loaded.model,
        map=None,
        tokenizer=subject.loaded.tokenizer,
        max_length=subject.trained_window,
        batch_size=subject.batch_size,
    )
