"""`owl2 caption`: every picture once, in order, whatever happens on the way."""

import fcntl
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from PIL import Image
from rich.console import Console

from owl2 import Engine, cli
from owl2.errors import InputError
from owl2.eval.team import Team
from owl2.inference.chat import user_turn
from owl2.serve import caption_files, captions
from owl2.serve.caption_files import CaptionFiles
from owl2.serve.captions import Settings, caption, find_pictures
from tests.inference.conftest import picture

NAMES = ["a.png", "b/1.jpg", "b/2.PNG", "c.webp", "d.png"]


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "b").mkdir(parents=True)
    for number, name in enumerate(NAMES):
        picture(number, size=(20, 12)).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    (folder / "._a.png").write_text("macOS leaves such")
    (folder / ".git").mkdir()
    picture(1).save(folder / ".git" / "x.png")
    return folder


@pytest.fixture
def settings(folder, tmp_path, tiny_checkpoint):
    return Settings(
        folder,
        str(tiny_checkpoint),
        tmp_path / "out" / "captions.jsonl",
        recursive=True,
        max_new_tokens=6,
        batch_size=2,
        device="cpu",
        dtype="float32",
    )


@pytest.fixture
def stub(monkeypatch):
    """An engine without a model: a picture's caption is its name, and "bad" in it an error."""
    state = SimpleNamespace(asked=[], seconds=0.0)

    def answers(settings, paths, engine):
        for path in paths:
            time.sleep(state.seconds)
            state.asked.append(path.relative_to(settings.folder).as_posix())
            yield InputError("broken") if "bad" in path.name else f"a {path.name}"

    monkeypatch.setattr(captions, "_by_engine", answers)
    monkeypatch.setattr(captions, "_load", lambda *_: None)
    return state


def run(settings):
    console = Console(file=io.StringIO(), width=200)
    caption(settings, console)
    return console.file.getvalue()


def rows(settings):
    return [json.loads(line) for line in settings.output.read_text("utf-8").split("\n")[:-1]]


def report(settings):
    return json.loads(settings.output.with_name("captions.report.json").read_text("utf-8"))


def files(settings):
    return sorted(file.name for file in settings.output.parent.iterdir())


def changed(settings, **values):
    return Settings(**{**settings.__dict__, **values})


DONE = ["captions.jsonl", "captions.report.json"]


# ------------------------------------------------------------------ what comes of a folder


