"""Directories of uploads, their owners, quotas and deletion."""

import logging
import os
import signal
import time

import anyio
import pytest

from owl2.serve.config import ServerLimits
from owl2.serve.errors import ApiError
from owl2.serve.web.uploads import LOCK, PREFIX, UploadStore, create_private_directory

LIMITS = ServerLimits(max_upload_bytes=300, max_client_upload_bytes=200)


@pytest.fixture
def store(tmp_path):
    return UploadStore(str(tmp_path), LIMITS)


def add(store, size, owner="me", client="192.0.2.1"):
    directory = store.begin(owner, client)
    try:
        store.add(directory, size)
    except ApiError as error:
        store.delete(directory)
        return error.status, error.code
    (directory / "digest").mkdir()
    (directory / "digest" / "cat.png").write_bytes(b"x")
    return directory


def test_quotas_of_a_client_and_of_all_clients(store, caplog):
    full = (429, "upload_quota_exceeded")
    first = add(store, 200)
    assert add(store, 1) == full
    assert add(store, 1, owner="another cookie") == full
    assert add(store, 101, client="192.0.2.2") == (507, "upload_quota_exceeded")
    add(store, 100, client="192.0.2.2")
    assert add(store, 1, client="192.0.2.3") == (507, "upload_quota_exceeded")
    warnings = [one for one in caplog.records if one.levelno == logging.WARNING]
    assert len(warnings) == 2  # one for each quota
    store.delete(first)
    assert add(store, 200).is_dir()


def test_only_the_owner_reads_an_upload(store):
    directory = add(store, 1)
    file = directory / "digest" / "cat.png"
    store.page_files.add(str(store.directory.parent / "example.png"))
    assert store.can_read("me", str(file))
    paths = [
        *(directory, store.directory, store.directory.parent, file.parent, file / "x"),
        *(file.with_name("dog.png"), file.parent / ".." / "digest" / "cat.png"),
        *(store.directory.parent / "example.png", "cat.png", "", "/", "x" * 5000, "\0"),
    ]
    assert [path for path in paths if store.can_read("me", str(path))] == []
    for visitor in ("", "another"):
        assert not store.can_read(visitor, str(file))
    (store.directory.parent / "example.png").write_bytes(b"x")
    assert store.can_read("", str(store.directory.parent / "example.png"))


def test_expired_uploads_are_deleted(store, monkeypatch):
    old = add(store, 150)
    used = add(store, 20)
    now = time.time()
    monkeypatch.setattr("time.time", lambda: now + 1000)
    assert store.can_read("me", str(used / "digest" / "cat.png"))
    new = add(store, 30)
    anyio.run(store.delete_expired, 500)
    assert not old.exists() and new.is_dir() and used.is_dir()
    assert add(store, 150).is_dir()  # the quota is free again
    store.close()
    assert not store.directory.exists()


def test_an_upload_that_cannot_be_deleted_still_counts(store, monkeypatch):
    directory = add(store, 200)
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)
    anyio.run(store.delete_expired, -1)
    assert directory.exists()
    assert add(store, 1) == (429, "upload_quota_exceeded")
    monkeypatch.undo()
    anyio.run(store.delete_expired, -1)
    assert add(store, 200).is_dir()


def start_server(parent):
    """A process with a directory: its id, and the directory."""
    reader, writer = os.pipe()
    process = os.fork()
    if not process:
        try:
            os.write(writer, create_private_directory(str(parent)).encode())
            signal.pause()
        finally:
            os._exit(1)
    os.close(writer)
    return process, os.read(reader, 1000).decode()


def kill(process):
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def test_directories_of_killed_servers_are_deleted_at_the_next_start(tmp_path, monkeypatch):
    killed, of_killed = start_server(tmp_path)
    running, of_running = start_server(tmp_path)
    others = [tmp_path / f"{PREFIX}without-lock", tmp_path / "other", tmp_path / f"{PREFIX}link"]
    others[0].mkdir()
    others[1].mkdir()
    (others[1] / LOCK).touch()
    others[2].symlink_to(others[1])
    at_exit = []
    monkeypatch.setattr("atexit.register", lambda *call, **options: at_exit.append((call, options)))
    try:
        assert os.stat(of_killed).st_mode & 0o077 == 0
        kill(killed)
        directory = create_private_directory(str(tmp_path))
        assert not os.path.exists(of_killed)
        assert os.path.isdir(of_running) and os.path.isdir(directory)
        assert all(other.exists() for other in others)
        [((delete, *arguments), options)] = at_exit
        delete(*arguments, **options)
        assert not os.path.exists(directory)
    finally:
        kill(running)


def test_a_directory_without_a_parent_is_in_the_temporary_directory(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    directory = create_private_directory()
    assert os.path.dirname(directory) == os.path.realpath(tmp_path)
    assert create_private_directory(str(tmp_path / "new" / "place")).startswith(
        os.path.realpath(tmp_path / "new" / "place")
    )
