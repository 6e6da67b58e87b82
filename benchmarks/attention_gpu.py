# SPDX-License-Identifier: Apache-2.0
"""GPU attention under a position map, as a ratio to the fastest plain attention of the same run.

Each case is one problem: plain attention by every kernel that can be had, and each map by each implementation, timed
in turn, round after round. A row is one implementation on one case. "ratio" is the time of the fastest plain attention
over the row's time, so 0.92 is 8% slower than plain. An implementation that cannot run a case, or whose output is
wrong, has a row that says so and no times.

    python benchmarks/attention_gpu.py --output benchmarks/results/attention_gpu.jsonl --plot-to docs/attention_gpu.png
    python benchmarks/attention_gpu.py --only prefill-32k,decode --impl auto,flash --quick
    python benchmarks/attention_gpu.py --plot benchmarks/results/attention_gpu.jsonl docs/attention_gpu.png
    python benchmarks/attention_gpu.py --table benchmarks/results/attention_gpu.jsonl

Prefill and chunks are timed call by call on a cleared cache. Decode runs over several sets of keys, more than the cache
holds, as consecutive calls ("eager", which includes what the host costs) and as one CUDA graph of them ("graph").
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import peers
import rows
import timing
import torch
import typer
from drawing import draw
from peers import Implementation
from rich.console import Console
from rows import Row
from timing import Contestant, Flush
from torch import Tensor

from ropewalk.maps import SELF, Identity, LeakyReRoPE, PositionMap, ReRoPE, SelfExtend
from ropewalk.ops import Rotary, attention

K = 1024
WINDOW = 1024
MAPS: dict[str, PositionMap] = {
    "selfextend": SelfExtend(8, WINDOW),
    "self-anchored": SELF(16, 0.02, WINDOW),
    "self-distance": SELF(16, 0.02, WINDOW, "distance"),
    "rerope": ReRoPE(WINDOW),
    "leaky-rerope": LeakyReRoPE(8, WINDOW),
}

# A query is this much longer than a key: scores then have a deviation of 2, so that some keys count far more than
# others and an error in where a key is thought to be shows.
_QUERY_SCALE = 2.0
_THETA = 5e5

# Largest ||output - reference|| / ||reference||. The roundings of bfloat16 (query, key, weights and output: up to 2^-9
# each, some of them twice where keys are turned) came to 0.002 to 0.006; a window off by one token is far over it.
ERROR_BOUNDS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4}
_SAMPLED_BLOCKS, _SAMPLED_QUERIES = 8, 8


@dataclass(frozen=True)
class Case:
    """One problem: plain attention of its shape, and the maps to compute on it.

    Args:
        flex: whether FlexAttention takes part by default. It is compiled anew for every shape, which takes longer than
            all the rest, and is nowhere the fastest.
    """

    work: str
    queries: int
    keys: int
    maps: tuple[str, ...] = ("selfextend",)
    batch: int = 1
    heads: int = 32
    key_heads: int = 8
    head_dim: int = 128
    flex: bool = True

    @property
    def name(self) -> str:
        """Its parts, joined by dashes, are what `--only` selects by."""
        shape = f"h{self.heads}x{self.key_heads}-d{self.head_dim}"
        if self.work == "prefill":
            return f"prefill-{shape}-{_length(self.keys)}"
        if self.work == "chunk":
            return f"chunk-{shape}-{_length(self.queries)}-on-{_length(self.keys - self.queries)}"
        return f"decode-b{self.batch}-{shape}-{_length(self.keys)}"

    @property
    def visible_keys(self) -> int:
        """Keys that the queries see, all together."""
        return self.queries * (self.keys - self.queries) + self.queries * (self.queries + 1) // 2

    @property
    def tera_operations(self) -> float:
        return 4e-12 * self.batch * self.heads * self.visible_keys * self.head_dim

    def key_bytes(self, itemsize: int) -> int:
        """Bytes of keys and values."""
        return 2 * self.batch * self.key_heads * self.keys * self.head_dim * itemsize


def _length(tokens: int) -> str:
    return f"{tokens // K}k" if tokens % K == 0 else str(tokens)


LENGTHS = (16 * K, 32 * K, 64 * K, 128 * K)
CASES: tuple[Case, ...] = (
    *(Case("prefill", n, n, tuple(MAPS) if n == 32 * K else ("selfextend",)) for n in LENGTHS),
    *(Case("prefill", n, n, key_heads=32, flex=n == 32 * K) for n in LENGTHS),
    Case("prefill", 32 * K, 32 * K, heads=9, key_heads=3, head_dim=64),
    Case("chunk", 2 * K, 66 * K),
    *(Case("decode", 1, n, batch=batch, flex=n == 32 * K) for batch in (1, 8) for n in LENGTHS),
)
QUICK = ("prefill-h32x8-d128-32k", "chunk", "decode-b1-32k", "decode-b8-32k")
# Every code path in seconds on a CPU; of no use as a measurement.
TINY: tuple[Case, ...] = (
    Case("prefill", 512, 512, tuple(MAPS), heads=4, key_heads=2, head_dim=64),
    Case("chunk", 128, 640, heads=4, key_heads=2, head_dim=64),
    Case("decode", 1, 640, batch=2, heads=4, key_heads=2, head_dim=64),
)
TINY_MAPS: dict[str, PositionMap] = {
    "selfextend": SelfExtend(4, 64),
    "self-anchored": SELF(5, 0.05, 64),
    "self-distance": SELF(5, 0.05, 64, "distance"),
    "rerope": ReRoPE(64),
    "leaky-rerope": LeakyReRoPE(4, 64),
}


def selected(cases: Iterable[Case], patterns: Sequence[str]) -> list[Case]:
    """Cases whose name holds every part of one of the patterns: "decode-b1-32k" has three."""
    if not patterns:
        return list(cases)
    return [case for case in cases if any(set(p.split("-")) <= set(case.name.split("-")) for p in patterns)]


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Args:
        impls: of `ropewalk.ops.attention`.
        peers: text in the names of the plain implementations to run; empty for all.
        all_flex: whether FlexAttention takes part in every case.
        case_seconds: a case that would be timed for longer has fewer rounds.
    """

    device: torch.device
    dtype: torch.dtype
    impls: tuple[str, ...]
    peers: tuple[str, ...]
    rounds: int
    turn_ms: float
    case_seconds: float
    maps: dict[str, PositionMap]
    all_flex: bool = False


