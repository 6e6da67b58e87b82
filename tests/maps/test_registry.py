# SPDX-License-Identifier: Apache-2.0
"""What CONTRIBUTING.md promises: a map is one file and one entry, or a package of somebody else's."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ropewalk
from ropewalk import ReRoPE, SelfExtend
from ropewalk.maps import MapEntryPointError
from ropewalk.maps.registry import Registry

ROOT = Path(__file__).parents[2]
SOURCE = Path(ropewalk.__file__).parent
THEIR_PACKAGE = Path(__file__).parent / "their_package"
SIZES = ["--trained-window", "128", "--length", "600", "--json"]


def python(path, *arguments):
    """A Python process that finds packages in the folders of `path` first."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)


def command_lines(path, *lines):
    """Exit code, stdout and stderr of `ropewalk` with each of these arguments, in one such process."""
    code = """if True:
        import json, sys
        from typer.testing import CliRunner
        from ropewalk.cli import app
        results = [CliRunner().invoke(app, line, env={"COLUMNS": "200"}) for line in json.loads(sys.argv[1])]
        print(json.dumps([[result.exit_code, result.stdout, result.stderr] for result in results]))
    """
    process = python(path, "-W", "error", "-c", code, json.dumps([[str(word) for word in line] for line in lines]))
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def installed(folder, name, entry_points):
    """What an installer leaves of a package without files, version 1.2."""
    folder = folder / f"{name.replace('-', '_')}-1.2.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    (folder / "entry_points.txt").write_text(f"[ropewalk.maps]\n{entry_points}\n")


# One file and one entry.


@pytest.fixture(scope="module")
def with_toy(tmp_path_factory):
    """A copy of the package to which a map was added as CONTRIBUTING.md says."""
    folder = tmp_path_factory.mktemp("with_toy")
    shutil.copytree(SOURCE, folder / "ropewalk", ignore=shutil.ignore_patterns("__pycache__"))
    maps = folder / "ropewalk" / "maps"
    text = (THEIR_PACKAGE / "their_maps.py").read_text()
    (maps / "toy.py").write_text(
        text.replace("Theirs", "Toy")
        .replace("theirs", "toy")
        .replace("ropewalk.maps import Band", "ropewalk.maps.base import Band")
    )
    init = (maps / "__init__.py").read_text()
    init, entries = re.subn(r"^    Infinite,\n\)", "    Infinite,\n    Toy,\n)", init, flags=re.M)
    init, imports = re.subn(
        r"^(from ropewalk\.maps\.streaming_llm .*)$", r"\1\nfrom ropewalk.maps.toy import Toy", init, flags=re.M
    )
    assert (entries, imports) == (1, 1)
    (maps / "__init__.py").write_text(init)
    return [folder]


def test_the_generic_tests_include_a_new_map_by_themselves(with_toy):
    files = [
        "tests/maps/test_relative_positions.py",
        "tests/maps/test_numbers.py",
        "tests/cli/test_explain.py",
        "tests/ops/test_attention.py",
    ]
    options = ["-p", "no:cacheprovider", "-k", "toy", "-v", "-o", "addopts="]
    result = python(with_toy, "-m", "pytest", *options, *files)
    assert result.returncode == 0, result.stdout[-4000:]
    for file in files:
        assert re.search(rf"{re.escape(file)}::\S+\[.*toy.*PASSED", result.stdout, re.I), f"none of {file}"


def test_a_new_map_brings_its_options(with_toy):
    command = ["explain", "--map", "toy"]
    given = ["--reach", 4, "--horizon", 5, "--ending", "hidden", "--start", 3]
    (code, output, error), (_, help_text, _) = command_lines(
        with_toy, [*command, *given, *SIZES], ["explain", "--help"]
    )
    assert code == 0, error
    explanation = json.loads(output)
    assert explanation["map"] == {"map": "toy", "start": 3, "reach": 4, "horizon": 5, "ending": "hidden"}
    assert [band["key_position"] for band in explanation["bands"]] == ["n", "n // 2"]
    help_text = " ".join(re.sub("[│╭╰─╮╯]", " ", help_text).split())
    assert "--reach INTEGER toy: tokens that keep their distance." in help_text
    assert re.search(r"--horizon INTEGER .*toy: tokens that are told apart, .* \[default: 8\]", help_text)
    assert "--ending kept|hidden toy: whether keys past the horizon are seen. [default: kept]" in help_text


# Other packages.


