"""The short tasks as lm-eval defines them: its prompts, shots and metrics. Only where data come from is ours."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import Any

from ropewalk.eval.subjects import Dummy, Model, Subject
from ropewalk.eval.tasks.base import Outcome
from ropewalk.eval.tasks.short import files
from ropewalk.eval.tasks.short.files import DataError, Questions


@dataclass(frozen=True)
class Benchmark:
    """A short task.

    Args:
        shots: solved examples in a prompt, as on the Open LLM Leaderboard.
        folder: of lm-eval's tasks, where its definition is.
        asked, examples: parts of the data as lm-eval names them: what is asked, and what shots are taken from.
        read: its questions, from a folder; of a subject, if it has any.
        tags: of lm-eval's tasks, where it is several, one a subject.
    """

    shots: int
    folder: str
    asked: str
    examples: str
    read: Callable[..., Questions]
    tags: tuple[str, ...] = ()


_MMLU_TAGS = tuple(f"mmlu_{field}_tasks" for field in ("stem", "humanities", "social_sciences", "other"))
BENCHMARKS = {
    "arc_challenge": Benchmark(25, "arc", "test", "train", files.arc_challenge),
    "hellaswag": Benchmark(10, "hellaswag", "validation", "train", files.hellaswag),
    "mmlu": Benchmark(5, "mmlu/default", "test", "dev", files.mmlu, _MMLU_TAGS),
    "truthfulqa_mc2": Benchmark(0, "truthfulqa", "validation", "", files.truthfulqa_mc2),
    "gsm8k": Benchmark(5, "gsm8k", "test", "train", files.gsm8k),
}


@dataclass(frozen=True)
class HarnessTask:
    """A task of lm-eval, loaded.

    Attributes:
        task: lm-eval's own object.
        cell: its benchmark, and its subject if that has any.
        shots: solved examples in a prompt.
        shots_from: the part of the data that they are from; "" without any.
        questions: the first so many are asked; None for all.
        seed: of the shots.
    """

    task: Any
    cell: dict[str, int | float | str]
    shots: int
    shots_from: str
    questions: int | None
    seed: int

    @property
    def benchmark(self) -> str:
        return str(self.cell["task"])

    @property
    def shots_are_asked(self) -> bool:
        """Whether the shots are questions that are asked too, for want of others."""
        return self.shots > 0 and self.shots_from == BENCHMARKS[self.benchmark].asked

    @property
    def name(self) -> str:
        return str(self.task.task_name)

    @property
    def version(self) -> str:
        return str(self.task.VERSION)

    @cached_property
    def asked(self) -> int:
        """How many questions are asked."""
        with _silent():
            there = len(self.task.eval_docs)
        return there if self.questions is None else min(self.questions, there)

    @cached_property
    def texts_hash(self) -> str:
        """SHA-256 of all questions and, if there are shots, of what those are from."""
        digest = hashlib.sha256()
        with _silent():
            parts = self.task.eval_docs, self.task.fewshot_docs() if self.shots else ()
        for documents in parts:
            for document in documents:
                digest.update(json.dumps(document, sort_keys=True, default=str).encode() + b"\n")
        return digest.hexdigest()

    @cached_property
    def requests(self) -> list[list[Any]]:
        """lm-eval's requests for the questions, a list for each; their shots are drawn one after the other.

        So a question has the shots that it has in a run of lm-eval with this seed, however many are asked. Made when
        the first is asked: for all questions of all tasks that takes minutes.
        """
        self.task.set_fewshot_seed(self.seed)
        with _silent():
            self.task.build_all_requests(limit=self.asked)
        by_question: dict[int, list[Any]] = {}
        for request in self.task.instances:
            by_question.setdefault(request.doc_id, []).append(request)
        return [sorted(requests, key=lambda request: request.idx) for requests in by_question.values()]

    def outcome(self, requests: Sequence[Any], subject: Subject) -> Outcome:
        """Of a question whose requests were asked."""
        for filters in self.task._filters:
            filters.apply(requests)
        first, target = requests[0], self.task.doc_to_target(requests[0].doc)
        output = first.resps[0]
        if first.request_type == "loglikelihood":
            # The right choice, of several the first; and the likeliest.
            target = requests[target].args[1].strip()
            output = max(requests, key=lambda request: request.resps[0][0]).args[1].strip()
        return Outcome(len(subject.encode(first.args[0])), self._scores(requests), str(target).strip(), str(output))

    def _scores(self, requests: Sequence[Any]) -> dict[str, float]:
        """By lm-eval's name of the metric; with the name of its filter where it has several."""
        scores = {}
        for name in requests[0].filtered_resps:
            answers = [request.filtered_resps[name] for request in requests]
            for metric, value in self.task.process_results(requests[0].doc, answers).items():
                scores[metric if name == "none" else f"{metric},{name}"] = float(value)
        return scores


def ask(language_model: Any, requests: Sequence[Any]) -> None:
    """Puts a language model's answers into requests of one kind, as lm-eval's own loop does."""
    answers = getattr(language_model, requests[0].request_type)(requests, disable_tqdm=True)
    for request, answer in zip(requests, answers, strict=True):
        request.resps, request.filtered_resps = [answer], {}


