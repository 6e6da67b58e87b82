# SPDX-License-Identifier: Apache-2.0
import os
import signal
import subprocess
import sys
import time

import pytest

from ropewalk.cli.eval import processes
from ropewalk.eval.results import Results, read, read_config

SMALL = ["eval", "passkey", "--model", "dummy", "--lengths", "200,1k", "--depths", "3", "--samples", "2"]


def start(*arguments):
    command = [sys.executable, "-m", "ropewalk", *map(str, arguments)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # As a shell starts a command: Ctrl-C reaches all its processes, and none is ignored, as behind "&" and nohup.
        start_new_session=True,
        preexec_fn=lambda: [signal.signal(one, signal.SIG_DFL) for one in (signal.SIGINT, signal.SIGHUP)],
    )


def run(*arguments):
    process = start(*arguments)
    out, errors = process.communicate(timeout=120)
    return process.returncode, out, errors


def scores(folder):
    return {row.key: row.scores for row in read(folder).rows}


def test_two_processes_share_what_one_does(tmp_path):
    code, out, _ = run(*SMALL, "-o", tmp_path / "two", "--processes", 2)
    assert code == 0
    assert sorted(out.splitlines()) == [f"process {i} of 2: 12 examples done: {tmp_path / 'two'}" for i in (1, 2)]
    files = sorted(path.name for path in (tmp_path / "two").iterdir())
    assert (files[0], *files[2:]) == ("config.json", "results-1.jsonl", "results.jsonl")
    assert files[1].startswith("facts-"), "both are of the same facts"
    assert all(len((tmp_path / "two" / name).read_text().splitlines()) == 12 for name in files[2:])
    code, out, _ = run(*SMALL, "-o", tmp_path / "one", "--processes", 1)
    assert out == f"24 examples done: {tmp_path / 'one'}\n"
    assert scores(tmp_path / "one") == scores(tmp_path / "two")
    # Of another number of processes, one goes on where the others were.
    assert run(*SMALL, "-o", tmp_path / "two", "--processes", 1)[1].startswith("24 were there already, 0 examples done")


def test_an_error_is_told_once(tmp_path):
    assert run(*SMALL, "-o", tmp_path)[0] == 0
    code, out, errors = run(*SMALL, "-o", tmp_path, "--seed", 1, "--processes", 2)
    assert (code, out) == (2, "")
    assert errors.count("was started with seed 0, not 1") == 1


@pytest.mark.parametrize(("codes", "code"), [((0, 3), 3), ((3, 0), 3), ((0, 0), 0), ((3, 2), 2), ((0, -9), -9)])
def test_the_exit_code_of_several(codes, code):
    """One whose examples all failed is no reason to end the others."""
    running = [subprocess.Popen(["sh", "-c", f"exit {one}" if one >= 0 else f"kill {one} $$"]) for one in codes]
    found = processes._first_failure(running)
    for one in running:
        one.wait()  # it does not wait for those behind the first failure
    assert found == code


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("how", ["the second is killed", pytest.param("Ctrl-C", marks=pytest.mark.slow)])
def test_a_stopped_run_goes_on(tmp_path, how):
    longer = [*SMALL, "--samples", 100, "-o", tmp_path, "--processes", 2]
    process = start(*longer)
    wait_until(lambda: all((tmp_path / name).exists() for name in ("results.jsonl", "results-1.jsonl")))
    if how == "Ctrl-C":
        os.killpg(process.pid, signal.SIGINT)
    else:
        [worker] = [pid for pid in children(process.pid) if environment(pid).get("RANK") == "1"]
        os.kill(worker, signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert not children(process.pid)
    if how == "Ctrl-C":
        assert (process.returncode, errors.count("stopped")) == (130, 1)
    else:
        assert process.returncode == 2
        told = [line for line in errors.splitlines() if not line.startswith(("process 1 of 2: ", "note: "))]
        assert told == [
            "error: process 2 of 2 was killed (signal 9, SIGKILL; a system without memory does that): rows that were "
            "written stay, and the same command goes on"
        ]
    before = scores(tmp_path)
    assert 0 < len(before) < 1200
    code, _, errors = run(*longer)
    assert code == 0, errors
    after = scores(tmp_path)
    assert len(after) == 1200
    assert before.items() <= after.items()
    lines = [line for path in tmp_path.glob("*.jsonl") for line in path.read_text().splitlines()]
    assert len(lines) == 1200, "an example was asked twice"


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("how", ["SIGTERM", pytest.param("SIGHUP", marks=pytest.mark.slow), "SIGKILL", "SIGINT"])
def test_processes_end_with_the_one_that_started_them(tmp_path, how):
    """A signal that reaches it alone, unlike Ctrl-C."""
    process = start(*SMALL, "--samples", 2000, "-o", tmp_path, "--processes", 2)
    wait_until(lambda: all((tmp_path / name).exists() for name in ("results.jsonl", "results-1.jsonl")))
    workers = children(process.pid)
    assert len(workers) == 2
    process.send_signal(getattr(signal, how))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (130 if how == "SIGINT" else -getattr(signal, how))
    assert errors.endswith("\nstopped\n") == (how == "SIGINT")
    wait_until(lambda: not any(map(runs, workers)), seconds=5)
    Results(tmp_path, read_config(tmp_path)).close()  # nobody holds the folder any more


def wait_until(condition, seconds=100):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def runs(pid):
    """Whether a process does something; one that has ended may be there until somebody asks for its exit code."""
    found = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return bool(found.stdout.strip()) and not found.stdout.startswith("Z")


def children(pid):
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [int(line) for line in found.stdout.split()]


def environment(pid):
    with open(f"/proc/{pid}/environ", encoding="utf-8") as file:  # noqa: PTH123
        return dict(entry.split("=", 1) for entry in file.read().split("\0") if "=" in entry)
