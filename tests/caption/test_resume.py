"""`owl2 caption`, stopped, killed, started again, shared: the file is the same."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from owl2.caption import caption_files, command
from owl2.caption.caption_files import CaptionFiles
from owl2.errors import InputError
from owl2.eval.sharding import Team
from tests.caption.conftest import DONE, NAMES, changed, files, report, rows, run
from tests.engine.conftest import image


def test_killed_and_started_again(settings, stub):
    """In a process of its own, with signal 9: nothing has a chance to tidy up."""
    run(changed(settings, output=settings.output.with_name("whole.jsonl")))
    whole = settings.output.with_name("whole.jsonl").read_bytes()
    stub.asked.clear()
    part = settings.output.with_name("captions.part-0.jsonl")
    for count in (2, 4):
        child = os.fork()
        if not child:
            stub.seconds = 0.15
            run(settings)
            os._exit(0)
        deadline = time.monotonic() + 30
        while not part.exists() or part.read_bytes().count(b"\n") < count + 1:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert not settings.output.exists()
    with part.open("ab") as file:
        file.write(b'{"file_name": "d.p')
    told = run(settings)
    assert settings.output.read_bytes() == whole
    assert stub.asked in (NAMES[4:], []), "what was known is not asked again"
    assert "answered earlier; going on" in told
    assert not part.exists()


def test_nothing_new_loads_no_model(settings, stub, monkeypatch):
    run(settings)
    before = settings.output.read_bytes()
    monkeypatch.setattr(command, "_load", lambda *_: pytest.fail("a model is loaded"))
    run(settings)
    assert settings.output.read_bytes() == before and len(stub.asked) == len(NAMES)


def test_a_folder_that_changed(settings, folder, stub):
    (folder / "bad.png").touch()
    run(settings)
    stub.asked.clear()
    image(9).save(folder / "aa.png")
    (folder / "d.png").unlink()
    (folder / "bad.png").rename(folder / "good.png")
    (folder / "bad2.png").touch()
    run(settings)
    assert stub.asked == ["aa.png", "bad2.png", "good.png"]
    names = ["a.png", "aa.png", "b/1.jpg", "b/2.PNG", "c.webp", "good.png"]
    assert [row["file_name"] for row in rows(settings)] == names
    assert [row["file_name"] for row in report(settings)["bad"]] == ["bad2.png"]


def test_what_was_bad_is_tried_again(settings, folder, stub):
    (folder / "bad.png").touch()
    run(settings)
    stub.asked.clear()
    run(settings)
    assert stub.asked == ["bad.png"]
    assert files(settings) == DONE


@pytest.mark.parametrize("values", [{"prompt": "what?"}, {"max_new_tokens": 7}])
def test_other_captions_are_not_mixed_in(settings, stub, values):
    run(settings)
    before = settings.output.read_bytes()
    [name] = values
    with pytest.raises(InputError, match=f"captions made with another {name}: give another --out"):
        run(changed(settings, **values))
    assert settings.output.read_bytes() == before


def test_nor_those_of_a_process_that_was_stopped(settings, stub):
    settings.output.parent.mkdir()
    with CaptionFiles(settings.output, settings.identity(), Team()) as begun:
        begun.add("a.png", "red")
    with pytest.raises(InputError, match="another prompt"):
        run(changed(settings, prompt="what?"))
    run(settings)
    assert rows(settings)[0] == {"file_name": "a.png", "caption": "red"}


def test_another_model_is_known_by_its_weights(settings, tmp_path, tiny_checkpoint):
    moved = tmp_path / "moved"
    shutil.copytree(tiny_checkpoint, moved)
    assert changed(settings, model=str(moved)).identity() == settings.identity()
    (weights,) = moved.glob("*.safetensors")
    data = bytearray(weights.read_bytes())
    data[-4 * 8] ^= 1
    size = int.from_bytes(data[:8], "little")
    for start in range(8 + size, len(data), 4):
        data[start + 2] ^= 1
    weights.write_bytes(data)
    assert changed(settings, model=str(moved)).identity() != settings.identity()


@pytest.mark.parametrize("text", ['{"file_name": "a.png"}\n', ""])
def test_a_file_of_somebody_elses_is_left_alone(settings, stub, text):
    settings.output.parent.mkdir()
    settings.output.write_text(text)
    with pytest.raises(InputError, match=r"is there already, and no captions\.report\.json"):
        run(settings)
    assert settings.output.read_text() == text


@pytest.mark.parametrize("line", ["no json", "[1]", '{"caption": "a"}'])
def test_a_line_that_is_no_captions(settings, stub, line):
    settings.output.parent.mkdir()
    settings.output.with_name("captions.part-3.jsonl").write_text(line + "\n")
    with pytest.raises(InputError, match=r"captions.part-3.jsonl holds a line .* at byte 0"):
        run(settings)


def test_a_caption_counts_more_than_an_earlier_failure(settings, stub):
    """Of three processes the last one could not read it; of two the second one could."""
    settings.output.parent.mkdir()
    for rank, size, text in ((2, 3, InputError("busy")), (1, 2, "red"), (0, 1, "blue")):
        with CaptionFiles(settings.output, settings.identity(), Team(rank, size)) as begun:
            begun.add("c.webp" if rank else "a.png", text)
    run(settings)
    assert "c.webp" not in stub.asked
    assert [row["caption"] for row in rows(settings)][::3] == ["blue", "red"]


def test_half_a_line_of_another_process_is_read_when_it_is_whole(settings):
    settings.output.parent.mkdir()
    line = b'{"file_name": "a.png", "caption": "red"}\n'
    other = settings.output.with_name("captions.part-1.jsonl")
    with CaptionFiles(settings.output, settings.identity(), Team(0, 2)) as begun:
        for end in (15, len(line)):
            other.write_bytes(line[:end])
            begun.look()
            assert begun.has_caption("a.png") == (end == len(line))


# ------------------------------------------------------------------ several processes


@pytest.fixture
def as_process(monkeypatch):
    def become(rank, size):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(size))

    return become


def test_processes_share_the_work(settings, stub, as_process):
    alone = changed(settings, output=settings.output.with_name("alone.jsonl"))
    run(alone)
    stub.asked.clear()
    as_process(1, 3)
    assert "process 0 puts all together" in run(settings)
    assert stub.asked == NAMES[1::3] and not settings.output.exists()
    as_process(2, 3)
    run(settings)
    as_process(0, 3)
    run(settings)
    assert sorted(stub.asked) == NAMES
    assert settings.output.read_bytes() == alone.output.read_bytes()
    assert not list(settings.output.parent.glob("captions.part*"))


def test_the_first_process_waits_for_the_others(settings, stub, as_process):
    as_process(0, 2)
    first = threading.Thread(target=run, args=[settings])
    first.start()
    part = settings.output.with_name("captions.part-0.jsonl")
    while not part.exists() or part.read_bytes().count(b"\n") < 4:
        time.sleep(0.01)
    assert first.is_alive() and not settings.output.exists()
    as_process(1, 2)
    run(settings)
    first.join(timeout=30)
    assert [row["file_name"] for row in rows(settings)] == NAMES


def test_a_process_that_never_comes(settings, stub, as_process, monkeypatch):
    monkeypatch.setattr(caption_files, "PATIENCE", 0.1)
    monkeypatch.setattr(caption_files, "LOOK_SECONDS", 0.05)
    as_process(0, 2)
    with pytest.raises(InputError, match="2 images of 5 have no caption, and the other 1 proc"):
        run(settings)
    # Less processes than before: what is there is taken up.
    as_process(0, 1)
    stub.asked.clear()
    run(settings)
    assert stub.asked == NAMES[1::2]
    assert [row["file_name"] for row in rows(settings)] == NAMES


def test_two_processes_do_not_write_one_part(settings, stub):
    settings.output.parent.mkdir()
    with settings.output.with_name("captions.part-0.jsonl").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # the weakest claim
        with pytest.raises(InputError, match=r"Another process writes captions.part-0.jsonl.*RANK"):
            run(settings)
        assert not stub.asked
        assert files(settings) == ["captions.part-0.jsonl"], "it is the other's"
    run(settings)
    assert len(rows(settings)) == 5


@pytest.mark.slow
def test_the_command_is_killed_again_and_again(settings, folder, tmp_path):
    for number in range(150):
        image(number).save(folder / f"{number:03}.png")
    base = [sys.executable, "-m", "owl2", "caption", str(folder), "--model", settings.model]
    base += ["--device", "cpu", "--dtype", "float32", "--batch-size", "4", "--recursive"]
    whole, output = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    subprocess.run([*base, "--output-file", str(whole)], check=True, timeout=300)
    part, killed = tmp_path / "killed.part-0.jsonl", 0
    while not output.exists():
        before = part.read_bytes().count(b"\n") if part.exists() else 0
        process = subprocess.Popen([*base, "--output-file", str(output)])
        while process.poll() is None:
            if part.exists() and part.read_bytes().count(b"\n") > before + 60:
                process.kill()
                killed += 1
                break
            time.sleep(0.02)
        process.wait()
    assert killed >= 2
    assert output.read_bytes() == whole.read_bytes()
