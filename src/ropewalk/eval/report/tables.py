# SPDX-License-Identifier: Apache-2.0
"""Tables as plain data; and those of failures, and of how the results were made."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from ropewalk.eval.report.series import Series, asked_for, counts_of, plain, plural
from ropewalk.eval.results import Run

_MESSAGES = 10


@dataclass(frozen=True)
class Cell:
    """A cell: what it says, smaller what belongs to that, and a mark."""

    text: str
    details: tuple[str, ...] = ()
    mark: str = ""


@dataclass(frozen=True)
class Table:
    """A table; the first cell of each row names it.

    Attributes:
        kind: what it looks like.
        groups: of the columns from the second on, from the left: what each is called, and how many columns it has.
        has_summary: whether the last column is over all the others.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    kind: Literal["scores", "failures", "made"] = "scores"
    groups: tuple[tuple[str, int], ...] = ()
    has_summary: bool = False


def failure_table(series: Sequence[Series]) -> Iterator[Table]:
    """One of the most frequent messages, if there are any; those that differ in numbers alone are counted together."""
    counts: Counter[tuple[str, str]] = Counter()
    first: dict[tuple[str, str], str] = {}
    for one in series:
        for row in one.failed:
            kind = one.label, re.sub(r"\d+(\.\d+)?", "#", row.error or "")
            counts[kind] += 1
            first.setdefault(kind, row.error or "")
    if not counts:
        return
    failed = {one.label: f"{len(one.failed)} of {len(one.rows)}" for one in series}
    kept = counts.most_common(_MESSAGES)
    rows = [(Cell(kind[0]), Cell(failed[kind[0]]), Cell(str(count)), Cell(first[kind])) for kind, count in kept]
    rest = sum(counts.values()) - sum(count for _, count in kept)
    note = "Messages that differ in numbers alone are counted together, under the first of them."
    if rest:
        note += f" {rest} more examples failed with rarer messages."
    columns = ("method", "failed in all", "with this message", "message")
    yield Table("Failed examples", columns, tuple(rows), note, "failures")


def made_table(run: Run) -> Table:
    """How a run was made. What changed on the way has all its values, each with its rows."""
    config, facts = run.config, [row.facts for row in run.rows]
    versions = [", ".join(f"{name} {version}" for name, version in sorted(one.versions.items())) for one in facts]
    counts = [
        f"{method}: {count} of {asked_for(run)}{f', {failed} of them failed' if failed else ''}"
        for method, (count, failed) in counts_of(run).items()
    ]
    pairs = [
        ("model", config.model),
        ("hash of the weights", config.model_hash or "none"),
        *(
            (f"hash of the {name}", its)
            for name, its in (("configuration", config.config_hash), ("tokenizer", config.tokenizer_hash))
            if its
        ),
        ("device", _all([one.device for one in facts])),
        ("dtype", _all([one.dtype for one in facts])),
        ("trained window", f"{config.trained_window:,} tokens" if config.trained_window else "not recorded"),
        ("versions", _all(versions)),
        ("commit", _all([one.commit or "none" for one in facts])),
        ("seed", str(config.seed)),
        ("task", f"{config.task}, version {config.version}"),
        *((f"setting: {name}", plain(value)) for name, value in config.settings.items()),
        *(("rows", count) for count in counts),
        ("time in all", _duration(sum(row.seconds for row in run.rows))),
    ]
    return Table(run.folder, ("what", "value"), tuple((Cell(name), Cell(value)) for name, value in pairs), kind="made")


def _all(values: Sequence[str]) -> str:
    counts = Counter(values)
    if len(counts) == 1:
        return values[0] or "none"
    return "; ".join(f"{value or 'none'} ({plural(count, 'row')})" for value, count in counts.most_common())


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
