"""Atomic writes: a target is complete or unchanged."""

import errno
import os
import shutil
import signal
import stat
from pathlib import Path

import pytest

from owl2.errors import ErrorCode
from owl2.files import (
    atomic_directory,
    atomic_file,
    atomic_write_text,
    exclusive_directory,
    require_new,
    require_writable,
    restore_directory,
)
from tests.errors import raises_input_error
from tests.forks import run_in_fork


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_directory_appears_only_when_the_block_ends(tmp_path):
    target = tmp_path / "runs" / "model"
    with atomic_directory(target) as part:
        (part / "config.json").write_text("{}")
        assert not target.exists()
        assert part.parent.parent == target.parent
    assert names(target.parent) == ["model"]
    assert names(target) == ["config.json"]


def test_directory_replaces_an_existing_one(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "old.bin").write_text("old")
    with atomic_directory(target) as part:
        (part / "new.bin").write_text("new")
        assert names(target) == ["old.bin"]
    assert names(target) == ["new.bin"]
    assert names(tmp_path) == ["model"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("exists", [False, True])
def test_failed_directory_changes_nothing(tmp_path, error, exists):
    target = tmp_path / "model"
    if exists:
        target.mkdir()
        (target / "old.bin").write_text("old")
    with pytest.raises(error), atomic_directory(target) as part:
        (part / "deep").mkdir()
        (part / "deep" / "partial.bin").write_text("partial")
        raise error
    assert names(tmp_path) == (["model"] if exists else [])
    if exists:
        assert names(target) == ["old.bin"]


def test_the_next_directory_removes_what_a_killed_process_left(tmp_path):
    target = tmp_path / "model"

    def write_until_killed():
        with atomic_directory(target) as part:
            (part / "weights").write_text("x")
            os.kill(os.getpid(), signal.SIGKILL)

    assert run_in_fork(write_until_killed) == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    with atomic_directory(tmp_path / "other"), atomic_directory(target):
        assert left.exists()  # it is new: its process may not have locked it yet
    similar = tmp_path / ".model.part-2.previous"  # of a target `model.part-2`
    similar.mkdir()
    hour_ago = left.stat().st_mtime - 3600
    os.utime(left, (hour_ago, hour_ago))
    os.utime(similar, (hour_ago, hour_ago))
    with atomic_directory(target) as part:
        os.utime(part.parent, (hour_ago, hour_ago))
        assert not left.exists()
        assert similar.exists()
        with atomic_directory(target) as other:  # does not remove that of a live process
            assert part.exists()
            assert other != part


def test_existing_directory_is_restored_if_the_rename_fails(tmp_path, monkeypatch):
    target = tmp_path / "model"
    target.mkdir()
    (target / "old.bin").write_text("old")
    rename = Path.rename

    def failing(self, to):
        if to == target and self.name == "model":
            raise OSError("no space")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", failing)
    with (
        raises_input_error(ErrorCode.WRITE_FAILED, target, "no space"),
        atomic_directory(target) as part,
    ):
        (part / "new.bin").write_text("new")
    assert names(tmp_path) == ["model"]
    assert names(target) == ["old.bin"]


def replace_and_die(target, renames):
    """Replace a directory, and kill this process after a number of renames."""
    rename, calls = Path.rename, []

    def killing(self, to):
        if len(calls) == renames:
            os.kill(os.getpid(), signal.SIGKILL)
        calls.append(self)
        return rename(self, to)

    Path.rename = killing
    with atomic_directory(target) as directory:
        (directory / "new.bin").write_text("new")


@pytest.mark.parametrize("renames", [0, 1])
def test_process_killed_between_the_renames_leaves_the_old_directory(tmp_path, renames):
    target = tmp_path / "model"
    target.mkdir()
    (target / "old.bin").write_text("old")
    assert run_in_fork(replace_and_die, target, renames) == -signal.SIGKILL
    assert target.exists() == (renames == 0)
    for part in tmp_path.glob(".model.part-*"):
        shutil.rmtree(part)  # as a resumed training does
    restore_directory(target)
    assert names(target) == ["old.bin"]
    assert names(tmp_path) == ["model"]


def test_a_directory_is_exclusive_until_the_end_of_its_process(tmp_path, other_process_in):
    directory = tmp_path / "run"
    with (
        other_process_in(directory),
        raises_input_error(ErrorCode.CONFLICT, directory),
        exclusive_directory(directory),
    ):
        pass
    for _ in range(2):  # the other process was killed
        with exclusive_directory(directory):
            assert names(directory) == [".lock"]
        assert names(directory) == []


def test_interrupted_replacement_is_repeated(tmp_path):
    (tmp_path / ".model.previous").mkdir()
    (tmp_path / ".model.previous" / "old.bin").write_text("old")
    with pytest.raises(KeyError), atomic_directory(tmp_path / "model"):
        raise KeyError
    assert names(tmp_path / "model") == ["old.bin"]
    with atomic_directory(tmp_path / "model") as part:
        (part / "new.bin").write_text("new")
    assert names(tmp_path / "model") == ["new.bin"]
    assert names(tmp_path) == ["model"]


def test_directory_has_the_permissions_of_mkdir(tmp_path):
    (tmp_path / "plain").mkdir()
    with atomic_directory(tmp_path / "atomic"):
        pass
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "atomic")]
    assert modes[0] == modes[1]


