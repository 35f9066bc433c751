"""JSONL files that several processes write, and that a later run resumes."""

import fcntl
import itertools
import json
import signal
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import pytest

from owl2 import sharded_jsonl, workers
from owl2.errors import ErrorCode
from owl2.sharded_jsonl import ShardedJsonl, remove_parts, to_json
from owl2.workers import PeerMonitor, WorkerRank, heartbeat
from tests.errors import raises_input_error

ALONE = WorkerRank()
FIRST, SECOND = WorkerRank(0, 2), WorkerRank(1, 2)


def row(key):
    return {"key": key, "answer": f"answer {key} 🦉"}


@pytest.fixture
def make(tmp_path):
    """Opens the records of a task; all are closed at the end."""
    opened = []

    def records(settings=1, worker=ALONE, name="task", **options):
        opened.append(ShardedJsonl(tmp_path / f"{name}.jsonl", {"a": settings}, worker, **options))
        return opened[-1]

    yield records
    for one in opened:
        one.close()


@pytest.fixture
def write(make):
    """Writes records as a process that ends afterwards."""

    def run(*keys, **options):
        with make(**options) as records:
            records.append(map(row, keys))
        return records

    return run


@pytest.fixture
def polls(monkeypatch):
    """Functions to call between two polls of a process that waits, one after another."""
    actions = []

    def sleep(seconds):
        if actions:
            actions.pop(0)()

    monkeypatch.setattr(sharded_jsonl.time, "sleep", sleep)
    return actions


@pytest.fixture
def clock(monkeypatch):
    """The time in seconds, which advances by one second each time it is read."""
    counter = itertools.count()
    monkeypatch.setattr(sharded_jsonl.time, "monotonic", lambda: float(next(counter)))


# ------------------------------------------------------------------ resuming


def test_records_are_read_again(make, write):
    write("a", "b")
    write("c")
    records = make()
    records.wait(["c", "a"])
    assert [records.record(key) for key in ("c", "a")] == [row("c"), row("a")]
    assert "b" in records
    assert "d" not in records


def test_any_text_is_one_line(make):
    texts = ["\u2028 \x85 \x0b", "\r\n", "half \ud83e", "🦉"]
    with make() as records:
        records.append({"key": str(n), "answer": text} for n, text in enumerate(texts))
    again = make()
    assert [again.record(str(n))["answer"] for n in range(4)] == texts
    assert "🦉" in again.path.read_text(encoding="utf-8")


def test_lone_surrogates_are_readable_text():
    assert to_json({"half \ud83e": "🦉\udce9"}) == '{"half \\\\ud83e": "🦉\\\\udce9"}'


@pytest.mark.parametrize("lost", [1, 7, 20])
def test_torn_line_is_removed(make, write, lost):
    path = write("a", "b").path
    path.write_bytes(path.read_bytes()[:-lost])
    with make() as records:
        assert "a" in records
        assert "b" not in records
        records.append([row("c")])
    assert [json.loads(line).get("key") for line in path.open()] == [None, "a", "c"]


def test_file_without_records_is_removed(make):
    with make() as records:
        path = records.path
    assert not path.exists()


@pytest.mark.parametrize("text", [b"", b"{", b"not ours\n", b"[1]\n", b'{"settings": {"a": 2}}\n'])
def test_invalid_part_is_restarted(make, write, tmp_path, text):
    (tmp_path / "task.part-0.jsonl").write_bytes(text)
    with make() as records:
        assert records.restarted == text.endswith(b"\n")
    write("a")
    assert "a" in make()


def test_records_with_other_settings_are_discarded(make, write):
    write("a")
    assert not write("b").restarted
    with make(2) as second:
        assert "a" not in second
        assert second.restarted
    assert "a" not in make()


def test_other_settings_are_an_error(make, write):
    path = write("a").path
    before = path.read_bytes()
    with raises_input_error(ErrorCode.RESUME_MISMATCH, "another a"):
        make(2, on_other_settings="error")
    assert path.read_bytes() == before


