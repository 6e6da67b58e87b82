# SPDX-License-Identifier: Apache-2.0
import sys
from types import SimpleNamespace

import pytest

from ropewalk.data import alice
from ropewalk.eval.data_files import DataError
from ropewalk.eval.texts import Text, sha256, texts


def hub(monkeypatch, load_dataset):
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))


def test_alice():
    assert texts("alice") == [Text("alice", alice())]


def test_pg19_from_a_folder(tmp_path):
    folder = tmp_path / "pg19" / "test_books"
    folder.mkdir(parents=True)
    (folder / "97.txt").write_text("Götter, Gräber\n", encoding="utf-8")
    (folder / "100.txt").write_text("one", encoding="utf-8")
    (folder / "index.tsv").write_text("no book")
    assert texts("pg19", tmp_path) == [Text("100", "one"), Text("97", "Götter, Gräber\n")]


def test_a_folder_without_books(tmp_path):
    with pytest.raises(DataError, match=r"holds no books: --data-dir must hold pg19/test_books/\*\.txt"):
        texts("pg19", tmp_path)


def test_pg19_from_the_hub(monkeypatch):
    def load_dataset(name, split):
        assert (name, split) == ("emozilla/pg19-test", "test")
        return [{"url": "http://www.gutenberg.org/ebooks/10146", "text": "St. Paul", "short_book_title": "x"}]

    hub(monkeypatch, load_dataset)
    assert texts("pg19") == [Text("10146", "St. Paul")]


def test_no_hub(monkeypatch):
    def load_dataset(name, split):
        raise ConnectionError("no\nroute")

    hub(monkeypatch, load_dataset)
    with pytest.raises(DataError, match=r"cannot be loaded \(ConnectionError: no route\): name a folder .* --data-dir"):
        texts("pg19")


def test_no_datasets(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'ropewalk\[eval\]', name a folder .* by --data-dir"):
        texts("pg19")


def test_no_such_texts():
    with pytest.raises(
        DataError, match=r"no text is called 'pg-19'\. Did you mean 'pg19'\? The texts are alice, pg19, essays"
    ):
        texts("pg-19")


def test_essays_from_a_folder(tmp_path):
    folder = tmp_path / "needle" / "PaulGrahamEssays"
    folder.mkdir(parents=True)
    (folder / "gap.txt").write_text("Mind it.")
    assert texts("essays", tmp_path) == [Text("gap", "Mind it.")]


def test_essays_from_the_hub(monkeypatch):
    def load_dataset(name, split):
        assert (name, split) == ("baber/paul_graham_essays", "train")
        return [{"text": "first"}, {"text": "second"}]

    hub(monkeypatch, load_dataset)
    assert texts("essays") == [Text("000", "first"), Text("001", "second")]


def test_no_hub_for_essays(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"essays is loaded from .* needle/PaulGrahamEssays/\*\.txt by --data-dir"):
        texts("essays")


def test_hash_of_texts():
    one, other = Text("a", "bc"), Text("ab", "c")
    assert sha256([one, other]) == sha256([other, one])
    assert len({sha256([one]), sha256([other]), sha256([one, other]), sha256([one, one])}) == 4
