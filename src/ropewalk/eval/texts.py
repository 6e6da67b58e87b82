# SPDX-License-Identifier: Apache-2.0
"""Long texts, by name.

alice   "Alice's Adventures in Wonderland", which comes with the package
pg19    the test books of PG19 (Rae et al., arXiv 1911.05507), from a folder or from the hub
essays  Paul Graham's, from a folder or from the hub; they are his, and not in the public domain
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from ropewalk.data import alice
from ropewalk.eval.data_files import DataError, loading, read_file, text_of
from ropewalk.names import unknown


@dataclass(frozen=True)
class Text:
    """A text and its name, unique among those it comes with."""

    name: str
    text: str


class _Set(NamedTuple):
    """A set that does not come with the package: what it holds, its files below the folder of data sets, the hub's data
    set and its split, and the name and the text of a row there."""

    what: str
    files: str
    hub: str
    split: str
    read: Callable[[int, Mapping[str, Any]], tuple[str, str]]


# The folder of essays is that of the needle test's own repository. The data set has more, without names of files. Books
# are named by their numbers at Project Gutenberg.
_SETS = {
    "pg19": _Set("books", "pg19/test_books/*.txt", "emozilla/pg19-test", "test",
                 lambda number, row: (row["url"].rstrip("/").rpartition("/")[2], row["text"])),
    "essays": _Set("essays", "needle/PaulGrahamEssays/*.txt", "baber/paul_graham_essays", "train",
                   lambda number, row: (f"{number:03d}", row["text"])),
}  # fmt: skip


def texts(name: str, data_dir: Path | None = None) -> list[Text]:
    """All texts of a set, by name.

    Args:
        name: of the set.
        data_dir: folder of data sets on this machine; None to load from the hub what does not come with the package.

    Raises:
        DataError: there is no such set, it is not in the folder, or it cannot be loaded.
    """
    if name == "alice":
        return [Text("alice", alice())]
    if name not in _SETS:
        raise DataError(unknown("text", name, ("alice", *_SETS)))
    found = _from_hub(name, _SETS[name]) if data_dir is None else _from_folder(data_dir, _SETS[name])
    return sorted(found, key=lambda text: text.name)


def sha256(texts: Iterable[Text]) -> str:
    """What tells these texts from others, in whatever order they are."""
    digest = hashlib.sha256()
    for text in sorted(texts, key=lambda text: text.name):
        digest.update(f"{text.name} {len(text.text)} {text.text}".encode())
    return digest.hexdigest()


def _from_folder(data_dir: Path, one: _Set) -> list[Text]:
    otherwise = f"--data-dir must hold {one.files}"
    paths = list(data_dir.glob(one.files))
    if not paths:
        raise DataError(f"{data_dir} holds no {one.what}: {otherwise}")
    return [Text(path.stem, text_of(read_file(path, otherwise), path)) for path in paths]


def _from_hub(name: str, one: _Set) -> list[Text]:
    otherwise = f"name a folder that holds {one.files} by --data-dir, or take --text=alice"
    try:
        datasets: Any = import_module("datasets")
    except ImportError as error:
        raise DataError(
            f"{name} is loaded from the hub with datasets: pip install 'ropewalk[eval]', {otherwise}"
        ) from error
    with loading(one.hub, otherwise):
        return [
            Text(*one.read(number, row)) for number, row in enumerate(datasets.load_dataset(one.hub, split=one.split))
        ]