@pytest.fixture(scope="module")
def with_theirs(tmp_path_factory):
    """A folder that a package with a map is installed into."""
    pytest.importorskip("pip")
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("with_theirs")
    source = shutil.copytree(THEIR_PACKAGE, folder / "source")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    result = python([], "-m", "pip", "install", "--quiet", *options, "--target", folder / "installed", source)
    assert result.returncode == 0, result.stderr
    return [folder / "installed", SOURCE.parent]


def test_an_installed_package_brings_its_map(with_theirs):
    command = ["explain", "--map", "theirs"]
    result = python(with_theirs, "-W", "error", "-m", "ropewalk", *command, "--reach", 4, *SIZES)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["map"] == {"map": "theirs", "start": 0, "reach": 4, "horizon": 8, "ending": "kept"}
    chosen, refused = command_lines(with_theirs, [*command, *SIZES], [*command, "--horizon", 9, *SIZES])
    assert json.loads(chosen[1])["map"]["reach"] == 4
    assert refused == [2, "", json.dumps({"error": "--map theirs needs --reach"}) + "\n"]


def test_their_package_is_imported_when_its_map_is_asked_for(with_theirs):
    code = """if True:
        import sys
        import ropewalk
        from ropewalk.maps import MAPS, from_dict
        from ropewalk.testing import example_maps
        assert MAPS["selfextend"] is ropewalk.SelfExtend
        assert "_brought" not in vars(MAPS), "entry points were read"
        assert list(MAPS)[-1] == "theirs" and len(MAPS) == len(list(MAPS))
        assert "their_maps" not in sys.modules
        theirs = from_dict({"map": "theirs", "reach": 3})
        assert type(theirs) is MAPS["theirs"] and sys.modules["their_maps"].Theirs is MAPS["theirs"]
        assert example_maps()["theirs"] == [MAPS["theirs"](reach=2, horizon=3)]
    """
    result = python(with_theirs, "-W", "error", "-c", code)
    assert result.returncode == 0, result.stderr


BROKEN = {
    "is not there": ("new = no_such_module:Map", r"no_such_module:Map cannot be imported \(ModuleNotFoundError: .*\)"),
    "lacks the class": ("new = math:Map", r"math:Map cannot be imported \(AttributeError: .*\)"),
    "is no map": ("new = math:sqrt", r"math:sqrt is not a subclass of ropewalk\.PositionMap"),
    "is no map's class": ("new = pathlib:Path", r"pathlib:Path is not a subclass of ropewalk\.PositionMap"),
    "has another name": ("new = ropewalk.maps:ReRoPE", r"ropewalk\.maps:ReRoPE calls itself 'rerope'"),
    "has a name of ours": ("selfextend = ropewalk.maps:ReRoPE", r"Ropewalk has a map of that name"),
}


@pytest.mark.parametrize(("entry", "reason"), BROKEN.values(), ids=BROKEN)
def test_a_map_that_cannot_be_used_is_one_error_that_names_its_package(entry, reason, tmp_path, monkeypatch):
    installed(tmp_path, "their-broken-map", entry)
    monkeypatch.syspath_prepend(tmp_path)
    maps = Registry(SelfExtend)
    for _ in range(2):  # nothing is remembered of it
        with pytest.raises(
            MapEntryPointError, match=f"package their-broken-map 1.2 brings .*{reason}: update or uninstall"
        ):
            dict(maps)
    assert maps["selfextend"] is SelfExtend


def test_two_packages_with_one_name_are_refused(tmp_path, monkeypatch):
    installed(tmp_path, "first-maps", "new = their_maps:Theirs")
    installed(tmp_path, "second-maps", "new = their_maps:Theirs")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MapEntryPointError, match=r"(first|second)-maps 1\.2 .*so does .*(first|second)-maps 1\.2"):
        list(Registry(SelfExtend))


def test_an_unknown_name_is_a_key_error(tmp_path, monkeypatch):
    maps = Registry(SelfExtend, ReRoPE)
    with pytest.raises(KeyError, match="zzz"):
        maps["zzz"]
    assert "zzz" not in maps
    assert list(maps)[:2] == ["selfextend", "rerope"]


def test_on_the_command_line_a_broken_map_is_one_line(tmp_path):
    installed(tmp_path, "their-broken-map", "new = no_such_module:Map")
    lines = [["explain", *SIZES], ["generate", "--prompt", "x"], ["explain", "--help"], ["--version"]]
    explain, generate, *others = command_lines([tmp_path, SOURCE.parent], *lines)
    assert explain[:2] == generate[:2] == [2, ""]
    assert "the installed package their-broken-map 1.2" in json.loads(explain[2])["error"]
    assert re.fullmatch(r"error: the installed package their-broken-map 1\.2 .*\n", generate[2])
    assert [code for code, *_ in others] == [0, 0]
