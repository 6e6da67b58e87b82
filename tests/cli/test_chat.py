# SPDX-License-Identifier: Apache-2.0
import os
import select
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from ropewalk.cli import app
from ropewalk.testing.saved import save_tiny_model

WINDOW = 128
TEXT = "The sea is wide. The hill is high. The bread is warm. On we walk, away and home again.\n" * 3
SMALL = ["--max-new-tokens", "8", "--dtype", "float32", "--device", "cpu", "--target-length", "400"]
QUESTIONS = ("What is wide?", "Why?")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama", trained_window=WINDOW)


@pytest.fixture
def document(tmp_path):
    path = tmp_path / "document.txt"
    path.write_text(TEXT)
    return path


def run(command, *arguments, **options):
    return CliRunner().invoke(app, [command, *map(str, arguments)], **options)


def error_of(*arguments, **options):
    result = run("chat", *arguments, **options)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    return result.stderr.splitlines()[-1]


def test_questions_through_a_pipe(model, document):
    arguments = ["--model", model, "--file", document, *SMALL]
    prompts = [part for question in QUESTIONS for part in ("--prompt", question)]
    result = run("chat", *arguments, input=f"\ufeff{QUESTIONS[0]}\r\n\n  \n{QUESTIONS[1]}")
    assert result.exit_code == 0, result.output
    assert result.stdout == run("generate", *arguments, *prompts).stdout
    assert "tokens, read once; questions of your own" in result.stderr
    assert result.stderr.count("Reading: ") == 1


def test_a_question_that_fails_does_not_end_the_others(model, document):
    result = run("chat", "--model", model, "--file", document, *SMALL, input="Why? " * 900 + "\nWhy?\n")
    assert result.exit_code == 2
    assert "error: a text of " in result.stderr
    answer = run("generate", "--model", model, "--file", document, "--prompt", "Why?", *SMALL).stdout
    assert result.stdout.endswith(f"\n> Why?\n{answer}")


@pytest.mark.parametrize(
    "encoding", ["utf-8", "ascii", *(pytest.param(name, marks=pytest.mark.slow) for name in ("cp1252", "shift_jis"))]
)
def test_a_question_that_is_no_text_does_not_end_the_others(model, document, encoding):
    """In whatever encoding questions come."""
    command = [sys.executable, "-m", "ropewalk", "chat", "--model", str(model), "--file", str(document), *SMALL]
    done = subprocess.run(
        command, input=b"Why?\nWho \x81\xff\x9d?\nWhy?\n", capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding},
    )  # fmt: skip
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr
    assert done.stderr.count(b"error: the question is not text in the encoding it came in (at character 4)") == 1
    asked = [line for line in done.stdout.splitlines() if line.startswith(b"> ")]
    assert (asked[0], len(asked), asked[2]) == (b"> Why?", 3, b"> Why?")


def test_what_was_kept(model, document, tmp_path):
    keep = ["--model", model, "--keep", tmp_path / "kept", *SMALL]
    first = run("chat", "--file", document, *keep, input="Why?")
    again = run("chat", *keep, input="Why?")
    assert again.exit_code == 0, again.output
    assert again.stdout == first.stdout
    assert "Read already: " in again.stderr


def test_mistakes(model, document, tmp_path):
    assert "pass --file, or --keep with a file that is there" in error_of("--model", model, input="Why?")
    assert "there is nothing to read" in error_of("--keep", tmp_path / "kept")
    assert "put the text into a file" in error_of("--model", model, "--file", "-", input="Why?")
    assert "--max-new-tokens must be from 1" in error_of("--file", document, "--max-new-tokens", 0)


class Terminal:
    """A command at a terminal of its own. What it shows is read up to where something was waited for."""

    def __init__(self, *arguments):
        import pty

        self.main, terminal = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from ropewalk.cli import main; main()", *map(str, arguments)],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            env={**os.environ, "TERM": "dumb"},
            # A job that a script puts in the background ignores the signal, and so do its children.
            preexec_fn=lambda: (os.setsid(), signal.signal(signal.SIGINT, signal.SIG_DFL)),
        )
        os.close(terminal)
        self.seen, self.at = "", 0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()
        os.close(self.main)

    def wait_for(self, text, seconds=90):
        deadline = time.monotonic() + seconds
        while (found := self.seen.find(text, self.at)) < 0:
            ready, _, _ = select.select([self.main], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"{text!r} does not come after {self.seen[: self.at]!r}: {self.seen[self.at :]!r}"
            self.seen += os.read(self.main, 1000).decode(errors="replace")
        self.at = found + len(text)

    def type(self, text):
        os.write(self.main, text.encode())

    def interrupt(self):
        self.process.send_signal(signal.SIGINT)


@pytest.mark.skipif(sys.platform == "win32", reason="terminals")
def test_at_a_terminal(model, document):
    """Ctrl-C ends the answer that runs, and at the prompt begins a new line; Ctrl-D ends the chat."""
    arguments = ["chat", "--model", model, "--file", document, "--dtype", "float32", "--device", "cpu"]
    with Terminal(*arguments, "--max-new-tokens", 3000, "--map", "rerope", "--window", 8) as terminal:
        terminal.wait_for("Ctrl-D the chat.")
        terminal.wait_for("> ")
        for question in QUESTIONS:
            terminal.type(f"{question}\n")
            terminal.wait_for(question)
            terminal.wait_for(" ")  # of the answer
            terminal.interrupt()
            terminal.wait_for("\n> ")
        time.sleep(1)  # readline misses a signal that comes while it begins to wait
        terminal.interrupt()
        terminal.wait_for("\n> ")
        terminal.type("\x04")
        assert terminal.process.wait(timeout=60) == 0, terminal.seen
    assert "Traceback" not in terminal.seen
    assert "error" not in terminal.seen
