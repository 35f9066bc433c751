"""`owl2 caption`, killed, resumed and with several processes: the output is the same."""

import os
import resource
import signal
import subprocess
import sys
import threading

import pytest

from owl2 import sharded_jsonl
from owl2.caption import command
from owl2.data import image_records
from owl2.errors import ErrorCode, InputError
from owl2.files import atomic_write_text
from owl2.sharded_jsonl import ShardedJsonl
from owl2.workers import WorkerRank
from tests.caption.conftest import DONE, NAMES, files, report, rows, run
from tests.engine.conftest import random_image
from tests.errors import raises_input_error


def part(config, rank=0):
    return config.output.with_name(f"{config.output.stem}.part-{rank}.jsonl")


def write_part(config, record, worker):
    options = ("file_name", "error", "error", config.output)
    stat = (config.folder / record["file_name"]).stat()
    with ShardedJsonl(config.output, config.settings, worker, *options) as records:
        records.append([record | {"version": f"{stat.st_size}-{stat.st_mtime_ns}"}])


@pytest.fixture
def environment(monkeypatch):
    def become(rank, world_size):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world_size))

    return become


def test_killed_run_is_resumed(config, stub):
    """The run is another process, which signal 9 ends while it computes the next caption."""
    complete = config.output.with_name("complete.jsonl")
    run(config, output=complete)
    stub.asked.clear()
    for count in (2, 4):
        readable, writable = os.pipe()
        child = os.fork()
        if not child:

            def stop_at(name, count=count, writable=writable):
                if name == NAMES[count]:
                    os.write(writable, b".")
                    threading.Event().wait()

            stub.before_each = stop_at
            run(config)
            os._exit(0)
        assert os.read(readable, 1) == b"."
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        os.close(readable)
        os.close(writable)
        assert part(config).read_bytes().count(b"\n") == count + 1
    assert not config.output.exists()
    with part(config).open("ab") as file:
        file.write(b'{"file_name": "d.p')
    printed = run(config)
    assert config.output.read_bytes() == complete.read_bytes()
    assert stub.asked == NAMES[4:], "only the missing caption is computed"
    assert "4/5" in printed
    assert not part(config).exists()


def test_complete_run_loads_no_model(config, stub, monkeypatch):
    run(config)
    before = config.output.read_bytes()
    monkeypatch.setattr(command, "load_engine", lambda *_: pytest.fail("a model is loaded"))
    run(config)
    assert config.output.read_bytes() == before
    assert len(stub.asked) == len(NAMES)


def test_changed_folder(config, folder, stub):
    (folder / "bad.png").touch()
    run(config)
    stub.asked.clear()
    random_image(9).save(folder / "aa.png")
    (folder / "d.png").unlink()
    (folder / "bad.png").rename(folder / "good.png")
    (folder / "bad2.png").touch()
    run(config)
    assert stub.asked == ["aa.png", "bad2.png", "good.png"]
    names = ["a.png", "aa.png", "b/1.jpg", "b/2.PNG", "c.webp", "good.png"]
    assert [row["file_name"] for row in rows(config)] == names
    assert [row["file_name"] for row in report(config)["errors"]] == ["bad2.png"]


def replace_image(path, *, same_size):
    """Replace the content; a modification time as `cp -p` sets it may be older."""
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + (b"" if same_size else b"0"))
    assert (path.stat().st_size == size) is same_size
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize("same_size", [True, False])
def test_images_that_have_changed_are_captioned_again(config, folder, stub, same_size):
    run(config)
    before = rows(config)
    stub.asked.clear()
    replace_image(folder / "b/1.jpg", same_size=same_size)
    run(config)
    assert stub.asked == ["b/1.jpg"]
    assert rows(config) == before


def test_an_image_that_has_changed_during_an_interruption_is_captioned_again(config, folder, stub):
    write_part(config, {"file_name": "a.png", "caption": "old"}, WorkerRank(0, 1))
    write_part(config, {"file_name": "c.webp", "caption": "kept"}, WorkerRank(1, 2))
    replace_image(folder / "a.png", same_size=True)
    run(config)
    assert [row["caption"] for row in rows(config)][::3] == ["a a.png", "kept"]


def test_failed_images_are_retried(config, folder, stub):
    (folder / "bad.png").touch()
    run(config)
    stub.asked.clear()
    run(config)
    assert stub.asked == ["bad.png"]
    assert files(config) == DONE


