import errno
import os
import stat
from pathlib import Path

import pytest

from owl2.errors import InputError
from owl2.files import atomic_directory, atomic_file, atomic_write_text, require_writable


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_directory_appears_only_when_the_block_ends(tmp_path):
    target = tmp_path / "runs" / "model"
    with atomic_directory(target) as part:
        (part / "config.json").write_text("{}")
        assert not target.exists()
        assert part.parent == target.parent
    assert names(target.parent) == ["model"]
    assert names(target) == ["config.json"]


def test_directory_replaces_an_older_one_altogether(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "old.bin").write_text("old")
    with atomic_directory(target) as part:
        (part / "new.bin").write_text("new")
        assert names(target) == ["old.bin"]
    assert names(target) == ["new.bin"]
    assert names(tmp_path) == ["model"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("older", [False, True])
def test_directory_failure_leaves_everything_as_it_was(tmp_path, error, older):
    target = tmp_path / "model"
    if older:
        target.mkdir()
        (target / "old.bin").write_text("old")
    with pytest.raises(error), atomic_directory(target) as part:
        (part / "deep").mkdir()
        (part / "deep" / "half.bin").write_text("half")
        raise error
    assert names(tmp_path) == (["model"] if older else [])
    if older:
        assert names(target) == ["old.bin"]


def test_older_directory_comes_back_when_the_last_rename_fails(tmp_path, monkeypatch):
    target = tmp_path / "model"
    target.mkdir()
    (target / "old.bin").write_text("old")
    rename = Path.rename

    def failing(self, to):
        if ".part-" in self.name:
            raise OSError("no space")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", failing)
    with (
        pytest.raises(InputError, match="model cannot be written: no space"),
        atomic_directory(target) as part,
    ):
        (part / "new.bin").write_text("new")
    assert names(tmp_path) == ["model"]
    assert names(target) == ["old.bin"]


def test_directory_is_as_readable_as_one_made_by_mkdir(tmp_path):
    (tmp_path / "plain").mkdir()
    with atomic_directory(tmp_path / "whole"):
        pass
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "whole")]
    assert modes[0] == modes[1]


def test_directory_refuses_a_file_in_its_place(tmp_path):
    (tmp_path / "model").write_text("a file")
    with pytest.raises(InputError, match="model is a file"), atomic_directory(tmp_path / "model"):
        pass
    assert (tmp_path / "model").read_text() == "a file"


def test_parent_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be made"), atomic_directory(tmp_path / "file/a/b"):
        pass
    with pytest.raises(InputError, match="cannot be made"):
        atomic_write_text(tmp_path / "file/a/b.json", "{}")


def test_file_is_replaced_in_one_step(tmp_path):
    path = tmp_path / "eval" / "results.json"
    atomic_write_text(path, "old")
    atomic_write_text(path, "neu: ü")
    assert path.read_text(encoding="utf-8") == "neu: ü"
    assert names(path.parent) == ["results.json"]


def test_file_failure_leaves_the_old_one(tmp_path):
    path = tmp_path / "results.json"
    atomic_write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        atomic_write_text(path, "half \ud800")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["results.json"]


def test_file_refuses_a_directory_in_its_place(tmp_path):
    with pytest.raises(InputError, match="is a directory"):
        atomic_write_text(tmp_path, "text")


def test_what_the_file_system_refuses_names_the_target(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="/proc/out cannot be written: No such file"):
        atomic_directory("/proc/out").__enter__()
    with pytest.raises(InputError, match="/proc/out cannot be written: No such file"):
        atomic_write_text("/proc/out", "text")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    no_space = "cannot be written: No space left on device"
    with pytest.raises(InputError, match=no_space), atomic_directory(tmp_path / "model") as part:
        (part / "half.bin").write_text("half")
        raise full
    monkeypatch.setattr(os, "fdopen", lambda *_, **__: (_ for _ in ()).throw(full))
    with pytest.raises(InputError, match=no_space):
        atomic_write_text(tmp_path / "a.json", "text")
    assert names(tmp_path) == []


def test_whether_a_target_can_be_written_is_told_before_and_leaves_nothing(tmp_path):
    require_writable(tmp_path / "a" / "b")
    assert names(tmp_path) == []
    (tmp_path / "file").write_text("")
    for target in ("/proc/a/b", tmp_path / "file" / "a"):
        with pytest.raises(InputError, match=f"{target} cannot be written: No"):
            require_writable(target)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("older", [False, True])
def test_file_written_in_pieces_is_whole_or_as_it_was(tmp_path, error, older):
    target = tmp_path / "rows.jsonl"
    if older:
        target.write_text("old")
    with pytest.raises(error), atomic_file(target) as file:
        file.write("half")
        file.flush()
        assert target.exists() == older
        raise error
    assert names(tmp_path) == (["rows.jsonl"] if older else [])
    with atomic_file(target) as file:
        file.write("é")
        file.write("ü")
    assert names(tmp_path) == ["rows.jsonl"]
    assert target.read_text(encoding="utf-8") == "éü"
