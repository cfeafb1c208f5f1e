"""Files that are written whole or not at all."""

import errno
import os
import subprocess
import sys
import textwrap

import pytest

from lorax.errors import LoraxError
from lorax.io import atomic


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_file_is_replaced_and_its_folders_are_made(tmp_path):
    path = tmp_path / "a" / "b.json"
    atomic.write_json(path, {"k": [1, "ü"]})
    assert path.read_text(encoding="utf-8") == '{\n  "k": [\n    1,\n    "ü"\n  ]\n}\n'
    atomic.write_text(path, "new\n")
    assert path.read_bytes() == b"new\n"
    assert names(path.parent) == ["b.json"]


def test_what_is_not_json_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        atomic.write_json(tmp_path / "x.json", float("nan"))
    assert names(tmp_path) == []


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, broken):
    path = tmp_path / "x"
    atomic.write_bytes(path, b"old")
    monkeypatch.setattr(os, broken, full_disk)
    with pytest.raises(LoraxError, match=r"x: cannot be written \(No space left on device\)"):
        atomic.write_bytes(path, b"new" * 999)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["x"]


def test_a_real_full_device_is_one_line():
    with pytest.raises(LoraxError, match="cannot be written"), atomic._explained("x"), open("/dev/full", "wb") as full:
        full.write(b"1" * 99999)


def test_an_error_of_the_writer_passes_through_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "x"
    atomic.write_bytes(path, b"old")

    def write():
        with atomic.open_new(path) as file:
            file.write(b"new")
            raise KeyError("mine")

    with pytest.raises(KeyError):
        write()
    assert (path.read_bytes(), names(tmp_path)) == (b"old", ["x"])


def test_a_place_that_cannot_be_is_an_error_with_its_name(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LoraxError, match="file/x"):
        atomic.write_bytes(tmp_path / "file" / "x", b"")
    with pytest.raises(LoraxError, match="file/d"), atomic.replace_dir(tmp_path / "file" / "d"):
        pass


def test_a_directory_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "deep" / "model"
    for text in ("one", "two"):
        with atomic.replace_dir(path) as new:
            assert names(new) == []
            (new / "sub").mkdir()
            (new / "sub" / text).write_text(text)
    assert names(path / "sub") == ["two"]
    assert names(path.parent) == ["model"]


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_an_unfinished_directory_leaves_the_old_one(tmp_path, error):
    path = tmp_path / "model"
    with atomic.replace_dir(path) as new:
        (new / "old").write_text("")

    def replace():
        with atomic.replace_dir(path) as new:
            (new / "half").write_text("")
            raise error

    with pytest.raises(error):
        replace()
    assert (names(path), names(tmp_path)) == (["old"], ["model"])


def test_a_rename_that_fails_brings_the_old_directory_back(tmp_path, monkeypatch):
    path = tmp_path / "model"
    with atomic.replace_dir(path) as new:
        (new / "old").write_text("")
    rename = os.rename

    def only_aside(source, target):
        if str(source).endswith(".tmp"):
            full_disk()
        rename(source, target)

    monkeypatch.setattr(os, "rename", only_aside)
    with pytest.raises(LoraxError, match="model: cannot be written"), atomic.replace_dir(path):
        pass
    assert (names(path), names(tmp_path)) == (["old"], ["model"])


def test_a_kill_between_the_two_renames_is_mended(tmp_path):
    path = tmp_path / "model"
    program = f"""
        import os, signal
        from lorax.io import atomic
        with atomic.replace_dir({str(path)!r}) as new:
            (new / "old").write_text("")
        rename, calls = os.rename, []
        def once(a, b):
            calls.append(a)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            rename(a, b)
        os.rename = once
        with atomic.replace_dir({str(path)!r}) as new:
            (new / "new").write_text("")
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=False).returncode == -9
    assert not path.exists()
    atomic.recover(path)
    assert names(path) == ["old"]
    with atomic.replace_dir(path) as new:
        (new / "newer").write_text("")
    assert names(path) == ["newer"]
