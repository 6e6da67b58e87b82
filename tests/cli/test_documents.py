# SPDX-License-Identifier: Apache-2.0
import codecs
import os
import re
import subprocess
import sys
from io import TextIOWrapper

import pytest

from ropewalk.cli.documents import check_encoding, check_question, read_files
from ropewalk.cli.errors import UserError

TEXT = "Caf\u00e9 au lait, \u65e5\u672c\u8a9e \U0001f40b.\nAnother line.\n"


def read(tmp_path, data, encoding=None):
    path = tmp_path / "file.txt"
    path.write_bytes(data)
    return read_files([str(path)], encoding)[0]


def error_of(*arguments):
    with pytest.raises(UserError) as caught:
        read_files(*arguments)
    return str(caught.value)


@pytest.mark.parametrize(
    ("mark", "encoding"),
    [
        (b"", "utf-8"),
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
        (codecs.BOM_UTF32_LE, "utf-32-le"),
        (codecs.BOM_UTF32_BE, "utf-32-be"),
    ],
)
@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
def test_byte_order_marks_and_line_ends(tmp_path, mark, encoding, ends):
    assert read(tmp_path, mark + TEXT.replace("\n", ends).encode(encoding)) == TEXT


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32", "utf-8", "utf-8-sig", "utf-16", "gb18030"])
def test_an_encoding_by_name(tmp_path, encoding):
    check_encoding(encoding)
    assert read(tmp_path, TEXT.encode(encoding), encoding) == TEXT


def test_an_encoding_of_western_letters(tmp_path):
    assert read(tmp_path, b"caf\xe9 au lait", "latin-1") == "caf\u00e9 au lait"


@pytest.mark.parametrize(
    ("content", "encoding", "said"),
    [
        (b"", None, "is empty"),
        (b" \n\t ", None, "is empty"),
        (codecs.BOM_UTF16_LE, None, "is empty"),
        (b"text\0more", None, "is binary (it holds NUL bytes): --file takes a text file in UTF-8"),
        (TEXT.encode("utf-16-le"), None, "--encoding names (utf-16-le, where it is UTF-16 without a byte order mark)"),
        (b"text\0more", "latin-1", "is binary (it holds NUL characters when read as latin-1)"),
        (b"caf\xe9 au lait", None, "is not UTF-8 text (byte 3 does not fit): name its encoding, such as --encoding"),
        (codecs.BOM_UTF16_LE + b"a\0b", None, "is not UTF-16-LE text (byte 2 does not fit)"),
        (b"a\x81", "cp1252", "is not CP1252 text (byte 1 does not fit)"),
    ],
)
def test_files_that_are_no_text(tmp_path, content, encoding, said):
    path = tmp_path / "file.txt"
    path.write_bytes(content)
    message = error_of([str(path)], encoding)
    assert str(path) in message
    assert said in message


def test_missing_files_and_folders(tmp_path):
    assert "does not exist" in error_of([str(tmp_path / "nothing.txt")])
    assert "is a folder: --file takes a text file" in error_of([str(tmp_path)])
    assert "can be read only once" in error_of(["-", "-"])
    assert "cannot read the file '~nobody-at-all/x'" in error_of(["~nobody-at-all/x"])
    assert "cannot read the file" in error_of(["x" * 5000])


@pytest.mark.skipif(sys.platform == "win32", reason="devices")
@pytest.mark.parametrize("name", ["/dev/full", "/dev/zero", "/dev/null", "link"])
def test_what_may_never_end_is_refused(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("/dev/zero")
    assert error_of([name]) == f"cannot read the file {name!r}: is no regular file"


@pytest.mark.skipif(sys.platform == "win32", reason="pipes")
def test_what_comes_out_of_a_command(tmp_path):
    """As a shell gives it for `<(command)`."""
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["sh", "-c", f"echo text > {tmp_path / 'pipe'}"]):
        assert read_files([str(tmp_path / "pipe")]) == ["text\n"]


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="reads everything")
def test_files_that_may_not_be_read(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("text")
    path.chmod(0)
    assert "Permission denied" in error_of([str(path)])


def test_standard_input(tmp_path, monkeypatch):
    path = tmp_path / "input"
    path.write_bytes(codecs.BOM_UTF16_LE + "a\r\nb".encode("utf-16-le"))
    with path.open("rb") as file:
        monkeypatch.setattr(sys, "stdin", TextIOWrapper(file))
        assert read_files(["-"]) == ["a\nb"]
    monkeypatch.setattr(sys, "stdin", None)
    assert error_of(["-"]) == "standard input is closed, and --file - reads it"


@pytest.mark.parametrize("name", ["hex", "rot13", "base64", "no-such-encoding", "", "\0"])
def test_what_is_no_encoding(name):
    with pytest.raises(UserError, match="--encoding must name an encoding of text") as caught:
        check_encoding(name)
    assert f"mean {name!r}" not in str(caught.value)


@pytest.mark.parametrize("name", ["latin_1", "cp125", "utf9", "hex_", "bas64", "uu_codec", "mbsc"])
def test_only_encodings_of_text_are_suggested(name):
    try:
        check_encoding(name)
    except UserError as error:
        for suggested in re.findall("Did you mean '(.*)'", str(error)):
            check_encoding(suggested)


def test_questions():
    check_question("--prompt", TEXT)
    with pytest.raises(UserError, match=r"--prompt is not text in the encoding it came in \(at character 1\)"):
        check_question("--prompt", "a\udcff")