@pytest.mark.parametrize("line", ["not JSON", "[1]", '{"answer": "a"}'])
@pytest.mark.parametrize("is_header", [True, False])
def test_foreign_line_is_an_error(make, tmp_path, line, is_header):
    header = "" if is_header else '{"settings": {"a": 1}}\n'
    path = tmp_path / "task.part-3.jsonl"
    path.write_text(f"{header}{line}\n")
    with raises_input_error(ErrorCode.INVALID_FORMAT, path, f"byte {len(header)}"):
        make(on_other_settings="error")


def test_valid_records_before_a_foreign_line_are_kept(make, write):
    path = write("a").path
    with path.open("a") as file:
        file.write("not ours\n")
    with make() as records:
        assert "a" in records
        assert not records.restarted
        records.append([row("b")])
    assert {"a", "b"} <= {json.loads(line).get("key") for line in path.open()}


def test_tasks_are_separate(make, write, tmp_path):
    write("a", name="task")
    write("b", name="task_2")
    with make(name="task") as records:
        assert "a" in records
        assert "b" not in records
        remove_parts(tmp_path / "task.jsonl")
    assert "b" in make(name="task_2")
    assert "a" not in make(name="task")


def test_failed_record_is_retried_and_replaced(make):
    failed, good = {"key": "a", "error": "busy"}, {"key": "a", "answer": "red"}
    with make(retry="error") as records:
        records.append([failed])
    with make(retry="error", worker=SECOND) as records:
        assert "a" not in records
        records.wait(["a"])
        assert records.record("a") == failed
        records.append([good, failed])
    records = make(retry="error")
    assert "a" in records
    assert records.record("a") == good


def test_finished_file_counts(make, tmp_path):
    finished = tmp_path / "task.jsonl"
    finished.write_text(f"{to_json(row('a'))}\n")
    records = make(finished=finished)
    assert "a" in records
    assert records.record("a") == row("a")


def test_directory_that_cannot_be_written(make, tmp_path):
    (tmp_path / "task.part-0.jsonl").mkdir()
    with raises_input_error(ErrorCode.WRITE_FAILED, "task.part-0.jsonl"):
        make()


# ------------------------------------------------------------------ several processes


def test_two_processes_cannot_write_one_part(make, tmp_path):
    path = tmp_path / "task.part-0.jsonl"
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # the weakest lock
        with raises_input_error(ErrorCode.CONFLICT, "task.part-0.jsonl", "RANK"):
            make()
        assert path.exists()
    make()


def test_line_of_another_process_is_read_when_it_is_complete(make, tmp_path):
    records = make(worker=FIRST)
    text = f"{to_json({'settings': {'a': 1}})}\n{to_json(row('a'))}\n".encode()
    for end in (10, 30, len(text)):
        (tmp_path / "task.part-1.jsonl").write_bytes(text[:end])
        records.refresh()
        assert ("a" in records) == (end == len(text))


def test_first_process_waits_for_the_others(make, polls, tmp_path):
    first, second = make(worker=FIRST), make(worker=SECOND)
    first.append([row("a")])
    polls += [lambda: None, lambda: second.append([row("b")])]
    first.wait(["a", "b"])
    assert polls == []
    assert first.record("b") == row("b")
    remove_parts(tmp_path / "task.jsonl")
    assert not first.path.exists()
    assert not second.path.exists()


@pytest.mark.usefixtures("polls", "clock")
def test_wait_ends_when_no_record_is_added(make):
    first = make(worker=FIRST)
    first.append([row("a")])
    with raises_input_error(ErrorCode.PROCESS_FAILED, "1 records of 2"):
        first.wait(["a", "b"])


def test_single_process_does_not_wait(make, write):
    write("a")
    with raises_input_error(ErrorCode.PROCESS_FAILED, "1 records of 2"):
        make().wait(["a", "b"])