def test_unfinished_captions_with_other_settings_are_not_mixed(config, stub):
    write_part(config, {"file_name": "a.png", "caption": "red"}, WorkerRank())
    with raises_input_error(ErrorCode.RESUME_MISMATCH, "another prompt"):
        run(config, prompt="what?")
    run(config)
    assert rows(config)[0] == {"file_name": "a.png", "caption": "red"}


def test_caption_of_one_process_replaces_the_error_of_another(config, stub):
    write_part(config, {"file_name": "c.webp", "error": "busy"}, WorkerRank(2, 3))
    write_part(config, {"file_name": "c.webp", "caption": "red"}, WorkerRank(1, 2))
    write_part(config, {"file_name": "a.png", "caption": "blue"}, WorkerRank(0, 1))
    run(config)
    assert "c.webp" not in stub.asked
    assert [row["caption"] for row in rows(config)][::3] == ["blue", "red"]


def test_processes_share_the_images(config, stub, environment):
    alone = config.output.with_name("alone.jsonl")
    run(config, output=alone)
    stub.asked.clear()
    environment(1, 3)
    run(config)
    assert stub.asked == NAMES[1::3]
    assert not config.output.exists()
    environment(2, 3)
    run(config)
    environment(0, 3)
    run(config)
    assert sorted(stub.asked) == NAMES
    assert config.output.read_bytes() == alone.read_bytes()
    assert not part(config, "*").exists()
    assert [name for name in files(config) if "captions" in name] == DONE


def test_missing_process_and_fewer_processes_afterwards(config, stub, environment, monkeypatch):
    monkeypatch.setattr(sharded_jsonl, "TIMEOUT_SECONDS", 0.0)
    environment(0, 2)
    with raises_input_error(ErrorCode.PROCESS_FAILED, "2 records of 5"):
        run(config)
    environment(0, 1)
    stub.asked.clear()
    run(config)
    assert stub.asked == NAMES[1::2]
    assert [row["file_name"] for row in rows(config)] == NAMES


def test_an_error_leaves_the_captions_that_exist(config, stub):
    def fail(name):
        if name == NAMES[3]:
            raise InputError("The logits are not finite.", ErrorCode.NON_FINITE)

    stub.before_each = fail
    with raises_input_error(ErrorCode.NON_FINITE):
        run(config)
    stub.before_each = lambda name: None
    stub.asked.clear()
    run(config)
    assert stub.asked == NAMES[3:]


@pytest.mark.parametrize("full_at", ["captions", "report"])
def test_full_disk_is_an_input_error_and_the_run_is_resumed(config, folder, stub, full_at):
    """A limit on the size of files stands for the size of the disk."""
    for number in range(20):
        (folder / f"{number:02}.png").write_bytes(b"x")
    complete = config.output.with_name("complete.jsonl")
    run(config, output=complete)

    def fill_disk(*arguments):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (900, 900))
        return arguments and atomic_write_text(*arguments)

    pid = os.fork()
    if not pid:
        image_records.atomic_write_text = fill_disk
        if full_at == "captions":
            fill_disk()
        try:
            run(config)
        except InputError as error:
            os._exit(2 if error.code is ErrorCode.WRITE_FAILED else 3)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2
    written = part(config).read_bytes().count(b"\n") - 1
    assert 0 < written < 25 if full_at == "captions" else written == 25
    stub.asked.clear()
    run(config)
    assert len(stub.asked) == 25 - written
    assert config.output.read_bytes() == complete.read_bytes()


@pytest.mark.slow
def test_command_is_killed_repeatedly(config, folder, tmp_path):
    for number in range(150):
        random_image(number).save(folder / f"{number:03}.png")
    base = [
        sys.executable,
        "-m",
        "owl2",
        "caption",
        str(folder),
        "--model",
        config.model_args.model,
    ]
    base += ["--device", "cpu", "--dtype", "float32", "--batch-size", "4", "--recursive"]
    complete, output = tmp_path / "complete.jsonl", tmp_path / "killed.jsonl"
    subprocess.run([*base, "--output-file", str(complete)], check=True, timeout=300)
    records, killed = tmp_path / "killed.part-0.jsonl", 0
    while not output.exists():
        before = records.read_bytes().count(b"\n") if records.exists() else 0
        process = subprocess.Popen([*base, "--output-file", str(output)])
        while process.poll() is None:
            if records.exists() and records.read_bytes().count(b"\n") > before + 60:
                process.kill()
                killed += 1
                break
        process.wait()
    assert killed >= 2
    assert output.read_bytes() == complete.read_bytes()
