"""`owl2 caption`: every image once, in order, and what cannot be captioned told."""

import shutil
import sys
import time
from types import SimpleNamespace

import pytest
from PIL import Image

from owl2 import Engine, cli
from owl2.caption import command
from owl2.caption.command import find_images
from owl2.errors import InputError
from owl2.processing.chat_template import user_message
from tests.caption.conftest import DONE, NAMES, changed, files, report, rows, run


def test_captions_are_those_of_chat(settings, folder, tiny_checkpoint):
    (folder / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    told = run(settings)
    engine = Engine.from_pretrained(tiny_checkpoint, device="cpu", dtype="float32")
    options = {"do_sample": False, "max_new_tokens": 6}
    expected = [
        engine.chat([user_message(settings.prompt, [folder / name])], **options) for name in NAMES
    ]
    assert rows(settings) == [
        {"file_name": name, "caption": text} for name, text in zip(NAMES, expected, strict=True)
    ]
    assert len(set(expected)) > 1
    found = report(settings)
    assert (found["images"], found["captions"]) == (6, 5)
    [bad] = found["bad"]
    assert bad["file_name"] == "bad.png" and "bad.png" in bad["error"]
    assert "5 captions are in" in told and "1 could not be captioned" in told
    assert "bad.png: " in told and " images/s " in told
    assert files(settings) == DONE


def test_which_files_are_images(folder):
    assert find_images(folder, recursive=True) == NAMES
    assert find_images(folder) == ["a.png", "c.webp", "d.png"]
    with pytest.raises(InputError, match="add --recursive"):
        find_images(folder.parent)
    (folder / "empty").mkdir()
    with pytest.raises(InputError, match=r"There are no images in .*avif, bmp.*\)\.$"):
        find_images(folder / "empty")


def test_no_such_folder(folder):
    with pytest.raises(InputError, match="There is no folder"):
        find_images(folder / "missing")


def test_nothing_could_be_captioned(settings, folder, stub):
    shutil.rmtree(folder)
    folder.mkdir()
    for number in range(7):
        (folder / f"bad{number}.png").touch()
    with pytest.raises(InputError, match="None of the 7 images could be captioned"):
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


def test_the_image_may_stand_anywhere_in_the_prompt(settings):
    run(changed(settings, prompt="red <|image|> what?"))
    assert len(rows(settings)) == len(NAMES)


# ------------------------------------------------------------------ vLLM, and the command


def test_the_same_through_vllm(settings, folder, monkeypatch):
    given = []

    def answer_all(model, conversations, options, **more):
        given.append((model, options, more))
        for messages in conversations:
            [image, text] = messages[0]["content"]
            assert text["text"] == settings.prompt
            yield InputError("no") if image["image"].name == "d.png" else image["image"].name

    monkeypatch.setitem(
        sys.modules, "owl2.vllm_plugin.offline", SimpleNamespace(answer_all=answer_all)
    )
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

    code, shown = call("--output-file", str(settings.output), "--prompt", "what?", "--recursive")
    assert code == 0 and "5 captions are in" in shown.out, shown.err
    code, shown = call("--output-file", str(settings.output.with_suffix(".json")))
    assert code == 2 and "give the name of a .jsonl file" in shown.err
    for name in NAMES:
        (folder / name).write_bytes(b"broken")
    code, shown = call("--output-file", str(settings.output.with_name("other.jsonl")))
    assert code == 2 and shown.err.endswith("None of the 3 images could be captioned.\n")
    assert "Traceback" not in shown.err


def test_the_default_prompt_is_the_papers(settings):
    from inspect import signature

    from owl2.cli.caption import caption as caption_images
    from owl2.data.datasets.prompts import CAPTION_PROMPT

    assert command.PROMPT == CAPTION_PROMPT
    assert signature(caption_images).parameters["prompt"].default == CAPTION_PROMPT


def test_images_are_opened_ahead_and_in_order(folder):
    paths = [folder / name for name in NAMES] * 4
    seen = []

    class Watched:
        max_pixels = 10**6

        def square(self, opened):
            seen.append(1)
            return opened.resize((4, 4))

    opened = command._opened(iter(paths), Watched(), ahead=3)
    next(opened)
    time.sleep(0.1)
    assert 1 <= len(seen) <= 5, "not all of a million at once"
    sizes = [one.size for one in opened if isinstance(one, Image.Image)]
    assert sizes == [(4, 4)] * 19
