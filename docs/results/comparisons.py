# SPDX-License-Identifier: Apache-2.0
"""Writes comparisons.md, the figures of the findings that no page has: `python docs/results/comparisons.py`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from statistics import fmean, variance

from ropewalk.eval import report
from ropewalk.eval.report.estimates import Estimate
from ropewalk.eval.report.scores import ALL, Part, scores_of
from ropewalk.eval.report.series import Series, together
from ropewalk.eval.report.tables import Cell, Table
from ropewalk.eval.results import Row

HERE = Path(__file__).parent
# The neighbor window of the short tasks.
NEIGHBORS = 1024
AT_32K = Part("32k", ({"length": 32768},))


def setting(group_size: int, window: int) -> str:
    return f"selfextend(group_size={group_size}, window={window})"


SELFEXTEND = setting(11, 1023)

# Ratios of perplexities: folder, the texts looked at, one method, and those that it is compared with.
OTHERS = (
    "self(capacity=12, rate=0.02, window=1024, grouping='anchored')",
    "self(capacity=16, rate=0.02, window=1024, grouping='distance')",
    "leaky-rerope(factor=11, window=1024)",
    "rerope(window=2048)",
    "yarn(factor=4.0)",
    "infinite(window=8192)",
)
RATIOS: list[tuple[str, Part, str, str]] = [
    *(("perplexity", AT_32K, SELFEXTEND, other) for other in OTHERS),
    ("perplexity-sweep", ALL, setting(4, 4096), setting(8, 2048)),
    ("perplexity-sweep", ALL, setting(4, 4096), setting(4, 1024)),
    ("perplexity-sweep", ALL, setting(32, 512), setting(8, 1024)),
    ("perplexity-sweep", ALL, setting(16, 4096), setting(16, 2048)),
    ("perplexity-sweep", ALL, setting(32, 4096), setting(32, 2048)),
]
# Scores compared with the unmodified model's by the length of the prompt: folder, task, score.
BY_PROMPT = [("longbench", "score"), ("leval", "accuracy"), ("leval", "probability")]
# Where several texts share a length and a depth.
CLUSTERED = ["passkey", "start-passkey", "passkey-sweep", "needle-sweep"]


@cache
def series_of(folder: str) -> dict[str, Series]:
    """The methods of a folder by name."""
    return {one.method: one for one in together([report.read(HERE / folder)])}


def table(caption: str, columns: tuple[str, ...], rows: Iterator[Sequence[object]], note: str = "") -> str:
    cells = tuple(tuple(Cell(str(value)) for value in row) for row in rows)
    return "\n\n".join(report.markdown_table(Table(caption, columns, cells, note)))


def written(its: Estimate | None, scale: float, digits: int) -> str:
    assert its is not None, "nothing to compare"
    assert its.interval is not None, "too few to compare"
    low, high = (f"{scale * end:.{digits}f}" for end in its.interval)
    return f"{scale * its.mean:.{digits}f} [{low}, {high}]"


def ratios() -> Iterator[Sequence[object]]:
    for folder, part, one, other in RATIOS:
        series = series_of(folder)
        score = next(score for score in scores_of("perplexity", [*series.values()]) if score.pooled)
        its = score.difference(series[one], series[other], part)
        yield folder, one, other, written(its, 1, 3), 0 if its is None else its.count


def by_prompt_of(folder: str, name: str, one: Series, which: str) -> tuple[Estimate | None, float, int]:
    """What a method adds to the unmodified model on prompts "past" the trained window, or "within" it; and what that
    has, in percent, on how many."""
    series = series_of(folder)
    score = next(each for each in scores_of(folder, [*series.values()]) if each.name == name)
    plain = {row.example: row for row in series["unmodified"].done}
    window = series["unmodified"].run.config.trained_window
    assert window is not None, "a run of a model whose window is not known"
    pairs = [(row, plain[row.example]) for row in one.done
             if ((row.prompt_tokens or 0) > window) == (which == "past")]  # fmt: skip
    return score.of_pairs(pairs), 100 * fmean(row.scores[name] for _, row in pairs), len(pairs)


def by_prompt() -> Iterator[Sequence[object]]:
    for folder, score in BY_PROMPT:
        for method, one in series_of(folder).items():
            for which in () if method == "unmodified" else ("past", "within"):
                its, theirs, count = by_prompt_of(folder, score, one, which)
                yield folder, score, which, method, f"{theirs:.1f}", written(its, 100, 1), count


def intraclass_correlation(groups: Sequence[Sequence[Sequence[float]]]) -> float:
    """How alike are texts of one cell (one-way analysis of variance), each group of cells around its own mean."""
    between = within = 0.0
    for cells in groups:
        size, mean = len(cells[0]), fmean(value for cell in cells for value in cell)
        among = variance([fmean(cell) for cell in cells]) * size
        inside = fmean(variance(cell) for cell in cells)
        if 0 < mean < 1:
            between += among - inside
            within += among + (size - 1) * inside
    return between / within


def places(folder: str) -> list[list[list[float]]]:
    """Of each method and length the scores of the texts of each depth."""

    def length(row: Row) -> float:
        return float(row.cell["length"])

    def place(row: Row) -> tuple[float, float]:
        return length(row), float(row.cell["depth"])

    return [
        [[row.scores["exact_match"] for row in cell] for _, cell in groupby(its, key=place)]
        for one in series_of(folder).values()
        for _, its in groupby(sorted(one.done, key=place), key=length)
    ]


def icc(folder: str) -> str:
    return f"{intraclass_correlation(places(folder)):.1f}"


def clustered() -> Iterator[Sequence[object]]:
    for folder in CLUSTERED:
        groups = places(folder)
        samples, cells = len(groups[0][0]), len(groups[0])
        correlation = intraclass_correlation(groups)
        yield folder, samples, f"{correlation:.2f}", round(samples * cells / (1 + (samples - 1) * correlation))


def changed() -> Iterator[Sequence[object]]:
    plain, one = series_of("short").values()
    before = {row.example: row for row in plain.done}
    for which in ("longer", "not longer"):
        rows = [row for row in one.done if ((row.prompt_tokens or 0) > NEIGHBORS) == (which == "longer")]
        alike = sum(row.scores == before[row.example].scores for row in rows)
        whole = [row for row in rows if row.cell["task"] != "truthfulqa_mc2"]
        alike_whole = sum(row.scores == before[row.example].scores for row in whole)
        yield which, len(rows), len(rows) - alike, len(whole), len(whole) - alike_whole


def text() -> str:
    parts = [
        "# Comparisons",
        "Figures of the [findings](README.md) that no page has, from the rows: `python docs/results/comparisons.py`. "
        "Brackets hold 95% intervals, from the spread over what was sampled: books, places in texts, documents.",
        table(
            "Perplexity of one method as a part of another's, book by book",
            ("folder", "method", "compared with", "ratio", "books"),
            ratios(),
        ),
        table(
            "Prompts past the trained window, and within it",
            ("folder", "score", "prompts", "method", "unmodified", "difference", "n"),
            by_prompt(),
            "In percentage points; a difference is to the unmodified model, prompt by prompt.",
        ),
        table(
            "How alike texts of one length and depth are",
            ("folder", "texts a place", "intraclass correlation", "independent, a length"),
            clustered(),
            "Independent: so many texts at places of their own would say as much of other places.",
        ),
        table(
            f"Short prompts whose score SelfExtend changes, by whether they are longer than its window of {NEIGHBORS}",
            ("prompts", "n", "changed", "n without TruthfulQA", "changed of those"),
            changed(),
        ),
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    (HERE / "comparisons.md").write_text(text())
