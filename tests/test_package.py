# SPDX-License-Identifier: Apache-2.0
"""What is released: the wheel and the source archive, built here, and the wheel installed with nothing but its
dependencies."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email import message_from_bytes
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import ropewalk

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with the source archive and the wheel."""
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, text=True)
    return folder


@pytest.fixture(scope="module")
def wheel(built):
    return next(built.glob("*.whl"))


@pytest.fixture(scope="module")
def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return message_from_bytes(archive.read(name))


def core_requirements(metadata):
    """What `pip install ropewalk` asks for, without extras."""
    requirements = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    return [one for one in requirements if one.marker is None or one.marker.evaluate({"extra": ""})]


def test_the_version_is_the_same_everywhere(metadata):
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert metadata["Version"] == cited[1] == ropewalk.__version__


def test_the_wheel_names_every_licence_that_it_ships(metadata, wheel):
    ours = {path.relative_to(ROOT).as_posix() for path in (ROOT / "src").rglob("LICENSE*")}
    assert set(metadata.get_all("License-File")) == {"LICENSE", "NOTICE", *ours}
    assert metadata["License-Expression"] == "Apache-2.0 AND MIT AND LicenseRef-Public-Domain"
    with zipfile.ZipFile(wheel) as archive:
        shipped = [name.partition("licenses/")[2] for name in archive.namelist() if ".dist-info/licenses/" in name]
    assert sorted(shipped) == sorted(metadata.get_all("License-File"))


def test_notice_names_files_that_are_there():
    named = re.findall(r"^src/\S+", (ROOT / "NOTICE").read_text(), re.MULTILINE)
    assert named
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_the_source_archive_has_the_tests_and_not_the_results(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    assert "tests/test_package.py" in names
    assert not [name for name in names if name.startswith("docs/results/")]


def test_the_wheel_alone(wheel, metadata, tmp_path):
    """`ropewalk --help` and a map's figures where only what the wheel asks for is installed."""
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False, symlinks=True)
    scripts = environment / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / Path(sys.executable).name
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True, text=True)
    variables = {"base": str(environment), "platbase": str(environment)}
    packages = Path(sysconfig.get_path("purelib", "venv", variables))
    for entry in installed_for(core_requirements(metadata)):
        (packages / entry.name).symlink_to(entry)

    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"COLUMNS": "120"}

    def printed(*arguments):
        done = subprocess.run(
            [scripts / arguments[0], *arguments[1:]], cwd=tmp_path, env=clean, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    imported = "import ropewalk, ropewalk.ops; ropewalk.extend; print(ropewalk.__file__)"
    assert Path(printed("python", "-c", imported).strip()).is_relative_to(environment)
    assert "generate" in printed("ropewalk", "--help")
    explain = ["explain", "--map", "selfextend", "--group-size", "8", "--window", "1024", "--trained-window", "4096"]
    assert "25,600" in printed("ropewalk", *explain, "--length", "16384")


def installed_for(requirements):
    """Files and folders of this environment that hold the requirements, and what they require in turn."""
    seen: set[str] = set()
    entries: set[Path] = set()
    waiting = list(requirements)
    while waiting:
        requirement = waiting.pop()
        if requirement.name in seen:
            continue
        seen.add(requirement.name)
        try:
            found: Distribution = distribution(requirement.name)
        except PackageNotFoundError:  # of another platform, or of a larger build than this one
            continue
        entries |= {Path(found.locate_file(file.parts[0])) for file in found.files or () if file.parts[0] != ".."}
        needed = map(Requirement, found.requires or ())
        extras = requirement.extras or {""}
        waiting += [
            one for one in needed if one.marker is None or any(one.marker.evaluate({"extra": e}) for e in extras)
        ]
    return {entry for entry in entries if entry.name != "__pycache__" and entry.exists()}
