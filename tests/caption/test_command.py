"""`owl2 caption`: each image once, in order, and a report of the errors."""

import json
import shutil
import sys
from dataclasses import replace
from inspect import signature
from types import SimpleNamespace

import pytest

from owl2 import Engine
from owl2.caption import command
from owl2.caption.command import find_images
from owl2.cli.caption import caption as caption_options
from owl2.data.datasets.prompts import CAPTION_PROMPT
from owl2.engine.load_model import ModelArgs
from owl2.errors import ErrorCode, InputError
from owl2.processing.messages import user_message
from tests.caption.conftest import DONE, NAMES, files, report, rows, run
from tests.errors import raises_input_error


def test_captions_are_those_of_chat(config, folder, tiny_checkpoint):
    (folder / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    printed = run(config)
    engine = Engine.from_pretrained(tiny_checkpoint, device="cpu", dtype="float32")
    options = {"do_sample": False, "max_new_tokens": 6}
    expected = [
        engine.chat([user_message(config.prompt, [folder / name])], **options) for name in NAMES
    ]
    assert rows(config) == [
        {"file_name": name, "caption": text} for name, text in zip(NAMES, expected, strict=True)
    ]
    assert len(set(expected)) > 1
    found = report(config)
    assert (found["images"], found["captions"]) == (6, 5)
    [error] = found["errors"]
    assert error["file_name"] == "bad.png"
    assert "bad.png" in error["error"]
    for needle in ("5 captions", "1 failed", "bad.png: ", " images/s "):
        assert needle in printed
    assert files(config) == DONE


def test_images_are_found_by_their_extensions(folder):
    assert find_images(folder, recursive=True) == NAMES
    assert find_images(folder) == ["a.png", "c.webp", "d.png"]
    with raises_input_error(ErrorCode.EMPTY_DATASET, "--recursive"):
        find_images(folder.parent)
    (folder / "empty").mkdir()
    with raises_input_error(ErrorCode.EMPTY_DATASET, "avif, bmp") as caught:
        find_images(folder / "empty", recursive=True)
    assert "--recursive" not in str(caught.value)
    with raises_input_error(ErrorCode.FILE_NOT_FOUND, "missing"):
        find_images(folder / "missing")


def test_no_image_could_be_captioned(config, folder, stub):
    shutil.rmtree(folder)
    folder.mkdir()
    for number in range(7):
        (folder / f"bad{number}.png").touch()
    with raises_input_error(ErrorCode.EMPTY_DATASET, "7 images"):
        run(config)
    assert not config.output.exists()
    assert len(report(config)["errors"]) == 7


def test_file_names_that_are_not_text(config, folder, stub):
    shutil.rmtree(folder)
    folder.mkdir()
    name = b"caf\xe9 \xe4\xbd\xa0.png".decode("utf-8", "surrogateescape")
    (folder / name).touch()
    (folder / "你 🦉\u2028.png").touch()
    run(config)
    run(config)
    assert [row["file_name"] for row in rows(config)] == sorted([name, "你 🦉\u2028.png"])
    assert stub.asked == [row["file_name"] for row in rows(config)]


def test_invalid_prompt_is_an_error_before_the_first_image(config):
    with raises_input_error(ErrorCode.TOO_LONG, "128"):
        run(config, prompt="red " * 100)
    assert files(config) == []


@pytest.mark.parametrize("prompt", ["red <|image|> what?", ""], ids=["position", "image alone"])
def test_prompt_may_place_the_image_or_be_empty(config, prompt):
    run(config, prompt=prompt)
    assert len(rows(config)) == len(NAMES)


def test_vllm_gets_the_same_conversations(config, folder, monkeypatch):
    given = []

    def answer_all(model, conversations, options, **more):
        given.append((model, options, more))
        for messages in conversations:
            [image, text] = messages[0]["content"]
            assert text["text"] == config.prompt
            name = image["image"].name
            yield InputError("no", ErrorCode.BROKEN_IMAGE) if name == "d.png" else name

    module = SimpleNamespace(answer_all=answer_all)
    monkeypatch.setitem(sys.modules, "owl2.vllm_plugin.offline", module)
    with raises_input_error(ErrorCode.CONFLICT, "--device"):
        run(config, engine="vllm")
    run(config, engine="vllm", model_args=ModelArgs(config.model_args.model, dtype="float32"))
    options = {"do_sample": False, "max_new_tokens": 6}
    assert given == [(config.model_args.model, options, {"dtype": "float32"})]
    assert [row["caption"] for row in rows(config)] == ["a.png", "1.jpg", "2.PNG", "c.webp"]
    with raises_input_error(ErrorCode.UNKNOWN_NAME, "sglang"):
        run(config, engine="sglang")


def test_command_line(run_cli, config, folder):
    def call(output, *arguments):
        base = ("caption", folder, "--model", config.model_args.model, "--device", "cpu")
        return run_cli(*base, "--max-new-tokens", 3, "--output-file", output, *arguments)

    result = call(config.output, "--prompt", "what?", "--recursive")
    assert result.exit_code == 0, result.stderr
    assert "5 captions" in result.stdout
    result = call(config.output.with_suffix(".json"))
    assert result.exit_code == 2
    assert ".jsonl" in result.stderr
    for name in NAMES:
        (folder / name).write_bytes(b"broken")
    result = call(config.output.with_name("other.jsonl"))
    assert result.exit_code == 2
    assert "3 images" in result.stderr
    assert "Traceback" not in result.stderr


def test_default_prompt_is_the_prompt_of_the_paper():
    assert command.PROMPT == CAPTION_PROMPT
    assert signature(caption_options).parameters["prompt"].default == CAPTION_PROMPT


def test_output_of_another_program_is_not_overwritten(config, stub):
    config.output.parent.mkdir()
    for text in ('{"file_name": "a.png"}\n', ""):
        config.output.write_text(text)
        with raises_input_error(ErrorCode.FILE_EXISTS, config.report.name):
            run(config)
        assert config.output.read_text() == text


@pytest.mark.parametrize("changes", [{"prompt": "what?"}, {"max_new_tokens": 7}])
def test_captions_with_other_settings_are_not_mixed(config, stub, changes):
    run(config)
    before = config.output.read_bytes()
    [name] = changes
    with raises_input_error(ErrorCode.RESUME_MISMATCH, f"another {name}"):
        run(config, **changes)
    assert config.output.read_bytes() == before


def test_model_is_identified_by_its_weights(config, tmp_path, tiny_checkpoint):
    moved = tmp_path / "moved"
    shutil.copytree(tiny_checkpoint, moved)
    other = replace(config, model_args=ModelArgs(str(moved)))
    assert other.settings == config.settings
    (weights,) = moved.glob("*.safetensors")
    data = bytearray(weights.read_bytes())
    size = int.from_bytes(data[:8], "little")
    for start in range(8 + size, len(data), 4):
        data[start + 2] ^= 1
    weights.write_bytes(data)
    assert other.settings != config.settings
    assert json.dumps(other.settings)
