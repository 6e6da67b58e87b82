# SPDX-License-Identifier: Apache-2.0
"""Files of data sets, from a folder on this machine or from the hub, where no code of the hub's runs."""

from __future__ import annotations

import codecs
import gzip
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from ropewalk.eval.messages import first_problem, in_one_line
from ropewalk.files import read_bytes

T = TypeVar("T")

# What a gzip file begins with.
_GZIP = b"\x1f\x8b"


class DataError(ValueError):
    """Data that do not exist, or are not what they should be. One line, for users."""


def read(data_dir: Path | None, name: str, repository: str, file: str) -> bytes:
    """A file of a data set.

    Args:
        data_dir: folder of data sets; None for the hub.
        name: of the file in that folder.
        repository: of the data set on the hub.
        file: its name there, or that of a zip archive that holds it in some folder.

    Raises:
        DataError: it is not there, or cannot be read.
    """
    if data_dir is not None:
        return read_file(data_dir / name, f"--data-dir must hold {name}, or leave it out of --tasks")
    wanted = PurePosixPath(name).name
    with loading(f"{file} of {repository}", f"name a folder that holds {name} by --data-dir"):
        hub: Any = import_module("huggingface_hub")
        path = Path(hub.hf_hub_download(repository, file, repo_type="dataset"))
        if not zipfile.is_zipfile(path):
            return path.read_bytes()
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                if PurePosixPath(member).name == wanted:
                    return archive.read(member)
    raise DataError(f"{file} of {repository} holds no {wanted}")


def read_file(path: Path, otherwise: str) -> bytes:
    """Raises DataError: there is no such file, or it cannot be read; `otherwise` says what to do then."""
    try:
        return read_bytes(path)
    except OSError as error:
        raise DataError(f"cannot read {path} ({error.strerror}): {otherwise}") from error


def read_published(data_dir: Path | None, names: Sequence[str], source: str) -> bytes:
    """A file of a data set that its authors publish in a repository, and not on the hub; of a gzip file, what is in it.

    Args:
        data_dir: folder of data sets, or a copy of that repository.
        names: of the file in such folders.
        source: where to get it.

    Raises:
        DataError: it is not there, or cannot be read.
    """
    if data_dir is None:
        raise DataError(f"{names[0]} is needed: get it from {source}, and name the folder that holds it by --data-dir")
    path = next((data_dir / name for name in names if (data_dir / name).exists()), data_dir / names[0])
    content = read_file(path, f"--data-dir must hold {' or '.join(names)}, from {source}")
    if not content.startswith(_GZIP):
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged ({in_one_line(error)}): get it again from {source}") from error


def text_of(content: bytes, name: str | Path) -> str:
    """A file's text, with the ends of lines that Python gives texts. Raises DataError: it is not in UTF-8."""
    try:
        return content.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not in UTF-8 ({error.reason} at byte {error.start}): load it again") from error


def lines_of(content: bytes, kind: type[T], name: str | Path) -> list[T]:
    """The lines of a file, a JSON value each.

    Args:
        name: of the file, for errors.

    Raises:
        DataError: one is something else, or there is none.
    """
    adapter = TypeAdapter(kind)
    found = []
    # No other character ends a line: texts hold some of those, unescaped.
    for number, line in enumerate(content.removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1):
        if line.strip():
            try:
                found.append(adapter.validate_json(line))
            except ValidationError as error:
                raise DataError(f"{name}, line {number}, is not what it should be: {first_problem(error)}") from error
    if not found:
        raise DataError(f"{name} is empty: load it again")
    return found


def beside(file: str, kind: type[T]) -> dict[str, T]:
    """What prompts.json beside a module's file holds, by name."""
    return TypeAdapter(dict[str, kind]).validate_json(Path(file).with_name("prompts.json").read_bytes())  # type: ignore[valid-type]


@contextmanager
def loading(what: str, otherwise: str) -> Iterator[None]:
    """Gives whatever stands between here and the hub as one error; `otherwise` says what to do then.

    Raises:
        DataError: something failed.
    """
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{what} cannot be loaded ({in_one_line(error)}): {otherwise}") from error
