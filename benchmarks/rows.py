# SPDX-License-Identifier: Apache-2.0
"""What a benchmark stores and prints: one row a measurement, JSON lines, with where and by what it was measured."""

from __future__ import annotations

import dataclasses
import json
import platform
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Literal

import torch
from rich.table import Table

import ropewalk
from ropewalk.eval.commit import commit_of

# plain: attention at true positions, what the map is compared with. composition: the map put together from plain
# kernels, as one would without this package. ropewalk: ours.
Kind = Literal["plain", "composition", "ropewalk"]


@dataclass(frozen=True)
class Facts:
    """Where and by what rows were measured. Versions are empty where a package is absent."""

    device: str
    torch: str
    cuda: str
    cudnn: str
    triton: str
    flash_attn_4: str
    flash_attn: str
    transformers: str
    ropewalk: str
    commit: str
    command: str
    date: str


@dataclass(frozen=True, kw_only=True)
class Row:
    """One implementation on one case. A row without times says in `error` why there are none.

    Attributes:
        case: name of the case; rows of one case were measured in turn with each other.
        work: prefill (as many queries as keys), chunk (the queries are the last keys), decode (one query), or a whole
            model's.
        map: the position map; for plain attention "true positions".
        ships_with_torch: whether torch alone runs it.
        timing: "eager" calls include what the host costs; "graph" replays a captured CUDA graph, which does not. For a
            whole model, the kind of cache.
        samples: calls or runs of several calls behind the percentiles.
        rate: counts the causal half of the products (TFLOP/s), or keys and values read once (GB/s).
        ratio: median of the fastest plain attention over this median: above 1 is faster than plain.
        ratio_low, ratio_high: the same of single rounds, the lowest and the highest.
        ratio_to_torch: to the fastest plain attention that ships with torch.
        peak_bytes: device memory that a call takes at most beside its inputs, its output and kept tables included.
        relative_error: against the float32 reference, over sampled queries.
    """

    case: str
    work: str
    batch: int
    heads: int
    key_heads: int
    head_dim: int
    queries: int
    keys: int
    dtype: str
    map: str
    impl: str
    kind: Kind
    ships_with_torch: bool = False
    timing: str = "eager"
    ms_p20: float | None = None
    ms_p50: float | None = None
    ms_p80: float | None = None
    samples: int = 0
    rate: float | None = None
    rate_unit: str = ""
    fastest_plain: str = ""
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    fastest_in_torch: str = ""
    ratio_to_torch: float | None = None
    peak_bytes: int | None = None
    relative_error: float | None = None
    error: str = ""
    facts: Facts | None = None


@dataclass(frozen=True)
class Samples:
    """Milliseconds of one implementation, by round."""

    rounds: tuple[tuple[float, ...], ...]

    @property
    def all(self) -> list[float]:
        return [ms for one in self.rounds for ms in one]

    @property
    def median(self) -> float:
        return median(self.all)

    def percentile(self, percent: float) -> float:
        """Linear between the samples next to it."""
        ordered = sorted(self.all)
        at = (len(ordered) - 1) * percent / 100
        below = int(at)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (at - below) * (ordered[above] - ordered[below])


def with_times(row: Row, samples: Samples, work_done: float, unit: str) -> Row:
    """The row with its percentiles and its rate. `work_done` is in units of `unit` times a second."""
    return dataclasses.replace(
        row,
        ms_p20=samples.percentile(20),
        ms_p50=samples.median,
        ms_p80=samples.percentile(80),
        samples=len(samples.all),
        rate=work_done / (samples.median / 1e3) if unit else None,
        rate_unit=unit,
    )


def with_ratios(timed: Sequence[tuple[Row, Samples]]) -> list[Row]:
    """Rows that were measured in turn, each with its ratios to the fastest plain attention among them."""
    plain = [(row.impl, row.ships_with_torch, samples) for row, samples in timed if row.kind == "plain"]
    fastest = min(plain, key=lambda one: one[2].median, default=None)
    in_torch = min((one for one in plain if one[1]), key=lambda one: one[2].median, default=None)
    rows = []
    for row, samples in timed:
        if fastest is not None:
            by_round = [
                median(theirs) / median(ours)
                for theirs, ours in zip(fastest[2].rounds, samples.rounds, strict=True)
                if theirs and ours
            ]
            row = dataclasses.replace(
                row,
                fastest_plain=fastest[0],
                ratio=fastest[2].median / samples.median,
                ratio_low=min(by_round),
                ratio_high=max(by_round),
            )
        if in_torch is not None:
            row = dataclasses.replace(
                row, fastest_in_torch=in_torch[0], ratio_to_torch=in_torch[2].median / samples.median
            )
        rows.append(row)
    return rows


