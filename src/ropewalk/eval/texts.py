"""Long texts, by name.

alice   "Alice's Adventures in Wonderland", which comes with the package
pg19    the test books of PG19 (Rae et al., arXiv 1911.05507), from a folder or from the hub
essays  Paul Graham's, from a folder or from the hub; they are his, and not in the public domain
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

from ropewalk.data import alice
from ropewalk.eval.errors import told

# Row by row, a name for the text and the text.
_Read = Callable[[int, Mapping[str, Any]], tuple[str, str]]


class TextsError(ValueError):
    """Texts that do not exist or cannot be had. One line, for users."""


@dataclass(frozen=True)
class Text:
    """A text and its name, unique among those it comes with."""

    name: str
    text: str


def texts(name: str, data_dir: Path | None = None) -> list[Text]:
    """All texts of a set, by name.

    Args:
        name: of the set.
        data_dir: folder of data sets on this machine; None to load from the hub what does not come with the package.

    Raises:
        TextsError: there is no such set, it is not in the folder, or it cannot be loaded.
    """
    if name not in _SETS:
        close = get_close_matches(name, _SETS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise TextsError(f"no text is called {name!r}.{hint} The texts are {', '.join(_SETS)}")
    return sorted(_SETS[name](data_dir), key=lambda text: text.name)


def sha256(texts: Iterable[Text]) -> str:
    """What tells these texts from others, in whatever order they are."""
    digest = hashlib.sha256()
    for text in sorted(texts, key=lambda text: text.name):
        digest.update(f"{text.name} {len(text.text)} {text.text}".encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class _Elsewhere:
    """A set that does not come with the package.

    Attributes:
        name: of the set.
        what: it consists of.
        folder: of its files, below the folder of data sets.
        file: what its files are called there, for users.
        hub: data set that holds it.
        split: of that.
        read: a row of it.
    """

    name: str
    what: str
    folder: str
    file: str
    hub: str
    split: str
    read: _Read

    def __call__(self, data_dir: Path | None) -> list[Text]:
        return self._from_hub() if data_dir is None else self._from_folder(data_dir / self.folder)

    def _from_folder(self, folder: Path) -> list[Text]:
        found = [Text(path.stem, path.read_text(encoding="utf-8")) for path in folder.glob("*.txt")]
        if not found:
            raise TextsError(
                f"{folder} holds no {self.what}: --data-dir must hold them as {self.folder}/{self.file}.txt"
            )
        return found

    def _from_hub(self) -> list[Text]:
        otherwise = f"name a folder that holds {self.folder}/*.txt by --data-dir, or take the text alice"
        try:
            datasets: Any = import_module("datasets")
        except ImportError as error:
            raise TextsError(
                f"{self.name} is loaded from the hub with datasets: pip install 'ropewalk[eval]', {otherwise}"
            ) from error
        try:
            rows = datasets.load_dataset(self.hub, split=self.split)
            return [Text(*self.read(number, row)) for number, row in enumerate(rows)]
        except Exception as error:  # whatever stands between here and the hub
            raise TextsError(f"{self.hub} cannot be loaded ({told(error)}): {otherwise}") from error


def _alice(data_dir: Path | None) -> list[Text]:
    return [Text("alice", alice())]


# Named by their numbers at Project Gutenberg.
_PG19 = _Elsewhere(
    "pg19", "books", "pg19/test_books", "NUMBER", "emozilla/pg19-test", "test",
    lambda number, row: (row["url"].rstrip("/").rpartition("/")[2], row["text"]),
)  # fmt: skip
# The folder is that of the needle test's own repository. The data set has more essays, without names of files.
_ESSAYS = _Elsewhere(
    "essays", "essays", "needle/PaulGrahamEssays", "NAME", "baber/paul_graham_essays", "train",
    lambda number, row: (f"{number:03d}", row["text"]),
)  # fmt: skip

_SETS: dict[str, Callable[[Path | None], list[Text]]] = {"alice": _alice, "pg19": _PG19, "essays": _ESSAYS}
