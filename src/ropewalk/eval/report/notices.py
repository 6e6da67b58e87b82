# SPDX-License-Identifier: Apache-2.0
"""What a reader must know before comparing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ropewalk.eval.methods import UNMODIFIED
from ropewalk.eval.report.series import Series, asked_for, baseline, counts_of, differences, plural
from ropewalk.eval.results import Run


def notices(runs: Sequence[Run], series: Sequence[Series]) -> list[str]:
    """What a reader must know before comparing."""
    return [
        *_damaged(runs),
        *_twice(runs),
        *_different(runs),
        *_unfinished(runs),
        *_failed(series),
        *_as_unmodified(series),
        *_not_compared(series),
    ]


def _damaged(runs: Sequence[Run]) -> Iterator[str]:
    for run in runs:
        if run.damaged:
            more = f", and {len(run.damaged) - 1} more like it" if len(run.damaged) > 1 else ""
            yield f"In {run.folder} a line is left out that cannot be read: {run.damaged[0]}{more}."


def _twice(runs: Sequence[Run]) -> Iterator[str]:
    methods: dict[tuple[str, ...], list[str]] = {}
    for method in dict.fromkeys(method for run in runs for method in run.methods):
        folders = tuple(run.folder for run in runs if method in run.methods)
        if len(folders) > 1:
            methods.setdefault(folders, []).append(method)
    for folders, (first, *more) in methods.items():
        others = f" and {plural(len(more), 'other method')} are" if more else " is"
        yield (
            f"{first}{others} in {len(folders)} folders ({', '.join(folders)}): each is shown for itself, and nothing "
            "is averaged over them."
        )


def _different(runs: Sequence[Run]) -> Iterator[str]:
    names = dict.fromkeys(name for run in runs[1:] for name in differences(runs[0], run))
    if names:
        yield (
            f"The folders differ in {', '.join(names)}: a difference between methods of different folders may come "
            "from that."
        )
    facts = {
        "device": {row.facts.device for run in runs for row in run.rows},
        "dtype": {row.facts.dtype for run in runs for row in run.rows},
    }
    for name, values in facts.items():
        if len(values) > 1:
            yield f"Not all rows were computed with the same {name}: {', '.join(sorted(values))}."


def _unfinished(runs: Sequence[Run]) -> Iterator[str]:
    for run in runs:
        wanted = asked_for(run)
        missing = [f"{method} {count} of {wanted}" for method, (count, _) in counts_of(run).items() if count < wanted]
        if missing:
            yield (
                f"{run.folder} is not finished. Examples so far: {', '.join(missing)}. A mean of all that is there is "
                "no fair comparison before the end."
            )


def _failed(series: Sequence[Series]) -> Iterator[str]:
    failed = sum(len(one.failed) for one in series)
    if failed:
        total = sum(len(one.rows) for one in series)
        yield f"{failed} of {total} examples failed: they have no score, and no mean counts them."


def _as_unmodified(series: Sequence[Series]) -> Iterator[str]:
    """Of methods that this version knows."""
    found: dict[int, list[str]] = {}
    for one in series:
        counts = [row.prompt_tokens for row in one.rows if row.prompt_tokens is not None]
        window = one.run.config.trained_window
        if counts and window and one.known is not None and one.known.changes_nothing(max(counts), window):
            found.setdefault(max(counts), []).append(one.label)
    for longest, labels in found.items():
        yield (
            f"No prompt has more than {longest:,} tokens, and nothing is changed in those by {', '.join(labels)}: they "
            "were read as by the unmodified model."
        )


def _not_compared(series: Sequence[Series]) -> Iterator[str]:
    left = [one.label for one in series if one.method != UNMODIFIED and baseline(one, series) is None]
    if left:
        yield f"Nothing to compare with, for want of one unmodified model asked the same: {', '.join(left)}."
