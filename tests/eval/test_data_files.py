# SPDX-License-Identifier: Apache-2.0
import os
import sys
import zipfile

import pytest
from pydantic import BaseModel

from ropewalk.eval.data_files import DataError, lines_of, read
from ropewalk.eval.texts import texts

PLACE = ("books/one.jsonl", "owner/books", "all.zip")


class Line(BaseModel):
    word: str


def test_a_file_of_a_folder_and_of_the_hub(tmp_path, monkeypatch):
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "one.jsonl").write_bytes(b"content")
    assert read(tmp_path, *PLACE) == b"content"

    def download(repository, file, repo_type):
        assert (repository, file, repo_type) == ("owner/books", "all.zip", "dataset")
        with zipfile.ZipFile(tmp_path / file, "w") as archive:
            archive.writestr("__MACOSX/data/._one.jsonl", "no text")
            archive.writestr("data/one.jsonl", "content")
        return tmp_path / file

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert read(None, *PLACE) == b"content"
    with pytest.raises(DataError, match=r"^all.zip of owner/books holds no two.jsonl$"):
        read(None, "books/two.jsonl", *PLACE[1:])


@pytest.mark.skipif(sys.platform == "win32", reason="devices")
def test_what_may_never_end_is_refused(tmp_path):
    (tmp_path / "books").mkdir()
    os.mkfifo(tmp_path / "books" / "one.jsonl")
    with pytest.raises(DataError, match=r"^cannot read .*one.jsonl \(is no regular file\)"):
        read(tmp_path, *PLACE)
    for folder, name in (("pg19/test_books", "pg19"), ("needle/PaulGrahamEssays", "essays")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "1.txt").symlink_to("/dev/zero")
        with pytest.raises(DataError, match=r"^cannot read .*1.txt \(is no regular file\)"):
            texts(name, tmp_path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(
        DataError, match=r"^cannot read .*one.jsonl \(No such file .*\): --data-dir must hold books/one"
    ):
        read(tmp_path, *PLACE)


def test_a_hub_that_cannot_be_reached(monkeypatch):
    def download(*arguments, **more):
        raise ConnectionError("no\nroute")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(
        DataError, match=r"cannot be loaded \(ConnectionError: no route\): name a folder that holds boo"
    ):
        read(None, *PLACE)


def test_lines():
    assert lines_of(b'\xef\xbb\xbf{"word": "a\xe2\x80\xa8b"}\r\n\n{"word": "c"}', Line, "x") == [
        Line(word="a\u2028b"),
        Line(word="c"),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"version https://git-lfs", "Invalid JSON"),
        (b'{"words": ""}', "word: Field required"),
        (b'{"word": "\xff"}', "Invalid JSON"),
        (b"[]", "Input should be an object"),
    ],
)
def test_a_line_that_is_something_else(line, message):
    with pytest.raises(DataError, match=f"^one.jsonl, line 2, is not what it should be: .*{message}"):
        lines_of(b'{"word": ""}\n' + line, Line, "one.jsonl")


def test_an_empty_file():
    with pytest.raises(DataError, match=r"^one\.jsonl is empty"):
        lines_of(b"\n", Line, "one.jsonl")


def test_a_text_in_another_encoding_is_told_by_its_name(tmp_path):
    folder = tmp_path / "pg19" / "test_books"
    folder.mkdir(parents=True)
    (folder / "7.txt").write_bytes("Götter".encode("latin-1"))
    with pytest.raises(DataError, match=r"7.txt is not in UTF-8 \(invalid start byte at byte 1\)"):
        texts("pg19", tmp_path)
    (folder / "7.txt").write_bytes(b"a\r\nb\rc")
    assert texts("pg19", tmp_path)[0].text == "a\nb\nc"
