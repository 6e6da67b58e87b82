# SPDX-License-Identifier: Apache-2.0
"""Whatever goes wrong outside of Ropewalk ends every command in one line and exit code 2."""

import errno
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from io import BytesIO, TextIOWrapper

import pytest
import typer

from ropewalk.cli import app
from ropewalk.cli.errors import UserError

SMALL = ["--model", "dummy", "--lengths", "200", "--depths", "2", "--samples", "1"]
SIZES = ["--trained-window", "4096", "--length", "16384"]


def commands(group, *names):
    """All there are, as they are typed."""
    for name in group.list_commands(None):
        yield (*names, name)
        command = group.get_command(None, name)
        yield from commands(command, *names, name) if hasattr(command, "commands") else ()


ALL = [(), *commands(typer.main.get_command(app))]


def end(arguments, command=app):
    """Exit code of a command."""
    with pytest.raises(SystemExit) as caught:
        command([str(one) for one in arguments])
    return caught.value.code


@contextmanager
def broken(kind):
    """A standard output that nothing can be written to."""
    if kind == "closed":
        yield None
    elif kind == "full":
        with open("/dev/full", "w") as stream:  # noqa: PTH123
            yield stream
    else:
        read, write = os.pipe()
        os.close(read)
        with os.fdopen(write, "w") as stream:
            yield stream


@pytest.mark.skipif(sys.platform == "win32", reason="/dev/full")
@pytest.mark.parametrize(
    ("kind", "code", "told"),
    [
        ("closed", 2, "error: standard output is closed: there is nowhere to show anything\n"),
        ("full", 2, "error: cannot write to standard output: No space left on device\n"),
        ("without a reader", 0, ""),  # it has seen enough
    ],
)
@pytest.mark.parametrize("command", ALL, ids=" ".join)
def test_output_that_cannot_be_written(command, kind, code, told, capsys, monkeypatch):
    with broken(kind) as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert end([*command, "--help"]) == code
        assert capsys.readouterr().err == told


@contextmanager
def ascii_output(monkeypatch, columns):
    """A narrow terminal of few characters; what it is shown."""
    monkeypatch.setenv("COLUMNS", str(columns))
    shown = BytesIO()
    monkeypatch.setattr(sys, "stdout", TextIOWrapper(shown, "ascii", write_through=True))
    yield shown


@pytest.mark.parametrize("command", [*ALL, ("explain", *SIZES)], ids=" ".join)
def test_consoles_with_few_characters(command, monkeypatch, capsys):
    helped = [] if command[-2:] == tuple(SIZES[-2:]) else ["--help"]
    for columns in (5, 20, 40, 60):
        with ascii_output(monkeypatch, columns) as shown:
            assert end([*command, *helped]) == 0
            assert capsys.readouterr().err == ""
            assert shown.getvalue()


def test_names_that_no_encoding_has(tmp_path, monkeypatch, capsys):
    """Names of files are bytes."""
    odd = os.fsdecode(b"\xff")
    monkeypatch.chdir(tmp_path)
    with ascii_output(monkeypatch, 80) as shown:
        assert end(["explain", *SIZES, "--picture", f"{odd}.svg"]) == 0
        assert end(["eval", "passkey", *SMALL, "-o", odd]) == 0
        assert end(["report", odd, "-o", f"{odd}.html"]) == 0
    assert shown.getvalue().count(b"\\udcff") == 4
    assert (tmp_path / f"{odd}.html").exists()
    assert "Traceback" not in capsys.readouterr().err


def test_names_that_would_steer_a_terminal(tmp_path, monkeypatch, capsys):
    from ropewalk.testing.saved import save_tiny_model

    odd = "a  \x1b[2J\x9b\u202e"
    monkeypatch.chdir(tmp_path)
    save_tiny_model(tmp_path / odd)
    (tmp_path / f"{odd}.txt").write_text("Some text.")
    assert end(["explain", *SIZES, "--picture", f"{odd}.svg"]) == 0
    assert end(["eval", "passkey", *SMALL, "-o", f"{odd}.out"]) == 0
    assert end(["report", f"{odd}.out", "-o", f"{odd}.html"]) == 0
    arguments = ["generate", "--model", odd, "--file", f"{odd}.txt", "--keep", f"{odd}.kept", "--max-new-tokens", "1"]
    assert end([*arguments, "--device", "cpu"]) == 0
    assert end([*arguments, "--device", "cpu"]) == 0
    out, errors = capsys.readouterr()
    for sign in odd[3:4] + odd[-2:]:
        assert sign not in out + errors
    assert (tmp_path / f"{odd}.html").exists()


