# SPDX-License-Identifier: Apache-2.0
"""Writes README.md, the findings, from findings.md.jinja and the rows: `python docs/results/findings.py`.

Every measured figure of the findings is an expression there. What is said of it in words, `is_` more, less or alike, is
held to its interval, so that no sentence and no heading says what its interval does not support.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from comparisons import SELFEXTEND, by_prompt_of, icc, series_of, setting
from jinja2 import Environment, StrictUndefined

from ropewalk.eval.report.estimates import Estimate, average, power
from ropewalk.eval.report.scores import ALL, TASK, Part, Score, average_of, scores_of, values_of
from ropewalk.eval.report.series import Series

HERE = Path(__file__).parent
Verdict = Literal["more", "less", "alike", ""]
FOLDERS = sorted(config.parent.name for config in HERE.glob("*/config.json"))
_K = 1024
# The score of each short task that its leaderboard took.
SHORT = {
    "arc_challenge": "acc_norm",
    "hellaswag": "acc_norm",
    "mmlu": "acc",
    "truthfulqa_mc2": "acc",
    "gsm8k": "exact_match,strict-match",
}


def series(folder: str, name: str) -> Series:
    """The method of that name, or the only one that begins so."""
    found = series_of(folder)
    fitting = [one for method, one in found.items() if method == name or method.startswith(f"{name}(")]
    if len(fitting) != 1:
        raise ValueError(f"{name!r} is not one of {', '.join(found)}")
    return fitting[0]


def score_of(folder: str, name: str = "") -> Score:
    """A score of a folder; without a name the one that its task names first."""
    every = [*series_of(folder).values()]
    return next(one for one in scores_of(every[0].run.config.task, every) if name in ("", one.name))


def part_of(folder: str, score: Score, k: int | None = None, digits: int | None = None, task: str = "") -> Part:
    """Texts of so many times 1,024 tokens, keys of so many digits, a task; or all, of several tasks their average."""
    for name, its in (("length", k and k * _K), ("digits", digits), (TASK, task)):
        if its:
            return Part("", ({name: its},))
    every = [*series_of(folder).values()]
    tasks = [Part("", ({TASK: each},)) for each in values_of(TASK, every)]
    there = [each.cells[0] for each in tasks if any(score.of(one, each) for one in every)]
    return average_of(there) if there else ALL


def said(its: Estimate | None, same: float, is_: Verdict) -> Estimate:
    """Raises ValueError: the interval does not support what is said."""
    if its is None or its.interval is None:
        raise ValueError("too few to compare")
    low, high = its.interval
    if is_ and not {"more": low > same, "less": high < same, "alike": low <= same <= high}[is_]:
        raise ValueError(f"{its.mean:g} [{low:g}, {high:g}] is not {is_} than {same:g}")
    return its


def written(its: Estimate, write: Callable[[float], str], brackets: bool) -> str:
    assert its.interval is not None, "checked where it was compared"
    return write(its.mean) + (f" [{', '.join(map(write, its.interval))}]" if brackets else "")


def value(
    folder: str, name: str, k: int | None = None, *, score: str = "", brackets: bool = False, **where: Any
) -> str:
    """A method's score of texts of so many times 1,024 tokens, or elsewhere (`part_of`)."""
    of = score_of(folder, score)
    return written(said(of.of(series(folder, name), part_of(folder, of, k, **where)), 0, ""), of.write, brackets)


def hits(folder: str, name: str, *ks: int) -> str:
    """How many keys were found of those asked, in texts of these lengths or in all."""
    of = score_of(folder)
    there = [said(of.of(series(folder, name), part_of(folder, of, k)), 0, "") for k in ks or [None]]
    return f"{round(sum(its.mean * its.count for its in there))} of {sum(its.count for its in there)}"


def difference(
    folder: str,
    one: str,
    other: str = "unmodified",
    k: int | None = None,
    *,
    score: str = "",
    is_: Verdict = "",
    brackets: bool = True,
    **where: Any,
) -> str:
    """By how much a method is above another one, example by example."""
    of = score_of(folder, score)
    its = of.difference(series(folder, one), series(folder, other), part_of(folder, of, k, **where))
    return written(said(its, 0, is_), of.write_difference, brackets)


def _ratio(folder: str, one: str, other: str, k: int, other_k: int | None, is_: Verdict) -> Estimate:
    """Of perplexities; on the same tokens also where less text is read before them."""
    its, mine, theirs = score_of(folder), series(folder, one), series(folder, other)
    before = {(row.cluster, row.cell["length"]): row for row in theirs.done}
    rows = mine.done_in({"length": k * _K})
    return said(its.of_pairs([(row, before[row.cluster, (other_k or k) * _K]) for row in rows]), 1, is_)