def test_captions_are_those_of_chat(settings, folder, tiny_checkpoint):
    (folder / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    told = run(settings)
    engine = Engine.from_pretrained(tiny_checkpoint, device="cpu", dtype="float32")
    options = {"do_sample": False, "max_new_tokens": 6}
    expected = [
        engine.chat([user_turn(settings.prompt, [folder / name])], **options) for name in NAMES
    ]
    assert rows(settings) == [
        {"file_name": name, "caption": text} for name, text in zip(NAMES, expected, strict=True)
    ]
    assert len(set(expected)) > 1
    found = report(settings)
    assert (found["pictures"], found["captions"]) == (6, 5)
    [bad] = found["bad"]
    assert bad["file_name"] == "bad.png" and "bad.png" in bad["error"]
    assert "5 captions are in" in told and "1 could not be captioned" in told
    assert "bad.png: " in told and " pictures/s " in told
    assert files(settings) == DONE


def test_which_files_are_pictures(folder):
    assert find_pictures(folder, recursive=True) == NAMES
    assert find_pictures(folder) == ["a.png", "c.webp", "d.png"]
    with pytest.raises(InputError, match="add --recursive"):
        find_pictures(folder.parent)
    (folder / "empty").mkdir()
    with pytest.raises(InputError, match=r"There are no pictures in .*avif, bmp.*\)\.$"):
        find_pictures(folder / "empty")


def test_no_such_folder(folder):
    with pytest.raises(InputError, match="There is no folder"):
        find_pictures(folder / "missing")


def test_nothing_could_be_captioned(settings, folder, stub):
    shutil.rmtree(folder)
    folder.mkdir()
    for number in range(7):
        (folder / f"bad{number}.png").touch()
    with pytest.raises(InputError, match="None of the 7 pictures could be captioned"):
        run(settings)
    assert not settings.output.exists()
    assert len(report(settings)["bad"]) == 7


def test_names_that_are_no_text(settings, folder, stub):
    shutil.rmtree(folder)
    folder.mkdir()
    name = b"caf\xe9 \xe4\xbd\xa0.png".decode("utf-8", "surrogateescape")
    (folder / name).touch()
    (folder / "你 🦉\u2028.png").touch()
    run(settings)
    run(settings)
    assert [row["file_name"] for row in rows(settings)] == sorted([name, "你 🦉\u2028.png"])
    assert stub.asked == [row["file_name"] for row in rows(settings)]


def test_a_prompt_that_does_not_fit_is_found_before(settings):
    for prompt, said in (("red " * 100, "the model's context is 128"), (" ", "empty")):
        with pytest.raises(InputError, match=said):
            run(changed(settings, prompt=prompt))
    assert files(settings) == []


def test_the_picture_may_stand_anywhere_in_the_prompt(settings):
    run(changed(settings, prompt="red <|image|> what?"))
    assert len(rows(settings)) == len(NAMES)


# ------------------------------------------------------------------ going on


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
    monkeypatch.setattr(captions, "_load", lambda *_: pytest.fail("a model is loaded"))
    run(settings)
    assert settings.output.read_bytes() == before and len(stub.asked) == len(NAMES)


def test_a_folder_that_changed(settings, folder, stub):
    (folder / "bad.png").touch()
    run(settings)
    stub.asked.clear()
    picture(9).save(folder / "aa.png")
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
    with pytest.raises(InputError, match="2 pictures of 5 have no caption, and the other 1 proc"):
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


# ------------------------------------------------------------------ vLLM, and the command


def test_the_same_through_vllm(settings, folder, monkeypatch):
    given = []

    def answer_all(model, conversations, options, **more):
        given.append((model, options, more))
        for messages in conversations:
            [image, text] = messages[0]["content"]
            assert text["text"] == settings.prompt
            yield InputError("no") if image["image"].name == "d.png" else image["image"].name

    monkeypatch.setitem(sys.modules, "owl2.vllm.offline", SimpleNamespace(answer_all=answer_all))
    with pytest.raises(InputError, match="of owl2's own engine, not of vLLM"):
        run(changed(settings, engine="vllm"))
    run(changed(settings, engine="vllm", device=None))
    options = {"do_sample": False, "max_new_tokens": 6}
    assert given == [(settings.model, options, {"dtype": "float32"})]
    assert [row["caption"] for row in rows(settings)] == ["a.png", "1.jpg", "2.PNG", "c.webp"]
    with pytest.raises(InputError, match="there are owl2 and vllm"):
        run(changed(settings, engine="sglang"))


def test_the_command(monkeypatch, capsys, settings, folder):
    def call(*arguments):
        base = ["owl2", "caption", str(folder), "--model", settings.model, "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", [*base, "--max-new-tokens", "3", *arguments])
        try:
            cli.main()
        except SystemExit as end:
            return end.code, capsys.readouterr()
        return 0, capsys.readouterr()

    code, shown = call("--output", str(settings.output), "--prompt", "what?", "--recursive")
    assert code == 0 and "5 captions are in" in shown.out, shown.err
    code, shown = call("--output", str(settings.output.with_suffix(".json")))
    assert code == 2 and "give the name of a .jsonl file" in shown.err
    for name in NAMES:
        (folder / name).write_bytes(b"broken")
    code, shown = call("--output", str(settings.output.with_name("other.jsonl")))
    assert code == 2 and shown.err.endswith("None of the 3 pictures could be captioned.\n")
    assert "Traceback" not in shown.err


def test_the_default_prompt_is_the_papers(settings):
    from inspect import signature

    from owl2.cli.studies import caption_pictures
    from owl2.data.datasets.prompts import CAPTION_PROMPT

    assert captions.PROMPT == CAPTION_PROMPT
    assert signature(caption_pictures).parameters["prompt"].default == CAPTION_PROMPT


@pytest.mark.slow
def test_the_command_is_killed_again_and_again(settings, folder, tmp_path):
    for number in range(150):
        picture(number).save(folder / f"{number:03}.png")
    base = [sys.executable, "-m", "owl2", "caption", str(folder), "--model", settings.model]
    base += ["--device", "cpu", "--dtype", "float32", "--batch-size", "4", "--recursive"]
    whole, output = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    subprocess.run([*base, "--output", str(whole)], check=True, timeout=300)
    part, killed = tmp_path / "killed.part-0.jsonl", 0
    while not output.exists():
        before = part.read_bytes().count(b"\n") if part.exists() else 0
        process = subprocess.Popen([*base, "--output", str(output)])
        while process.poll() is None:
            if part.exists() and part.read_bytes().count(b"\n") > before + 60:
                process.kill()
                killed += 1
                break
            time.sleep(0.02)
        process.wait()
    assert killed >= 2
    assert output.read_bytes() == whole.read_bytes()


def test_pictures_are_opened_ahead_and_in_order(folder):
    paths = [folder / name for name in NAMES] * 4
    seen = []

    class Watched:
        max_pixels = 10**6

        def square(self, opened):
            seen.append(1)
            return opened.resize((4, 4))

    opened = captions._opened(iter(paths), Watched(), ahead=3)
    next(opened)
    time.sleep(0.1)
    assert 1 <= len(seen) <= 5, "not all of a million at once"
    sizes = [one.size for one in opened if isinstance(one, Image.Image)]
    assert sizes == [(4, 4)] * 19