RAISED = [
    (FileExistsError(errno.EEXIST, "File exists", "x"), "cannot read or write 'x': File exists"),
    (OSError(errno.ENAMETOOLONG, "File name too long", b"x"), "cannot read or write 'x': File name too long"),
    (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
    (OSError("no answer from\nthe hub"), "no answer from the hub"),
    (PermissionError(errno.EACCES, "Not yours", "\x1b[2J"), r"cannot read or write '\x1b[2J': Not yours"),
    (
        ModuleNotFoundError("No module named 'pydantic'", name="pydantic"),
        "this needs pydantic, which is not installed: pip install 'ropewalk[eval]'",
    ),
    (ImportError("pictures need matplotlib"), "pictures need matplotlib"),
    (UserError("a \x9b2J b \u202e c\u2028d"), r"a \x9b2J b \u202e c d"),
]  # fmt: skip


@pytest.mark.parametrize("command", [one for one in ALL if one and one != ("eval",)], ids=" ".join)
def test_errors_of_the_system(command, capsys):
    group = one = typer.main.get_command(app)
    for name in command:
        one = one.get_command(None, name)
    for error, message in RAISED:

        def fails(error=error, **_):
            raise error

        one.callback, one.params = fails, []
        assert end(command, group.main) == 2
        assert capsys.readouterr() == ("", f"error: {message}\n")


def test_with_json(capsys, tmp_path):
    assert end(["explain", *SIZES, "--json", "--picture", tmp_path / "no" / "map.png"]) == 2
    out, errors = capsys.readouterr()
    assert out == ""
    assert "No such file or directory" in json.loads(errors)["error"]


@pytest.fixture
def places(tmp_path):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "closed").mkdir(mode=0o500)
    long = tmp_path / ("a" * 300)
    yield {"a file": tmp_path / "file", "in a file": tmp_path / "file" / "x", "a device": "/dev/null", "long": long}
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("place", ["a file", "in a file", "a device", "long"])
@pytest.mark.parametrize("command", ["eval", "report", "explain"])
def test_places_that_cannot_be_written(command, place, places, tmp_path, capsys):
    path = str(places[place])
    if command == "eval":
        arguments = ["eval", "passkey", *SMALL, "-o", path]
    elif command == "report":
        assert end(["eval", "passkey", *SMALL, "-o", tmp_path / "results"]) == 0
        arguments = ["report", tmp_path / "results", "-o", path + ("/x.html" if place != "long" else ".html")]
    else:
        arguments = ["explain", *SIZES, "--picture", path + ("/x.png" if place != "long" else ".png")]
    capsys.readouterr()
    assert end(arguments) == 2
    out, errors = capsys.readouterr()
    assert out == ""
    told = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(told) == 1
    assert "Traceback" not in errors
    assert path in told[0]


@pytest.mark.skipif(sys.platform == "win32", reason="/dev/full")
def test_rows_are_kept_where_the_summary_cannot_be_shown(tmp_path, capsys, monkeypatch):
    with broken("full") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert end(["eval", "passkey", *SMALL, "-o", tmp_path]) == 2
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 4
    assert capsys.readouterr().err.splitlines()[-1] == "error: cannot write to standard output: No space left on device"


def test_what_extras_bring_is_not_needed_before_it_is_used():
    """The parser may need some of it itself."""
    code = (
        "import sys\n"
        "for name in ('pydantic', 'pydantic_core', 'jinja2', 'scipy', 'matplotlib', 'lm_eval', 'datasets'):\n"
        "    sys.modules[name] = None\n"
        "import ropewalk.cli, ropewalk.eval.hidden_facts"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(sys.platform == "win32", reason="pipes")
@pytest.mark.parametrize(
    "arguments", [["--json"], [], ["--help"], ["--map", "self", "--capacity", "2", "--rate", "0.1"]]
)
def test_a_reader_that_goes_early(arguments):
    """One rule for what is printed at once, and for what comes line by line."""
    command = f"{sys.executable} -m ropewalk explain {' '.join([*SIZES, *arguments])}"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", f"{command} | head -1"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(sys.platform == "win32", reason="/dev/full")
@pytest.mark.parametrize(("streams", "code"), [(">/dev/full", 2), ("2>&- >&-", 2)])
def test_as_a_process(streams, code):
    """Python itself has nothing to add at its end."""
    command = f"{sys.executable} -m ropewalk explain {' '.join(SIZES)} --json {streams}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert done.stderr.count("\n") == (1 if code and "2>" not in streams else 0)