def test_directory_does_not_replace_a_file(tmp_path):
    (tmp_path / "model").write_text("a file")
    target = tmp_path / "model"
    with raises_input_error(ErrorCode.FILE_EXISTS, target), atomic_directory(target):
        pass
    assert (tmp_path / "model").read_text() == "a file"


def test_parent_that_cannot_be_created(tmp_path):
    (tmp_path / "file").write_text("")
    target = tmp_path / "file/a/b"
    with raises_input_error(ErrorCode.WRITE_FAILED, target), atomic_directory(target):
        pass
    with raises_input_error(ErrorCode.WRITE_FAILED, target):
        atomic_write_text(target, "{}")


def test_file_is_replaced_in_one_step(tmp_path):
    path = tmp_path / "eval" / "results.json"
    atomic_write_text(path, "old")
    atomic_write_text(path, "new: ü")
    assert path.read_text(encoding="utf-8") == "new: ü"
    assert names(path.parent) == ["results.json"]


def test_failed_file_changes_nothing(tmp_path):
    path = tmp_path / "results.json"
    atomic_write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        atomic_write_text(path, "partial \ud800")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["results.json"]


def test_file_does_not_replace_a_directory(tmp_path):
    with raises_input_error(ErrorCode.FILE_EXISTS, tmp_path):
        atomic_write_text(tmp_path, "text")


def test_write_errors_name_the_target(tmp_path, monkeypatch):
    with raises_input_error(ErrorCode.WRITE_FAILED, "/proc/out"):
        atomic_directory("/proc/out").__enter__()
    with raises_input_error(ErrorCode.WRITE_FAILED, "/proc/out"):
        atomic_write_text("/proc/out", "text")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    target = tmp_path / "model"
    with raises_input_error(ErrorCode.WRITE_FAILED, target), atomic_directory(target) as part:
        (part / "partial.bin").write_text("partial")
        raise full
    monkeypatch.setattr(Path, "open", lambda *_, **__: (_ for _ in ()).throw(full))
    with raises_input_error(ErrorCode.WRITE_FAILED, tmp_path / "a.json"):
        atomic_write_text(tmp_path / "a.json", "text")
    assert names(tmp_path) == []


def test_require_writable_creates_nothing(tmp_path):
    require_writable(tmp_path / "a" / "b")
    require_new(tmp_path / "a" / "b")
    assert names(tmp_path) == []
    (tmp_path / "file").write_text("")
    with raises_input_error(ErrorCode.FILE_EXISTS, tmp_path / "file"):
        require_new(tmp_path / "file")
    for target in ("/proc/a/b", tmp_path / "file" / "a"):
        with raises_input_error(ErrorCode.WRITE_FAILED, target):
            require_writable(target)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("exists", [False, True])
def test_file_written_in_chunks_is_complete_or_unchanged(tmp_path, error, exists):
    target = tmp_path / "rows.jsonl"
    if exists:
        target.write_text("old")
    with pytest.raises(error), atomic_file(target) as file:
        file.write("partial")
        file.flush()
        assert target.exists() == exists
        raise error
    assert names(tmp_path) == (["rows.jsonl"] if exists else [])
    with atomic_file(target) as file:
        file.write("é")
        file.write("ü")
    assert names(tmp_path) == ["rows.jsonl"]
    assert target.read_text(encoding="utf-8") == "éü"
