# SPDX-License-Identifier: Apache-2.0
import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from ropewalk.cli import app

SMALL = ["--model", "dummy", "--lengths", "200,1k", "--depths", "2", "--samples", "1"]


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture
def results(tmp_path):
    assert run("eval", "passkey", *SMALL, "-o", tmp_path / "results").exit_code == 0
    return tmp_path / "results"


def test_a_page_of_a_run(results, tmp_path):
    page = tmp_path / "pages" / "page.html"
    done = run("report", results, "--output", page)
    assert done.exit_code == 0, done.output
    assert done.stdout == f"8 rows: {page} and {page.with_suffix('.md')}\n"
    assert "Pass key retrieval" in page.read_text()
    assert "selfextend(group_size=1, window=1024)" in page.read_text()
    assert (tmp_path / "pages" / "page_files" / "passkey-2.svg").exists()
    first = page.read_bytes()
    run("report", results, results, "--output", page)
    assert page.read_bytes() == first


def test_several_folders(results, tmp_path):
    other = tmp_path / "other"
    run("eval", "passkey", *SMALL, "--method", "rerope(window=64)", "-o", other)
    done = run("report", results, other, "-o", tmp_path / "page.html")
    assert done.stdout.startswith("12 rows: ")
    assert "rerope(window=64)" in (tmp_path / "page.md").read_text()


def no_folder(folder):
    return folder / "none", "there is no folder"


def no_results(folder):
    (folder / "empty").mkdir()
    return folder / "empty", "holds no results: there is no config.json"


def no_rows(folder):
    (folder / "results" / "results.jsonl").write_text("")
    return folder / "results", "has no rows yet"


def no_row(folder):
    (folder / "results" / "results.jsonl").write_text(json.dumps({"task": 3}) + "\n")
    return folder / "results", "line 1, is no row"


def no_text(folder):
    (folder / "results" / "results.jsonl").write_bytes(b"\xff\xfe\n")
    return folder / "results", "line 1, is no row"


def no_file(folder):
    (folder / "results" / "results-1.jsonl").symlink_to("/dev/zero")
    return folder / "results", "results-1.jsonl': is no regular file"


def no_facts(folder):
    [facts] = (folder / "results").glob("facts-*.json")
    facts.unlink()
    return folder / "results", f"results.jsonl, line 1, needs {facts.name}, which is not there: put it back"


def broken_facts(folder):
    [facts] = (folder / "results").glob("facts-*.json")
    facts.write_bytes(b"\xff")
    return folder / "results", f"{facts.name} cannot be read"


def no_config(folder):
    (folder / "results" / "config.json").write_bytes(b"\xff")
    return folder / "results", "config.json cannot be read"


def another_task(folder):
    path = folder / "results" / "config.json"
    path.write_text(path.read_text().replace('"passkey"', '"needle"'))
    return folder / "results", 'line 1, is of task "passkey", and the folder of "needle"'


@pytest.mark.parametrize(
    "spoil", [no_folder, no_results, no_rows, no_row, no_text, no_file, no_facts, broken_facts, no_config, another_task]
)
def test_bad_folders(results, tmp_path, spoil):
    folder, message = spoil(tmp_path)
    told(run("report", folder, "-o", tmp_path / "page.html"), message)
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("place", ["prompt_tokens", "seconds", "cell.length", "cell.depth", "scores.exact_match"])
def test_numbers_of_any_size(results, tmp_path, place):
    path = results / "results.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    part, _, name = place.rpartition(".")

    def page_with(numbers):
        lines = []
        for row, number in zip(rows, numbers, strict=True):
            (row[part] if part else row)[name] = "here"
            lines.append(json.dumps(row).replace('"here"', number) + "\n")
        path.write_text("".join(lines))
        done = run("report", results, "-o", tmp_path / "page.html")
        assert done.exit_code in (0, 2), done.output
        assert "Traceback" not in done.stderr
        return (tmp_path / "page.md").read_text() if done.exit_code == 0 else ""

    shown = page_with(["NaN", "Infinity", "-Infinity", "1e400", "1e308", "-1", "0", "1"])
    assert "a line is left out that cannot be read: results.jsonl, line 1, is no row: " in shown
    for number in ("1e49", "-1e49", str(2**63 - 1), "1e-320", "-1", str(2**48)):
        page_with([number] * len(rows))


def test_bad_output(results, tmp_path):
    told(run("report", results, "-o", tmp_path / "page.pdf"), "--output must end in .html")
    (tmp_path / "file").write_text("")
    told(run("report", results, "-o", tmp_path / "file" / "page.html"), "file': File exists")
    told(run("report", results, "-o", ""), "must name a file or a folder, got ''")
    told(run("report", ""), "must name a file or a folder, got ''")


def everything(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["README.md", "README_files/passkey-1.svg"])
def test_what_report_did_not_make_is_not_overwritten(results, tmp_path, name):
    theirs = tmp_path / "project" / name
    theirs.parent.mkdir(parents=True)
    theirs.write_text("Made by me.\n")
    before = everything(tmp_path)
    done = run("report", results, "-o", tmp_path / "project" / "README.html")
    told(done, f"'{theirs}': is there and was not made by ropewalk report: name another page")
    assert everything(tmp_path) == before


@pytest.mark.skipif(sys.platform == "win32", reason="links")
@pytest.mark.parametrize("name", ["page.md", "page_files", "page_files/passkey-1.svg"])
def test_links_below_the_output_are_not_followed(results, tmp_path, name):
    page, theirs = tmp_path / "pages" / "page.html", tmp_path / "theirs"
    run("report", results, "-o", page)
    link = page.parent / name
    link.rename(theirs)
    link.symlink_to(theirs)
    before = everything(tmp_path)
    told(run("report", results, "-o", page), f"'{link}': is a symbolic link, which is not followed")
    assert everything(tmp_path) == before


LITTLE_ROOM = (
    "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); from ropewalk.cli import main; main()"
)


@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process")
@pytest.mark.parametrize("command", ["report", "explain"])
def test_a_full_disk_leaves_what_was_there(results, tmp_path, command):
    """A limit on the size of files stands for it."""
    out = tmp_path / "out"
    out.mkdir()
    arguments = {
        "report": ["report", results, "-o", out / "page.html"],
        "explain": ["explain", "--trained-window", "4096", "--length", "16384", "--picture", out / "map.png"],
    }[command]
    assert run(*arguments).exit_code == 0
    before = everything(out)
    command = [sys.executable, "-c", LITTLE_ROOM, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    # Matplotlib may have something to say of its own cache.
    assert done.stderr.splitlines()[-1] == f"error: cannot read or write {str(arguments[-1])!r}: File too large"
    assert "Traceback" not in done.stderr
    assert everything(out) == before


def told(result, message):
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
