# SPDX-License-Identifier: Apache-2.0
"""Several processes that share a run: one a GPU, or so many on a CPU.

Each knows its place from the variables that torchrun sets, so that can start them too, on several machines that share a
folder.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from signal import Signals
from tempfile import TemporaryFile

from ropewalk.cli.errors import UserError
from ropewalk.eval.share import Share

_POLL_SECONDS, _GRACE_SECONDS = 0.2, 5
# Set for the processes that `launch` starts. Their standard input is a pipe which it holds and never writes to, so that
# they see it end, however it does.
_LAUNCHED = "ROPEWALK_LAUNCHED"
_STOPPED = 130
# Exit code of a process that asked all its examples, and every one failed: no reason to end the others.
ALL_FAILED = 3


def share() -> Share | None:
    """What this process does of a run that it shares; None if no launcher started it."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    if _LAUNCHED in os.environ:
        threading.Thread(target=_end_with_launcher, args=[os.dup(0)], daemon=True).start()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
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
    same command goes on from what they wrote. If this process ends, in whatever way, so do they. What others than the
    first say on stderr is shown where the first has no fault of its own: one error at a time.

    Raises:
        UserError: one was killed.
    """
    # Processes on a CPU would each take all of its cores.
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))}
    running: list[subprocess.Popen[bytes]] = []
    with ExitStack() as stack:
        # Of the first there are none: it says them itself.
        errors = [stack.enter_context(TemporaryFile("w+")) for _ in range(1, processes)]
        try:
            for rank in range(processes):
                place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), _LAUNCHED: "1"}
                command = [sys.executable, "-m", "ropewalk", *sys.argv[1:]]
                env, stderr = {**threads, **os.environ, **place}, errors[rank - 1] if rank else None
                running.append(subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stderr=stderr))
            code = _first_failure(running)
        except KeyboardInterrupt:
            # From a terminal it has reached all of them.
            code = _STOPPED
        codes = _end(running, 0 if code < 0 else _GRACE_SECONDS)
        if code < 0:
            raise UserError(_killed(Share(codes.index(code), processes), -code))
        if code not in (0, ALL_FAILED) and codes[0] in (0, None):
            told = [file for its, file in zip(codes[1:], errors, strict=False) if its == code]
            for file in told[:1]:
                file.seek(0)
                sys.stderr.write(file.read())
            if code == _STOPPED and not told:
                print("\nstopped", file=sys.stderr)
    return code


def _killed(share: Share, number: int) -> str:
    try:
        name = f", {Signals(number).name}"
    except ValueError:  # a system has more than Python has names for
        name = ""
    why = "; a system without memory does that" if name == ", SIGKILL" else ""
    return f"{share} was killed (signal {number}{name}{why}): rows that were written stay, and the same command goes on"


def _end(running: Sequence[subprocess.Popen[bytes]], grace: float) -> list[int | None]:
    """Ends those that do not end by themselves within so many seconds: what stops one often stops all, and each should
    say so itself.

    Returns:
        The exit codes of those that did.
    """
    with suppress(KeyboardInterrupt):  # who says so again does not want to wait
        deadline = time.monotonic() + grace
        while any(one.poll() is None for one in running) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
    codes = [one.poll() for one in running]
    for one in running:
        one.kill()
        one.communicate()
    return codes


def _end_with_launcher(pipe: int) -> None:
    """Waits for the end of the process at the other end of a pipe, and ends this one; its rows are on the disk."""
    while os.read(pipe, 1):
        pass
    os._exit(_STOPPED)


def _first_failure(running: Sequence[subprocess.Popen[bytes]]) -> int:
    """Waits until one has failed or all have ended."""
    while True:
        codes = [one.poll() for one in running]
        failed = [code for code in codes if code not in (None, 0, ALL_FAILED)]
        if failed or None not in codes:
            return failed[0] if failed else max(codes)  # type: ignore[type-var, return-value]
        time.sleep(_POLL_SECONDS)