def ratio(folder: str, one: str, other: str, k: int, other_k: int | None = None, is_: Verdict = "") -> str:
    """How many times another method's perplexity, book by book; read after so much text or so much less."""
    return written(_ratio(folder, one, other, k, other_k, is_), "{:.3f}".format, True)


def cost(
    folder: str,
    one: str,
    other: str,
    k: int,
    other_k: int | None = None,
    is_: Verdict = "more",
    brackets: bool = True,
) -> str:
    """The same in percent; what is gained where it is said to be less."""
    way = -100 if is_ == "less" else 100
    its = _ratio(folder, one, other, k, other_k, is_)
    assert its.interval is not None, "checked where it was compared"
    ends = sorted(way * (end - 1) for end in its.interval)
    return f"{way * (its.mean - 1):.0f}%" + (f" [{ends[0]:.0f}, {ends[1]:.0f}]" if brackets else "")


def prompts(folder: str, score: str, name: str, which: str, is_: Verdict = "") -> str:
    """The difference to the unmodified model on prompts "past" the trained window or "within" it, in points."""
    its, _, _ = by_prompt_of(folder, score, series(folder, name), which)
    return written(said(its, 0, is_), lambda value: f"{100 * value:+.1f}", True)


def prompt_counts(folder: str, which: str) -> int:
    its, _, _ = by_prompt_of(folder, score_of(folder).name, [*series_of(folder).values()][1], which)
    return 0 if its is None else its.count


def power_of(folder: str, one: str, other: str = "unmodified", k: int | None = None) -> tuple[str, str]:
    """The least true difference that four of five such experiments would tell from none, and how many examples would
    tell 0.05."""
    of = score_of(folder)
    apart = said(of.difference(series(folder, one), series(folder, other), part_of(folder, of, k)), 0, "")
    found = power(apart, 0.05, ratio=False)
    assert found is not None, "spread is known"
    return of.write(found[0]), f"{round(found[1], -2):,.0f}"


def start(tokens: int) -> str:
    """SelfExtend as it was run with `start`."""
    return f"selfextend({f'start={tokens}, ' if tokens else ''}group_size=8, window=1024)"


def short_mean() -> str:
    """What SelfExtend adds on average of the tasks that have options, in points."""
    folder, one, other = "short", *series_of("short").values()
    chosen = [(score_of(folder, name), task) for task, name in SHORT.items() if task != "gsm8k"]
    parts = [score.difference(other, one, part_of(folder, score, task=task)) for score, task in chosen]
    its = average([said(each, 0, "") for each in parts])
    said(its, 0.01, "less")
    said(its, -0.01, "more")
    return written(its, chosen[0][0].write_difference, True)


def chance() -> float:
    """Of the exams, in percent: one of two or of four options."""
    return 100 * fmean(1 / 2 if exam == "sci_fi" else 1 / 4 for exam in values_of(TASK, [*series_of("leval").values()]))


def at_chance(name: str) -> str:
    of = score_of("leval")
    return written(said(of.of(series("leval", name), part_of("leval", of)), chance() / 100, "alike"), of.write, True)


def rows(folder: str) -> int:
    return sum(len(one.rows) for one in series_of(folder).values())


def asked(folder: str) -> int:
    """Examples of each method."""
    return rows(folder) // len(series_of(folder))


def version(package: str) -> str:
    """That all rows were made with."""
    [its] = {
        row.facts.versions[package] for folder in FOLDERS for one in series_of(folder).values() for row in one.rows
    }
    return ".".join(its.split(".")[:2])


def in_lines(paragraph: str) -> str:
    """Text in lines of one width; headings, pictures and tables as they are."""
    if paragraph.lstrip()[:1] in "#!<|":
        return paragraph
    parts = re.split(r"\n(?=- )", paragraph)
    return "\n".join(
        textwrap.fill(part, 120, subsequent_indent="  " * part.startswith("- "), break_long_words=False,
                      break_on_hyphens=False)
        for part in parts
    )  # fmt: skip


def text() -> str:
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True)
    template = environment.from_string((HERE / "findings.md.jinja").read_text(encoding="utf-8"))
    found = template.render(
        value=value, hits=hits, difference=difference, ratio=ratio, cost=cost, prompts=prompts, power=power_of, icc=icc,
        prompt_counts=prompt_counts, start=start, short_mean=short_mean, SHORT=SHORT, G=setting, SE=SELFEXTEND,
        at_chance=at_chance, chance=chance, rows=rows, asked=asked, version=version,
    )  # fmt: skip
    return "\n\n".join(map(in_lines, re.split(r"\n\n+", found.strip()))) + "\n"


if __name__ == "__main__":
    (HERE / "README.md").write_text(text(), encoding="utf-8")
