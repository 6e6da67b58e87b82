# SPDX-License-Identifier: Apache-2.0
"""Runs a task under several methods, one row an example as it goes; what is in the folder already is not run again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter
from traceback import clear_frames
from typing import Any

from pydantic import ValidationError

from ropewalk.eval.commit import commit_of
from ropewalk.eval.messages import in_one_line
from ropewalk.eval.methods import Method
from ropewalk.eval.results import Config, Facts, Results, Row, Run
from ropewalk.eval.subjects import Subject
from ropewalk.eval.tasks.base import Example, Outcome, PreparedTask, Task, spread

# Called after each example with its row, and the examples done and to be done in all.
OnRow = Callable[[Row, int, int], None]


@dataclass(frozen=True)
class Counts:
    """Examples of a run.

    Attributes:
        failures: the first example that failed with each message, and how many did.
    """

    done_before: int
    done: int
    failed: int
    failures: list[tuple[Row, int]] = field(default_factory=list)


class MethodError(ValueError):
    """A method that cannot be run, in one line for users.

    Attributes:
        problem: what is wrong, without what can be done where methods can be chosen.
    """

    def __init__(self, problem: str, otherwise: str = "") -> None:
        super().__init__(f"{problem}: {otherwise}" if otherwise else problem)
        self.problem = problem


def config_of(
    task: Task, methods: Sequence[Method], subject: Subject, seed: int, trained_window: int | None = None
) -> Config:
    return Config(
        **_origin(task, subject, seed),
        settings=task.settings,
        methods=tuple(method.name for method in methods),
        trained_window=trained_window,
        examples=sum(1 for _ in task.examples()),
    )


def facts_of(task: Task, subject: Subject, seed: int) -> Facts:
    """Of this process."""
    from ropewalk.integrations.transformers.versions import versions

    return Facts(
        **_origin(task, subject, seed),
        dtype=subject.dtype,
        device=subject.device,
        batch_size=subject.batch_size,
        commit=commit_of(Path(__file__), "../.."),
        versions=versions(),
    )


def _origin(task: Task, subject: Subject, seed: int) -> dict[str, Any]:
    weights, config, tokenizer = subject.hashes
    return {"task": task.name, "version": task.version, "model": subject.name, "model_hash": weights,
            "config_hash": config, "tokenizer_hash": tokenizer, "seed": seed}  # fmt: skip


def check(methods: Sequence[Method], subject: Subject, longest: int | None, trained_window: int) -> list[str]:
    """Tries every method on the model, before the first of them is asked anything: so nobody waits for what is refused
    in the end.

    Args:
        longest: tokens of the longest text, its answer included; None where all fit the trained window.

    Returns:
        What whoever runs them should know: methods that change nothing in texts of that length; and methods of a sweep
        that do not reach that far, whose examples will fail.

    Raises:
        MethodError: a method does not take the model, or does not reach the longest text and is in no sweep.
    """
    short = []
    for method in methods:
        problem = "" if longest is None else method.falls_short(longest, trained_window)
        if problem and not method.swept:
            raise MethodError(
                problem,
                "choose other parameters or shorter texts, or write a set, such as {4} for 4, to have what it does not "
                "reach fail",
            )
        short += [problem] if problem else []
        try:
            with subject.under(method):
                pass
        except ValueError as error:
            raise MethodError(f"method {method.name}: {error}") from error
    more = f", and {len(short) - 1} more of a sweep like it" if len(short) > 1 else ""
    notes = [f"{problem}{more}: what they do not reach fails" for problem in short[:1]]
    reach = trained_window if longest is None else longest
    if idle := [method.name for method in methods if method.changes_nothing(reach, trained_window)]:
        notes.append(
            f"no text has more than {reach} tokens, and on a trained window of {trained_window} nothing is changed in "
            f"those by {', '.join(idle)}: expect what unmodified gives"
        )
    return notes


def run(
    task: Task, methods: Sequence[Method], subject: Subject, results: Results, facts: Facts, on_row: OnRow | None = None
) -> Counts:
    """Asks every example of this process's share under every method, the shortest first; one that fails is recorded,
    and the others go on.

    Returns:
        Counts of the share.

    Raises:
        UnsupportedModelError: a method does not take the model.
        OSError: a row cannot be written; those before it are.
    """
    wanted = spread(list(task.examples()), results.limit)
    examples = results.share.of(sorted(wanted, key=lambda example: example.tokens))
    pending = {
        method: [example for example in examples if (method.name, example.name) not in results.done]
        for method in methods
    }
    total = len(examples) * len(methods)
    before = done = total - sum(map(len, pending.values()))
    failed: list[Row] = []
    for method, left in pending.items():
        if not left:
            continue
        with subject.under(method) as asked:
            for batch in task.batches(left, subject.batch_size):
                for row in _rows(task, method, batch, asked, facts):
                    results.add(row)
                    done += 1
                    if row.error is not None:
                        failed.append(row)
                    if on_row is not None:
                        on_row(row, done, total)
    first = {(row.method, row.error): row for row in reversed(failed)}
    counts = Counter((row.method, row.error) for row in failed)
    failures = [(first[kind], count) for kind, count in counts.most_common()]
    return Counts(before, done - before - len(failed), len(failed), failures)


def rescore(task: Task, run: Run, subject: Subject, facts: Facts) -> list[Row]:
    """The rows of a run with the scores that the task now gives to their outputs; nothing is asked. Those that failed
    are left out.

    Args:
        run: of the same settings, under another version of the task or the same.
        facts: of this process. The rows keep theirs, which say where they were computed; beside it, by what they were
            scored again.

    Raises:
        ValueError: a row does not keep what its score is of, or the task now asks something else: ask again.
    """
    if not isinstance(task, PreparedTask):
        raise ValueError(f"the scores of {task.name} are not of the rows alone: ask again")
    examples = {example.name: example for example in task.examples()}
    rows = []
    for row in run.rows:
        if row.error is not None:
            continue
        if (example := examples.get(row.example)) is None:
            raise ValueError(f"{row.example} of {run.folder} is no example of {task.name} any more: ask again")
        its = task.again(example, row.output or "", subject)
        if (its.prompt_tokens, its.target, example.cell) != (row.prompt_tokens, row.target, row.cell):
            raise ValueError(f"{row.example} of {run.folder} was asked otherwise than {task.name} does now: ask again")
        commit = f"{row.facts.commit}, scored again by {facts.commit}"
        since = row.facts.model_copy(update={"version": task.version, "commit": commit})
        cluster = example.cluster or task.cluster_of(example.name)
        rows.append(row.model_copy(update={"scores": its.scores, "cluster": cluster, "facts": since}))
    return rows


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
    # Of what failed there is nothing but the error.
    known: list[dict[str, Any]] = [{}] * len(examples) if outcomes is None else [*map(vars, outcomes)]
    for example, its in zip(examples, known, strict=True):
        cluster = example.cluster or task.cluster_of(example.name)
        row = partial(Row, method=method.name, example=example.name, cluster=cluster, cell=example.cell,
                      seconds=seconds, facts=facts)  # fmt: skip
        try:
            yield row(error=problem, **its)
        except ValidationError as error:  # such as a score that is no number
            yield row(error=_recorded(error))


def _recorded(error: Exception) -> str:
    """An error as rows hold it. What it held is let go: what ran out of memory is still in its frames, and in those of
    the errors before it."""
    link: BaseException | None = error
    while link is not None:
        clear_frames(link.__traceback__)
        link = link.__context__
    return in_one_line(error, 500)