def load(
    names: Sequence[str], data_dir: Path | None = None, questions: int | None = None, seed: int = 0
) -> list[HarnessTask]:
    """The tasks of some benchmarks; of MMLU one a subject.

    Args:
        names: of `BENCHMARKS`.
        data_dir: folder that holds short/...; None to load from the hub, as lm-eval does.
        questions: of each task, the first so many are asked, of MMLU the first of each subject; None for all.
        seed: of the shots.

    Raises:
        DataError: data are missing or cannot be read.
        ImportError: lm-eval is not installed.
    """
    tasks = _lm_eval("tasks")
    _lm_eval("models.huggingface")  # needs more packages; once questions are asked, each would fail
    with _silent():
        # Its whole catalogue takes ten seconds to read.
        folders = [Path(tasks.__file__).parent / BENCHMARKS[name].folder for name in names]
        manager = tasks.TaskManager(include_defaults=False, include_path=folders)
    return [loaded for name in names for loaded in _benchmark(name, data_dir, manager, questions, seed)]


def language_model(subject: Subject) -> Any:
    """A subject as lm-eval's language model.

    Texts longer than the trained window are cut at their beginning, under every method alike: the tasks are to be the
    same for all.
    """
    if isinstance(subject, Dummy):
        return _lm_eval("models.dummy").DummyLM()
    assert isinstance(subject, Model)
    with _silent():
        return _lm_eval("models.huggingface").HFLM(
            pretrained=subject.loaded.model,
            tokenizer=subject.loaded.tokenizer,
            max_length=subject.trained_window,
            batch_size=subject.batch_size,
        )


def version() -> str:
    """Of lm-eval."""
    return str(_lm_eval("").__version__)


def _benchmark(
    name: str, data_dir: Path | None, manager: Any, questions: int | None, seed: int
) -> Iterator[HarnessTask]:
    benchmark = BENCHMARKS[name]
    subtasks = sorted(task for tag in benchmark.tags for task in manager.task_index[tag].tags)
    tasks = subtasks or [name]
    for task, its_questions in zip(tasks, _spread(questions, len(tasks)), strict=True):
        subject = task.removeprefix(f"{name}_")
        changes: dict[str, Any] = {"num_fewshot": benchmark.shots}
        shots_from = benchmark.examples
        if data_dir is not None:
            found = benchmark.read(data_dir / "short", *([subject] if subtasks else []))
            if benchmark.shots and found.shots is None:
                shots_from = benchmark.asked
                changes |= {"training_split": None, "validation_split": None}
                # The same for both, so that lm-eval leaves the question out that it asks.
                changes |= {"test_split": shots_from, "fewshot_split": shots_from}
            _check_enough(task, benchmark.shots, found)
            changes["custom_dataset"] = partial(_datasets, benchmark, found)
        cell: dict[str, int | float | str] = {"task": name, **({"subject": subject} if subtasks else {})}
        yield HarnessTask(_load(manager, task, changes), cell, benchmark.shots, shots_from, its_questions, seed)


def _spread(questions: int | None, parts: int) -> list[int | None]:
    """So many questions over so many parts, as evenly as can be."""
    if questions is None:
        return [None] * parts
    return [questions // parts + (part < questions % parts) for part in range(parts)]


def _check_enough(task: str, shots: int, questions: Questions) -> None:
    others = len(questions.asked) - 1 if questions.shots is None else len(questions.shots)
    if not questions.asked or others < shots:
        raise DataError(
            f"{task} asks with {shots} solved examples, and the data folder holds {len(questions.asked)} questions "
            f"to ask and {max(others, 0)} to take those from: pass --data-dir with all of its files"
        )


def _datasets(benchmark: Benchmark, questions: Questions, **_: object) -> dict[str, Any]:
    """What lm-eval would have loaded; it passes settings of its own."""
    dataset = import_module("datasets").Dataset
    parts = {benchmark.asked: dataset.from_list(questions.asked)}
    return parts if questions.shots is None else {**parts, benchmark.examples: dataset.from_list(questions.shots)}


def _load(manager: Any, name: str, changes: dict[str, Any]) -> Any:
    # Only as part of a group does lm-eval put changes on top of what it has under that name.
    group = {"group": "ropewalk", "task": [{"task": name, **changes}]}
    try:
        with _silent():
            return manager.load([group])["tasks"][name]
    except DataError:
        raise
    except Exception as error:  # whatever stands between here and the hub
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{name} cannot be loaded ({type(error).__name__}: {reason}): name a folder that holds short/... by "
            "--data-dir, or mend the connection to the hub"
        ) from error


def _lm_eval(module: str) -> Any:
    try:
        return import_module(f"lm_eval.{module}".rstrip("."))
    except ImportError as error:
        raise ImportError(
            f"the short tasks are lm-eval's, and {error.name} is not installed: run 'pip install \"ropewalk[lm-eval]\"'"
        ) from error


@contextmanager
def _silent() -> Iterator[None]:
    """Without lm-eval's advice and progress bars."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        logger.setLevel(level)
