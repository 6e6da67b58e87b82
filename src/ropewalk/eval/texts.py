"""Long texts in the public domain, by name.

alice   "Alice's Adventures in Wonderland", which comes with the package
pg19    the test books of PG19 (Rae et al., arXiv 1911.05507), from a folder or from the hub
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

from ropewalk.data import alice

_HUB = "emozilla/pg19-test"


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


def _pg19(data_dir: Path | None) -> list[Text]:
    """The books, named by their numbers at Project Gutenberg."""
    return _pg19_from_hub() if data_dir is None else _pg19_from_folder(data_dir / "pg19" / "test_books")


def _pg19_from_folder(folder: Path) -> list[Text]:
    books = [Text(path.stem, path.read_text(encoding="utf-8")) for path in folder.glob("*.txt")]
    if not books:
        raise TextsError(f"{folder} holds no books: --data-dir must hold them as pg19/test_books/NUMBER.txt")
    return books


def _pg19_from_hub() -> list[Text]:
    otherwise = "name a folder that holds pg19/test_books/*.txt by --data-dir, or take the text alice"
    try:
        datasets: Any = import_module("datasets")
    except ImportError as error:
        raise TextsError(f"pg19 is loaded from the hub with datasets: pip install 'ropewalk[eval]', {otherwise}") from error
    try:
        rows = datasets.load_dataset(_HUB, split="test")
        return [Text(row["url"].rstrip("/").rpartition("/")[2], row["text"]) for row in rows]
    except Exception as error:  # whatever stands between here and the hub
        reason = " ".join(str(error).split())[:200]
        raise TextsError(f"{_HUB} cannot be loaded ({type(error).__name__}: {reason}): {otherwise}") from error


def _alice(data_dir: Path | None) -> list[Text]:
    return [Text("alice", alice())]


_SETS: dict[str, Callable[[Path | None], list[Text]]] = {"alice": _alice, "pg19": _pg19}
