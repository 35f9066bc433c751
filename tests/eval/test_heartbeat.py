"""Signs of life of several processes."""

import signal
import subprocess
import sys
import time

import pytest

from owl2.errors import InputError
from owl2.eval import heartbeat
from owl2.eval.heartbeat import Others, beating, forget
from owl2.eval.sharding import Team

FIRST, SECOND = Team(0, 2), Team(1, 2)
BEATING = """
import sys, time
from pathlib import Path
from owl2.eval import heartbeat
from owl2.eval.sharding import Team
heartbeat.BEAT_SECONDS = 0.02
with heartbeat.beating(Path(sys.argv[1]), Team(1, 2)):
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(heartbeat, "QUIET_SECONDS", 1.5)


@pytest.mark.slow
def test_a_process_that_is_killed_is_seen(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", BEATING, str(tmp_path)])
    try:
        others = Others(tmp_path, FIRST)
        while not (tmp_path / "process-1.alive").exists():
            assert others.dead() == set(), "not yet begun"
            assert process.poll() is None
        until = time.monotonic() + 2.0
        while time.monotonic() < until:
            assert others.dead() == set()
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        while not others.dead() and time.monotonic() < killed + 30:
            time.sleep(0.02)
        assert others.dead() == {1}
    finally:
        process.kill()
        process.wait()


def test_what_an_earlier_evaluation_left_is_no_sign(tmp_path):
    with beating(tmp_path, SECOND):
        pass
    assert (tmp_path / "process-1.alive").exists()
    with beating(tmp_path, FIRST):
        assert list(tmp_path.iterdir()) == []
    with beating(tmp_path, SECOND):
        forget(tmp_path)
        time.sleep(0.5)
        assert (tmp_path / "process-1.alive").exists(), "who lives says so again"


def test_alone_there_is_nothing_to_say(tmp_path):
    with beating(tmp_path / "not yet there", Team()):
        assert not (tmp_path / "not yet there").exists()
    assert Others(tmp_path, Team()).dead() == set()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(InputError, match=r"process-1\.alive cannot be written"),
        beating(tmp_path / "file" / "answers", SECOND),
    ):
        pass


def test_a_sign_that_cannot_be_written_is_tried_again(tmp_path, monkeypatch):
    beat, failures = heartbeat._beat, []

    def sometimes(path):
        if len(failures) in (1, 2):
            failures.append(1)
            raise OSError("the disk is full")
        failures.append(1)
        beat(path)

    monkeypatch.setattr(heartbeat, "_beat", sometimes)
    with beating(tmp_path, SECOND):
        first = (tmp_path / "process-1.alive").read_text()
        time.sleep(0.4)
        assert (tmp_path / "process-1.alive").read_text() != first
