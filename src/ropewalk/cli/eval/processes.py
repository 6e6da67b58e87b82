# SPDX-License-Identifier: Apache-2.0
"""Several processes that share a run: one a GPU, or so many on a CPU.

Each knows its place from the variables that torchrun sets, so that can start them too, on several machines that share a
folder.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from signal import SIGTERM
from tempfile import TemporaryFile

from ropewalk.eval.share import Share

_POLL_SECONDS, _GRACE_SECONDS = 0.2, 5
# Exit code of a process that asked all its examples, and every one failed: no reason to end the others.
ALL_FAILED = 3


def share() -> Share | None:
    """What this process does of a run that it shares; None if no launcher started it."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    return Share(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))


def wanted(processes: int | None, device: str) -> int:
    """How many there are to be: those asked for, else one a GPU."""
    if processes is not None or device == "cpu":
        return processes or 1
    import torch

    return max(1, torch.cuda.device_count())


def take_device() -> None:
    """Makes the GPU of this process's number on its machine the one that "cuda" means; there may be none."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def launch(processes: int) -> int:
    """Runs this very command in so many processes, and returns the exit code of the first that failed, or 0.

    They share nothing but the folder of results, so none waits for another. If one fails, the others are ended: the
    same command goes on from what they wrote. What others than the first say on stderr is shown where the first has no
    fault of its own: one error at a time.
    """
    # Processes on a CPU would each take all of its cores.
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))}
    with ExitStack() as stack:
        running = []
        for rank in range(processes):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            errors = stack.enter_context(TemporaryFile("w+")) if rank else None
            command = [sys.executable, "-m", "ropewalk", *sys.argv[1:]]
            one = subprocess.Popen(command, env={**threads, **os.environ, **place}, stderr=errors)
            running.append((one, errors))
        try:
            code = _first_failure([one for one, _ in running])
        except KeyboardInterrupt:
            # It has reached all of them.
            code = 130
        if code not in (0, 130, ALL_FAILED):
            _end([one for one, _ in running])
        for one, _ in running:
            one.wait()
        if code not in (0, ALL_FAILED) and running[0][0].returncode in (0, -SIGTERM):
            for one, errors in running:
                if errors is not None and one.returncode == code:
                    errors.seek(0)
                    sys.stderr.write(errors.read())
                    break
    return code


def _end(running: Sequence[subprocess.Popen[bytes]]) -> None:
    """Those that do not end by themselves: what stops one often stops all, and each should say so itself."""
    deadline = time.monotonic() + _GRACE_SECONDS
    while any(one.poll() is None for one in running) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    for one in running:
        one.terminate()


def _first_failure(running: Sequence[subprocess.Popen[bytes]]) -> int:
    """Waits until one has failed or all have ended."""
    while True:
        codes = [one.poll() for one in running]
        failed = [code for code in codes if code not in (None, 0, ALL_FAILED)]
        if failed or None not in codes:
            return failed[0] if failed else max(codes)  # type: ignore[type-var, return-value]
        time.sleep(_POLL_SECONDS)
