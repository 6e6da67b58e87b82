# SPDX-License-Identifier: Apache-2.0
"""Times and memory of calls on a device, with competitors taking turns.

A GPU's clock moves with its temperature and power, so two times are comparable only if they were taken together. Every
round therefore runs every competitor for a moment, and a competitor's samples are those of all rounds.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from rows import Samples
from torch import Tensor

Call = Callable[[], object]

_FLUSHED_BYTES = 256 << 20  # more than any second-level cache of today


@dataclass
class Contestant:
    """Something to time.

    Args:
        call: does the work once, or `calls` times.
        calls: works done by one call; times are of one of them.
        context: entered around a turn and not timed, for settings such as which kernel torch may use.
    """

    name: str
    call: Call
    calls: int = 1
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    error: str = ""
    _rounds: list[tuple[float, ...]] = field(default_factory=list)

    @property
    def samples(self) -> Samples:
        return Samples(tuple(self._rounds))


class DeadDeviceError(RuntimeError):
    """The device takes no more work from this process: nothing after this can be measured."""


class Flush:
    """Writes more than the device's cache holds, so that a call that follows reads its inputs from memory."""

    def __init__(self, device: torch.device) -> None:
        self._buffer = torch.empty(_FLUSHED_BYTES // 4, dtype=torch.int32, device=device) if _is_gpu(device) else None

    def __call__(self) -> None:
        if self._buffer is not None:
            self._buffer.zero_()


def race(
    contestants: Sequence[Contestant],
    device: torch.device,
    *,
    rounds: int,
    turn_ms: float,
    least_repeats: int = 2,
    most_repeats: int = 50,
    seconds: float = math.inf,
    flush: Call | None = None,
) -> None:
    """Times the contestants in turn, round after round; what raises gets an error instead of samples.

    Args:
        contestants: with names of their own; they have run before, so that nothing is compiled here.
        turn_ms: about how long a turn lasts, of which there is one a round and contestant.
        seconds: there are fewer rounds, but two at least, where all would take longer than this.
        flush: done before each repeat and not timed.
    """
    estimates = {}
    for one in contestants:
        with _noting_errors(one, device), one.context():
            [estimate] = _timed(one.call, 1, device, flush)
            if estimate < turn_ms:  # the first call may have been slow for reasons of its own
                estimate = sorted(_timed(one.call, 3, device, flush))[1]
            estimates[one.name] = estimate
    turns = sum(max(turn_ms, least_repeats * estimate) for estimate in estimates.values())
    for round_ in range(rounds_within(seconds, turns / 1e3, rounds)):
        # Each round in an order of its own: the first of a round and those after a hungry neighbor are slower.
        for one in random.Random(round_).sample(contestants, len(contestants)):
            if one.error:
                continue
            with _noting_errors(one, device), one.context():
                repeats = repeats_for(estimates[one.name], turn_ms, least_repeats, most_repeats)
                # Not counted: the clock settles on this kernel's power.
                settling = math.ceil(repeats / 3) if estimates[one.name] < turn_ms else 0
                times = _timed(one.call, settling + repeats, device, flush)[settling:]
                one._rounds.append(tuple(ms / one.calls for ms in times))


def rounds_within(seconds: float, round_seconds: float, rounds: int) -> int:
    """Rounds that fit a time: two at least, `rounds` at most."""
    fitting = rounds if rounds * round_seconds <= seconds else int(seconds / round_seconds)
    return min(rounds, max(2, fitting))


def repeats_for(estimate_ms: float, turn_ms: float, least: int, most: int) -> int:
    """Repeats that fill a turn."""
    return max(least, min(most, math.ceil(turn_ms / max(estimate_ms, 1e-6))))


def _timed(call: Call, repeats: int, device: torch.device, flush: Call | None) -> list[float]:
    """Milliseconds of each repeat."""
    if not _is_gpu(device):
        times = []
        for _ in range(repeats):
            began = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - began))
        return times
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        if flush is not None:
            flush()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) for start, end in events]


def graphed(calls: Sequence[Callable[[], Tensor]]) -> Call:
    """The calls as one CUDA graph: replaying it costs the host one launch, whatever is in it.

    The calls must have run before, so that nothing is compiled or looked up while they are captured.
    """
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()

    def replay(kept: object = calls) -> None:  # the graph reads tensors that only the calls keep alive
        graph.replay()

    return replay


def peak_bytes(call: Callable[[], Tensor], device: torch.device) -> int | None:
    """Memory that a call takes at most beside what was allocated before it; None off a GPU."""
    if not _is_gpu(device):
        call()
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    output = call()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del output
    return peak


def allocated(device: torch.device) -> int:
    """Bytes in use on the device; 0 off a GPU."""
    return torch.cuda.memory_allocated(device) if _is_gpu(device) else 0


def free_memory(device: torch.device) -> None:
    """Gives memory that nothing uses back to the device."""
    gc.collect()
    if _is_gpu(device):
        torch.cuda.empty_cache()


def described(error: BaseException) -> str:
    """An error as one short line."""
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text[:300]}"


def check_alive(device: torch.device) -> None:
    """Raises DeadDeviceError if an earlier failure has broken the device's context, as a bad memory access does."""
    if _is_gpu(device):
        try:
            torch.cuda.synchronize(device)
        except Exception as error:
            raise DeadDeviceError(described(error)) from error


@contextmanager
def _noting_errors(one: Contestant, device: torch.device) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        one.error = described(error)
        check_alive(device)


def _is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"
