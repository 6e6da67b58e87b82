"""Runs a task under several methods, one row an example as it goes; what is in the folder already is not run again."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TypeVar

from ropewalk.eval.commit import commit_of
from ropewalk.eval.errors import told
from ropewalk.eval.methods import Method
from ropewalk.eval.results import Config, Facts, Results, Row
from ropewalk.eval.subjects import Subject, batches
from ropewalk.eval.tasks.base import Example, Outcome, Task

T = TypeVar("T")

# Called after each example with its row, and the examples done and to be done in all.
OnRow = Callable[[Row, int, int], None]


@dataclass(frozen=True)
class Share:
    """What one of several processes does: every `count`-th example, from `index` on, so that all have as long texts."""

    index: int = 0
    count: int = 1

    def of(self, examples: Sequence[T]) -> list[T]:
        return list(examples[self.index :: self.count])


ALL = Share()


@dataclass(frozen=True)
class Counts:
    """Examples of a run."""

    done_before: int
    done: int
    failed: int


def config_of(
    task: Task, methods: Sequence[Method], subject: Subject, seed: int, trained_window: int | None = None
) -> Config:
    return Config(
        task=task.name,
        version=task.version,
        settings=task.settings.model_dump(mode="json"),
        methods=tuple(method.name for method in methods),
        model=subject.name,
        model_hash=subject.weights_hash,
        seed=seed,
        trained_window=trained_window,
    )


def facts_of(subject: Subject, seed: int) -> Facts:
    """Of this process."""
    from ropewalk.integrations.transformers.versions import versions

    return Facts(
        model=subject.name,
        model_hash=subject.weights_hash,
        dtype=subject.dtype,
        device=subject.device,
        batch_size=subject.batch_size,
        seed=seed,
        commit=commit_of(Path(__file__), "../.."),
        versions=versions(),
    )


def run(
    task: Task,
    methods: Sequence[Method],
    subject: Subject,
    results: Results,
    facts: Facts,
    limit: int | None = None,
    on_row: OnRow | None = None,
    share: Share = ALL,
) -> Counts:
    """Asks every example under every method, the shortest first; one that fails is recorded, and the others go on.

    Args:
        limit: examples of each method, spread over all there are; None for all.
        share: of the examples, that this process asks; the counts are of these.

    Raises:
        UnsupportedModelError: a method does not take the model.
        ValueError: the task does not take a method.
    """
    for method in methods:
        task.check(method)
    examples = share.of(sorted(spread(list(task.examples()), limit), key=lambda example: example.tokens))
    pending = {
        method: [example for example in examples if (method.name, example.name) not in results.done]
        for method in methods
    }
    total = len(examples) * len(methods)
    before = done = total - sum(map(len, pending.values()))
    failed = 0
    for method, left in pending.items():
        if not left:
            continue
        with subject.under(method) as asked:
            for batch in batches(left, subject.batch_size):
                for row in _rows(task, method, batch, asked, facts):
                    results.add(row)
                    done, failed = done + 1, failed + (row.error is not None)
                    if on_row is not None:
                        on_row(row, done, total)
    return Counts(before, done - before - failed, failed)


def spread(examples: Sequence[Example], limit: int | None) -> list[Example]:
    """At most `limit` examples, evenly from all: the first of them would be the shortest alone."""
    if limit is None or limit >= len(examples):
        return list(examples)
    return [examples[i * len(examples) // limit] for i in range(limit)]


def _rows(task: Task, method: Method, examples: Sequence[Example], subject: Subject, facts: Facts) -> Iterator[Row]:
    """Of a batch: all together, or one by one if that fails, to find the one that does."""
    began = perf_counter()
    outcomes: list[Outcome] | None = None
    problem: str | None = None
    try:
        outcomes = task.outcomes(examples, subject)
    except Exception as error:
        problem = _recorded(error)
    if outcomes is None and len(examples) > 1:
        for example in examples:
            yield from _rows(task, method, [example], subject, facts)
        return
    seconds = round((perf_counter() - began) / len(examples), 3)
    for i, example in enumerate(examples):
        outcome = None if outcomes is None else outcomes[i]
        yield Row(
            task=task.name,
            version=task.version,
            method=method.name,
            example=example.name,
            cell=example.cell,
            prompt_tokens=None if outcome is None else outcome.prompt_tokens,
            target=None if outcome is None else outcome.target,
            output=None if outcome is None else outcome.output,
            scores={} if outcome is None else outcome.scores,
            seconds=seconds,
            error=problem,
            facts=facts,
        )


def _recorded(error: Exception) -> str:
    """An error as rows hold it. What it held is let go: what ran out of memory is still in its frames."""
    problem = told(error, 500)
    error.__traceback__ = None
    gc.collect()
    return problem