def append(rows: Iterable[Row], path: Path | None) -> None:
    """Adds rows to a file as they come, so that a run that breaks off keeps what it has."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for row in rows:
            file.write(json.dumps(dataclasses.asdict(row)) + "\n")


def read(path: Path) -> list[Row]:
    """Rows of a file; where a measurement was repeated, the last one."""
    latest: dict[tuple[str, str, str, str, str], Row] = {}
    for line in path.read_text().splitlines():
        fields = json.loads(line)
        facts = fields.pop("facts", None)
        row = Row(**fields, facts=None if facts is None else Facts(**facts))
        latest[row.case, row.map, row.impl, row.kind, row.timing] = row
    return list(latest.values())


def table(rows: Iterable[Row], title: str = "") -> Table:
    """The rows for a terminal."""
    shown = Table(
        "case", "map", "impl", "timing", "ms p50", "p20-p80", "rate", "ratio", "rounds", "to torch's", "peak", "error",
        title=title or None,
    )  # fmt: skip
    for row in rows:
        shown.add_row(*_cells(row), style="bold" if row.kind == "ropewalk" else None)
    return shown


def line(row: Row) -> str:
    """The row as one line of text."""
    return "  ".join(cell for cell in _cells(row) if cell)


def markdown(rows: Iterable[Row]) -> str:
    """The rows that are ours, as a table for the docs. Of decode the replayed graphs, not what the host costs."""
    lines = [
        "| case | map | ms (p20-p80) | rate | fastest plain | ratio (rounds) | to torch's own | peak MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row.kind != "ropewalk" or row.ms_p50 is None or (row.work == "decode" and row.timing != "graph"):
            continue
        _, map_, _, timing, *numbers = _cells(row)
        ms, spread, rate, ratio, rounds, to_torch, peak, _ = numbers
        case = f"{row.case}, {timing}" if row.work.startswith("model") else row.case
        best = row.fastest_plain if not row.rate else f"{row.fastest_plain}, {row.rate / (row.ratio or 1):.0f}"
        lines.append(
            f"| {case} | {map_} | {ms} ({spread}) | {rate} | {best} | {ratio} ({rounds}) | {to_torch} "
            f"| {peak.removesuffix(' MiB')} |"
        )
    return "\n".join(lines) + "\n"


def _cells(row: Row) -> list[str]:
    start = [row.case, row.map, row.impl, row.timing]
    if row.ms_p50 is None:
        return [*start, "", "", "", "", "", "", "", row.error[:60]]
    digits = 4 if row.ms_p50 < 1 else 2
    return [
        *start,
        f"{row.ms_p50:.{digits}f}",
        f"{row.ms_p20:.{digits}f}-{row.ms_p80:.{digits}f}",
        "" if row.rate is None else f"{row.rate:.0f} {row.rate_unit}",
        "" if row.ratio is None else f"{row.ratio:.3f}",
        "" if row.ratio_low is None else f"{row.ratio_low:.3f}-{row.ratio_high:.3f}",
        "" if row.ratio_to_torch is None else f"{row.ratio_to_torch:.3f}",
        "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f} MiB",
        "" if row.relative_error is None else f"{row.relative_error:.1e}",
    ]


def facts(device: torch.device, given_commit: str = "") -> Facts:
    """Of this machine, this process and this checkout."""
    return Facts(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        torch=torch.__version__,
        cuda=torch.version.cuda or "",
        cudnn=str(torch.backends.cudnn.version() or ""),
        triton=_version("triton"),
        flash_attn_4=_version("flash-attn-4"),
        flash_attn=_version("flash-attn"),
        transformers=_version("transformers"),
        ropewalk=ropewalk.__version__,
        commit=given_commit or commit(),
        # Of a path of this machine the name alone: the rest says nothing elsewhere.
        command=" ".join(["python", *(Path(word).name if Path(word).is_absolute() else word for word in sys.argv)]),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def commit() -> str:
    """Of this checkout."""
    return commit_of(Path(__file__), "*.py", "../src") or "unknown"


def processor() -> str:
    """The processor's name."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for entry in information.read_text().splitlines():
            if entry.startswith("model name"):
                return entry.split(":", 1)[1].strip()
    return platform.processor()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
