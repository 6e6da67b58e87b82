"""Asks questions of lm-eval's tasks under several methods, a row each; what is in the folder already is not asked
again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from time import perf_counter
from typing import Any

from ropewalk.eval.infinite import Infinite
from ropewalk.eval.methods import Method
from ropewalk.eval.results import Facts, Results, Row
from ropewalk.eval.runner import ALL, Counts, OnRow, Share, recorded
from ropewalk.eval.subjects import Subject, batches
from ropewalk.eval.tasks.short.harness import HarnessTask

NAME = "short"
VERSION = 1

# The requests of one question, and its name.
_Question = tuple[str, list[Any]]


def run(
    tasks: Sequence[HarnessTask],
    methods: Sequence[Method],
    subject: Subject,
    language_model: Any,
    results: Results,
    facts: Facts,
    *,
    limit: int | None = None,
    batch_size: int = 1,
    on_row: OnRow | None = None,
    share: Share = ALL,
) -> Counts:
    """Asks every question under every method.

    Args:
        language_model: the subject, for lm-eval.
        limit: questions of each task, its first ones; None for all.
        share: of the questions, that this process asks.
        batch_size: questions that are asked together, and lost together if the process is killed.

    Raises:
        UnsupportedModelError: a method does not take the model.
        ValueError: a method changes what is asked, and not the model.
    """
    questions = [(task, share.of(_questions(task, limit, facts.seed))) for task in tasks]
    names = [name for _, asked in questions for name, _ in asked]
    for method in methods:
        if isinstance(method.change, Infinite):
            raise ValueError(f"{method.name} reads texts block by block, which lm-eval's tasks do not: leave it out")
    total = len(names) * len(methods)
    done = before = sum((method.name, name) in results.done for method in methods for name in names)
    failed = 0
    for method in methods:
        pending = [(task, [q for q in asked if (method.name, q[0]) not in results.done]) for task, asked in questions]
        if not any(left for _, left in pending):
            continue
        with subject.under(method):
            for task, left in pending:
                for batch in batches(left, batch_size):
                    for row in _rows(task, method, batch, subject, language_model, facts):
                        results.add(row)
                        done, failed = done + 1, failed + (row.error is not None)
                        if on_row is not None:
                            on_row(row, done, total)
    return Counts(before, done - before - failed, failed)


def _questions(task: HarnessTask, limit: int | None, seed: int) -> list[_Question]:
    count = task.questions if limit is None else min(limit, task.questions)
    return [(f"{task.name}-{i}", requests) for i, requests in enumerate(task.requests(count, seed))]


def _rows(
    task: HarnessTask,
    method: Method,
    questions: Sequence[_Question],
    subject: Subject,
    language_model: Any,
    facts: Facts,
) -> Iterator[Row]:
    """Of questions that are asked together; if that fails, none of them is answered."""
    began = perf_counter()
    problem: str | None = None
    try:
        task.ask(language_model, [request for _, requests in questions for request in requests])
        scores = [task.scores(requests) for _, requests in questions]
    except Exception as error:
        problem = recorded(error)
        scores = [{} for _ in questions]
    seconds = round((perf_counter() - began) / len(questions), 3)
    for (name, requests), its in zip(questions, scores, strict=True):
        yield Row(
            task=NAME,
            version=VERSION,
            method=method.name,
            example=name,
            cell=task.cell,
            prompt_tokens=len(subject.encode(requests[0].args[0])),
            target=_target(task, requests),
            output=None if problem else _output(requests),
            scores=its,
            seconds=seconds,
            error=problem,
            facts=facts,
        )


def _target(task: HarnessTask, requests: Sequence[Any]) -> str:
    """The right answer; of several, the first."""
    target = task.task.doc_to_target(requests[0].doc)
    return str(requests[target].args[1] if _is_choice(requests) else target).strip()


def _output(requests: Sequence[Any]) -> str:
    """What was answered: the likeliest choice, or the text."""
    if _is_choice(requests):
        return str(max(requests, key=lambda request: request.resps[0][0]).args[1]).strip()
    return str(requests[0].resps[0])


def _is_choice(requests: Sequence[Any]) -> bool:
    return bool(requests[0].request_type == "loglikelihood")