@dataclass
class Ready:
    """An implementation that ran and was right."""

    implementation: Implementation
    row: Row
    calls: list[Callable[[], Tensor]]


class WrongOutputError(RuntimeError):
    """An implementation does not compute what it should."""


def rotary(head_dim: int, device: torch.device) -> Rotary:
    return Rotary(_THETA ** -(torch.arange(0, head_dim, 2, device=device) / head_dim))


def tensors(case: Case, settings: Settings, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random query, key and value, contiguous as a cache holds them."""
    generator = torch.Generator(settings.device).manual_seed(seed)

    def normal(heads: int, tokens: int) -> Tensor:
        shape = (case.batch, heads, tokens, case.head_dim)
        return torch.randn(shape, generator=generator, device=settings.device, dtype=settings.dtype)

    return (
        _QUERY_SCALE * normal(case.heads, case.queries),
        normal(case.key_heads, case.keys),
        normal(case.key_heads, case.keys),
    )


def input_sets(case: Case, itemsize: int, cache_bytes: int) -> int:
    """How many sets of keys a decode goes through in turn, so that none is left in the cache from its last turn."""
    if case.work != "decode":
        return 1
    return max(1, min(16, math.ceil(4 * cache_bytes / case.key_bytes(itemsize))))


def ours(impl: str, position_map: PositionMap) -> Implementation:
    def make(query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Tensor]:
        # Its own tables: they count in its memory.
        return partial(attention, query, key, value, position_map, rotary(query.shape[3], query.device), impl=impl)

    return Implementation(impl, "ropewalk", str(position_map), make)


def implementations(case: Case, settings: Settings) -> Iterator[tuple[Implementation, PositionMap]]:
    """Everything that runs on a case, with the map that it computes."""
    for one in peers.plain(case.work):
        if not settings.peers or any(text.lower() in one.name.lower() for text in settings.peers):
            yield one, Identity()
    for name in case.maps:
        position_map = settings.maps[name]
        if not settings.peers or any(text.lower() in "flexattention" for text in settings.peers):
            yield peers.composition(position_map, rotary(case.head_dim, settings.device)), position_map
        for impl in settings.impls:
            yield ours(impl, position_map), position_map


class Reference:
    """Outputs of the specification in float32 for a sample of the queries, which needs little memory at any length."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, rotary: Rotary, window: int) -> None:
        self._tensors, self._rotary = (query, key, value), rotary
        self._blocks = sampled_blocks(query.shape[2], key.shape[2], window)
        self._expected: dict[str, list[Tensor]] = {}

    def error(self, output: Tensor, position_map: PositionMap) -> float:
        """Largest ||output - reference|| / ||reference|| of a block of the sample; inf for an output of another shape.

        Over the whole sample, the first queries would hide the others: they see few keys, and their outputs are large.
        """
        query = self._tensors[0]
        if output.shape != query.shape:
            return math.inf
        if str(position_map) not in self._expected:
            self._expected[str(position_map)] = [self._compute(block, position_map) for block in self._blocks]
        errors = [
            (output[:, :, block].float() - expected).norm() / expected.norm()
            for block, expected in zip(self._blocks, self._expected[str(position_map)], strict=True)
        ]
        return torch.stack(errors).max().item()  # NaN stays NaN

    def _compute(self, block: slice, position_map: PositionMap) -> Tensor:
        query, key, value = self._tensors
        seen = key.shape[2] - query.shape[2] + block.stop
        groups = query.shape[1] // key.shape[1]
        outputs = []
        for head in range(key.shape[1]):  # one at a time: float32 copies of all keys would take gigabytes
            q = query[:, head * groups : (head + 1) * groups, block].float()
            k, v = (x[:, head : head + 1, :seen].float() for x in (key, value))
            outputs.append(attention(q, k, v, position_map, self._rotary, impl="reference"))
        return torch.cat(outputs, dim=1)


def sampled_blocks(queries: int, keys: int, window: int) -> list[slice]:
    """Short runs of queries: the first ones, the last ones, those where the far band begins, others in between."""
    size = min(_SAMPLED_QUERIES, queries)
    last = queries - size
    edge = window - (keys - queries) - size // 2
    begins = {last * i // (_SAMPLED_BLOCKS - 2) for i in range(_SAMPLED_BLOCKS - 1)} | {min(max(edge, 0), last)}
    return [slice(begin, begin + size) for begin in sorted(begins)]


def measure(case: Case, settings: Settings, log: Callable[[str], None]) -> list[Row]:
    """The case's rows."""
    device = settings.device
    cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    inputs = [tensors(case, settings, seed) for seed in range(input_sets(case, settings.dtype.itemsize, cache_bytes))]
    distances = settings.maps[case.maps[0]].bands[0].distances
    window = (distances and distances[1]) or 0
    reference = Reference(*inputs[0], rotary(case.head_dim, device), window)
    refused, ready = [], []
    for implementation, position_map in implementations(case, settings):
        log(f"{case.name}: {implementation.name}, {implementation.map}")
        row = _row(case, implementation, settings)
        if "FlexAttention" in row.impl and not (case.flex or settings.all_flex):
            refused.append(replace(row, error="left out to save its compiling; --all-flex runs it"))
            continue
        try:
            with implementation.context():
                ready.append(_prepared(implementation, position_map, row, inputs, reference, device))
        except Exception as error:
            refused.append(replace(row, error=timing.described(error)))
            timing.check_alive(device)
            timing.free_memory(device)
    log(f"{case.name}: timing {len(ready)} implementations")
    measured = []
    for kind in ("eager", "graph") if case.work == "decode" and device.type == "cuda" else ("eager",):
        measured += _timed(case, ready, kind, settings)
    return measured + refused


def _row(case: Case, implementation: Implementation, settings: Settings) -> Row:
    return Row(
        case=case.name,
        work=case.work,
        batch=case.batch,
        heads=case.heads,
        key_heads=case.key_heads,
        head_dim=case.head_dim,
        queries=case.queries,
        keys=case.keys,
        dtype=str(settings.dtype).removeprefix("torch."),
        map=implementation.map,
        impl=implementation.name,
        kind=implementation.kind,
        ships_with_torch=implementation.ships_with_torch,
    )


def _prepared(
    implementation: Implementation,
    position_map: PositionMap,
    row: Row,
    inputs: Sequence[tuple[Tensor, Tensor, Tensor]],
    reference: Reference,
    device: torch.device,
) -> Ready:
    """Runs it once on each set of inputs, looks at its memory and its output."""
    before = timing.allocated(device)
    calls = [implementation.make(*inputs[0])]
    output = calls[0]()
    kept = timing.allocated(device) - before - output.nbytes  # masks, tables
    error = reference.error(output, position_map)
    if not error <= ERROR_BOUNDS[output.dtype]:  # also NaN
        raise WrongOutputError(f"relative error {error:.2g} is over {ERROR_BOUNDS[output.dtype]:.0e}")
    del output
    peak = timing.peak_bytes(calls[0], device)
    for more in inputs[1:]:
        calls.append(implementation.make(*more))
        calls[-1]()
    peak = None if peak is None else peak + max(kept, 0)
    return Ready(implementation, replace(row, relative_error=error, peak_bytes=peak), calls)


def _timed(case: Case, ready: Sequence[Ready], kind: str, settings: Settings) -> list[Row]:
    contestants, entries, failed = [], [], []
    for one in ready:
        try:
            with one.implementation.context():
                call, calls = _repeated(one.calls, case, kind)
        except Exception as error:
            failed.append(replace(one.row, timing=kind, error=timing.described(error)))
            timing.check_alive(settings.device)
            continue
        name = f"{one.implementation.name}, {one.implementation.map}"
        contestants.append(Contestant(name, call, calls, one.implementation.context))
        entries.append(replace(one.row, timing=kind))
    timing.race(
        contestants,
        settings.device,
        rounds=settings.rounds,
        turn_ms=settings.turn_ms,
        seconds=settings.case_seconds,
        flush=None if case.work == "decode" else Flush(settings.device),
    )
    done = case.key_bytes(settings.dtype.itemsize) / 1e9 if case.work == "decode" else case.tera_operations
    unit = "GB/s" if case.work == "decode" else "TFLOP/s"
    timed = []
    for row, contestant in zip(entries, contestants, strict=True):
        if contestant.error:
            failed.append(replace(row, error=contestant.error))
        else:
            timed.append((rows.with_times(row, contestant.samples, done, unit), contestant.samples))
    return rows.with_ratios(timed) + failed


def _repeated(calls: Sequence[Callable[[], Tensor]], case: Case, kind: str) -> tuple[Callable[[], object], int]:
    """What is timed at once, and how many calls that is."""
    if case.work != "decode":
        return calls[0], 1
    turns = [call for _ in range(math.ceil(8 / len(calls))) for call in calls]
    if kind == "graph":
        return timing.graphed(turns), len(turns)

    def every() -> None:
        for call in turns:
            call()

    return every, len(turns)


def main(
    only: Annotated[
        str, typer.Option(help="Cases, comma-separated, by parts of their names: prefill-32k,decode.")
    ] = "",
    quick: Annotated[bool, typer.Option("--quick", help="A few cases, in two rounds.")] = False,
    impl: Annotated[str, typer.Option(help="Our implementations, comma-separated.")] = "auto",
    peer: Annotated[str, typer.Option(help="Plain ones by text in their name, comma-separated; all by default.")] = "",
    all_flex: Annotated[bool, typer.Option("--all-flex", help="FlexAttention in every case, minutes more.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Turns that every implementation gets.")] = 5,
    turn_ms: Annotated[float, typer.Option(min=0.1, help="Length of a turn.")] = 100.0,
    case_seconds: Annotated[float, typer.Option(help="A case timed for longer gets fewer rounds.")] = 30,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16, or float32 on a CPU.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="cuda, or cpu to try the command out.")] = "cuda",
    tiny: Annotated[bool, typer.Option("--tiny", help="Tiny cases, to try the command out.")] = False,
    output: Annotated[Path | None, typer.Option(help="Rows are added to this file, as JSON lines.")] = None,
    commit: Annotated[str, typer.Option(help="Of the rows; else ROPEWALK_COMMIT, else the checkout's.")] = "",
    list_: Annotated[bool, typer.Option("--list", help="Names the cases and ends.")] = False,
    plot: Annotated[
        tuple[Path, Path] | None, typer.Option(help="Measures nothing: draws a file of rows as a picture.")
    ] = None,
    table: Annotated[
        Path | None, typer.Option(help="Measures nothing: prints a file of rows as a table for the docs.")
    ] = None,
    plot_to: Annotated[Path | None, typer.Option(help="Draws all rows of --output at the end.")] = None,
) -> None:
    """Times attention under position maps beside plain attention."""
    if plot is not None:
        draw(rows.read(plot[0]), plot[1])
        return
    if table is not None:
        print(rows.markdown(rows.read(table)), end="")
        return
    if plot_to is not None and output is None:
        raise typer.BadParameter("--plot-to draws the rows of --output, which is missing")
    cases = selected(TINY if tiny else CASES, _listed(only) or (QUICK if quick and not tiny else ()))
    if not cases:
        raise typer.BadParameter(f"no case has all the parts of any of {only}; --list names them")
    if list_:
        print("\n".join(case.name for case in cases))
        return
    settings = Settings(
        device=torch.device(device),
        dtype=getattr(torch, dtype),
        impls=_listed(impl),
        peers=_listed(peer),
        rounds=min(rounds, 2) if quick else rounds,
        turn_ms=turn_ms,
        case_seconds=case_seconds,
        maps=TINY_MAPS if tiny else MAPS,
        all_flex=all_flex,
    )
    if settings.device.type == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("no CUDA device; try the command out with --device cpu --tiny --dtype float32")
    facts = rows.facts(settings.device, commit)
    measured: list[Row] = []
    began = time.monotonic()
    try:
        for case in cases:
            with torch.no_grad():
                new = [replace(row, facts=facts) for row in measure(case, settings, _log)]
            timing.free_memory(settings.device)
            rows.append(new, output)
            measured += new
            for row in new:
                _log("  " + rows.line(row))
    except timing.DeadDeviceError as error:
        _log(f"the device failed, and nothing after this can be measured: {error}")
        raise typer.Exit(1) from error
    finally:
        Console(width=220).print(rows.table(measured, f"{facts.device}, torch {facts.torch}, {facts.commit}"))
        _log(f"{time.monotonic() - began:.0f} s")
    if plot_to is not None and output is not None:
        draw(rows.read(output), plot_to)


def _listed(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    typer.run(main)
