# SPDX-License-Identifier: Apache-2.0
import errno
import os
import stat
import sys

import pytest

from ropewalk.files import replacing


def write(path, text="new", error=None):
    with replacing(path) as unfinished:
        unfinished.write_text(text)
        if error is not None:
            raise error


def test_a_file_takes_the_place_of_another(tmp_path):
    path = tmp_path / "page"
    write(path)
    path.chmod(0o640)
    write(path, "newer")
    assert path.read_text() == "newer"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), ValueError()])
def test_what_was_there_stays_where_writing_fails(tmp_path, error):
    path = tmp_path / ("a" * 255)
    path.write_text("old")
    with pytest.raises(type(error)) as caught:
        write(path, "ne", error)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    assert getattr(caught.value, "filename", str(path)) == str(path)


def test_errors_name_what_was_asked_for(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "no" / "page", tmp_path / "file" / "page", tmp_path / ("a" * 300), tmp_path):
        with pytest.raises(OSError, match=r"\w") as caught:
            write(path)
        assert caught.value.filename == str(path)


@pytest.mark.skipif(sys.platform == "win32", reason="links and devices")
@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_followed(tmp_path, there):
    target, link = tmp_path / "target", tmp_path / "link"
    if there:
        target.write_text("old")
    link.symlink_to(target)
    write(link)
    assert link.is_symlink()
    assert target.read_text() == "new"


@pytest.mark.skipif(sys.platform == "win32", reason="links and devices")
def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/null")
    for name in ("pipe", "link"):
        with pytest.raises(OSError, match="is no regular file"):
            write(tmp_path / name)
        assert not (tmp_path / name).is_file()