def test_wait_ends_when_a_process_died(make, tmp_path, polls, clock):
    first, second, third = (make(worker=WorkerRank(rank, 3)) for rank in range(3))
    first.append([row("a"), row("d")])
    for rank in (1, 2):
        (tmp_path / f"process-{rank}.alive").write_text("0")

    def beat():
        (tmp_path / "process-2.alive").write_text(str(len(polls)))

    polls += [beat] * 60
    polls.append(lambda: second.append([row("b")]))
    polls[40] = lambda: third.append([row("c"), row("f")])
    with raises_input_error(ErrorCode.PROCESS_FAILED, "process 1"):
        first.wait(["a", "b", "c", "d", "e", "f"])
    second.append([row("b"), row("e")])
    first.wait(["a", "b", "c", "d", "e", "f"])  # all processes have ended, and nothing is missing


# ------------------------------------------------------------------ heartbeats


def test_monitor_detects_a_heartbeat_that_stops(tmp_path, clock):
    monitor = PeerMonitor(tmp_path, FIRST)
    for _ in range(100):
        assert monitor.dead_ranks() == set()  # it has not started
    file = tmp_path / "process-1.alive"
    for beat in range(100):
        file.write_text(str(beat))
        assert monitor.dead_ranks() == set()
    dead = [monitor.dead_ranks() for _ in range(40)]
    assert dead[0] == set()
    assert dead[-1] == {1}
    file.write_text("again")
    assert monitor.dead_ranks() == set()
    assert PeerMonitor(tmp_path, WorkerRank()).dead_ranks() == set()


def test_first_process_removes_heartbeats_of_earlier_runs(tmp_path):
    with heartbeat(tmp_path, SECOND):
        pass
    assert (tmp_path / "process-1.alive").exists()
    with heartbeat(tmp_path, FIRST):
        assert list(tmp_path.iterdir()) == []
    with heartbeat(tmp_path / "missing", WorkerRank()):
        assert not (tmp_path / "missing").exists()


def test_heartbeat_continues_after_a_failed_write(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "HEARTBEAT_SECONDS", 0.001)
    write_text, calls, written = Path.write_text, itertools.count(), threading.Event()

    def write(path, text):
        call = next(calls)
        if call == 1:
            raise OSError("The disk is full.")
        write_text(path, text)
        if call == 2:
            written.set()

    monkeypatch.setattr(Path, "write_text", write)
    with heartbeat(tmp_path, SECOND):
        assert written.wait(30)


def test_heartbeat_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        raises_input_error(ErrorCode.WRITE_FAILED, "process-1.alive"),
        heartbeat(tmp_path / "file" / "responses", SECOND),
    ):
        pass


def test_records_are_not_kept_in_memory(make):
    with make() as records:
        records.append({"key": str(number), "answer": "x" * 10_000} for number in range(500))
    tracemalloc.start()
    try:
        records = make()
        assert tracemalloc.get_traced_memory()[0] < 1_000_000  # of 5 MB
    finally:
        tracemalloc.stop()
    assert len(records.record("499")["answer"]) == 10_000


KILLED = """
import sys, threading
from pathlib import Path
from owl2 import workers
workers.HEARTBEAT_SECONDS = 0.02
with workers.heartbeat(Path(sys.argv[1]), workers.WorkerRank(1, 2)):
    print("running", flush=True)
    threading.Event().wait()
"""


@pytest.mark.slow
def test_killed_process_is_detected(make, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "DEAD_AFTER_SECONDS", 1.5)
    first = make(worker=FIRST)
    first.append([row("a")])
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    timer = threading.Timer(4.0, process.kill)
    try:
        assert process.stdout.readline() == "running\n"
        timer.start()
        with raises_input_error(ErrorCode.PROCESS_FAILED, "process 1"):
            first.wait(["a", "b"])
        assert process.poll() == -signal.SIGKILL, "it is detected after its end"
    finally:
        timer.cancel()
        process.kill()
        process.wait()
