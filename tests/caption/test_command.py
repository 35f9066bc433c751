"""`owl2 caption`: each image once, in order, and a report of the errors."""

import errno
import json
import os
import shutil
import socket
import sys
from dataclasses import replace
from inspect import signature
from types import SimpleNamespace
from urllib.parse import unquote_to_bytes

import pandas
import pyarrow.json
import pytest
from jsonschema import Draft202012Validator

from owl2 import Engine
from owl2.cli.caption import caption as caption_options
from owl2.data.datasets.prompts import CAPTION_PROMPT
from owl2.data.image_folder import find_images, name_of
from owl2.engine.load_model import ModelArgs
from owl2.errors import ErrorCode, InputError
from owl2.processing.image_io import load_image
from owl2.processing.messages import user_message
from tests.caption.conftest import DONE, NAMES, files, report, rows, run
from tests.engine.conftest import random_image
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
    assert list(find_images(folder, recursive=True).versions) == NAMES
    assert list(find_images(folder).versions) == ["a.png", "c.webp", "d.png"]
    with raises_input_error(ErrorCode.EMPTY_DATASET, "--recursive"):
        find_images(folder.parent)
    (folder / "empty").mkdir()
    with raises_input_error(ErrorCode.EMPTY_DATASET, "avif, bmp") as caught:
        find_images(folder / "empty", recursive=True)
    assert "--recursive" not in str(caught.value)
    for place in (folder / "missing", folder / "a.png", folder / "missing" / "deeper"):
        with raises_input_error(ErrorCode.FILE_NOT_FOUND, place):
            find_images(place)


def test_special_files_are_skipped_and_reported(config, folder, tmp_path, stub):
    os.mkfifo(folder / "x.png")
    (folder / "linked pipe.png").symlink_to("x.png")
    (folder / "zero.jpg").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(folder / "s.png"))  # the path of a socket must be short
    (folder / "b" / "up").symlink_to(folder)
    (folder / "link.png").symlink_to("a.png")
    printed = run(config)
    assert stub.asked == [*NAMES, "link.png"]
    assert report(config)["skipped"] == [
        {"file_name": "b/up", "reason": "a link to a folder"},
        {"file_name": "linked pipe.png", "reason": "a named pipe"},
        {"file_name": "s.png", "reason": "a socket"},
        {"file_name": "x.png", "reason": "a named pipe"},
        {"file_name": "zero.jpg", "reason": "a device"},
    ]
    assert "x.png: skipped, a named pipe" in printed


def test_files_and_folders_that_cannot_be_read_give_an_exit_code(config, folder, monkeypatch):
    """Tests may run as root, who can list every folder."""
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "broken link.png").symlink_to("nothing")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("/b"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with raises_input_error(ErrorCode.UNREADABLE_FILE, "2 of 5 images", "1 folder"):
        run(config)
    assert [row["file_name"] for row in rows(config)] == ["a.png", "c.webp", "d.png"]
    codes = {row["file_name"]: row.get("code") for row in report(config)["errors"]}
    assert codes == {
        "broken link.png": ErrorCode.MISSING_IMAGE,
        "loop.png": ErrorCode.UNREADABLE_FILE,
        "b/": None,
    }
    monkeypatch.undo()
    (folder / "loop.png").unlink()
    (folder / "broken link.png").unlink()
    run(config)
    assert [row["file_name"] for row in rows(config)] == NAMES
    with raises_input_error(ErrorCode.UNREADABLE_FILE, "Permission denied"):
        monkeypatch.setattr(os, "scandir", refuse)
        find_images(folder / "b")


def test_folder_that_is_deleted_during_the_run(config, folder, stub, monkeypatch):
    """The engine reads the files here, and fails where they are missing."""

    def read(name):
        if name == NAMES[2]:
            shutil.rmtree(folder)

    stub.before_each = read
    stub.answer = lambda path: load_image(path) and "seen"
    with raises_input_error(ErrorCode.UNREADABLE_FILE, "3 of 5 images"):
        run(config)
    assert [row["file_name"] for row in rows(config)] == NAMES[:2]
    assert [row["code"] for row in report(config)["errors"]] == [ErrorCode.MISSING_IMAGE] * 3


def test_file_that_is_replaced_during_the_run_is_captioned_again(config, folder, stub):
    def replace_two(name):
        if name == NAMES[0]:  # after the files were listed
            random_image(9, size=(30, 30)).save(folder / NAMES[0])
            os.utime(folder / NAMES[3], ns=(5, 5))

    stub.before_each = replace_two
    run(config)
    stub.asked.clear()
    run(config)
    assert stub.asked == [NAMES[0], NAMES[3]]


def test_output_in_the_folder_of_the_images(config, folder, stub):
    config = replace(config, output=folder / "metadata.jsonl")
    run(config)
    run(config)
    assert stub.asked == NAMES
    assert [row["file_name"] for row in rows(config)] == NAMES


def test_no_image_could_be_captioned(config, folder, stub):
    shutil.rmtree(folder)
    folder.mkdir()
    for number in range(7):
        (folder / f"bad{number}.png").touch()
    with raises_input_error(ErrorCode.EMPTY_DATASET, "7 images"):
        run(config)
    assert not config.output.exists()
    assert len(report(config)["errors"]) == 7


def test_file_names_that_are_not_utf_8(config, folder, stub):
    """Every JSON reader reads the captions, and the exact names are in another field."""
    shutil.rmtree(folder)
    folder.mkdir()
    odd = b"caf\xe9 \xe4\xbd\xa0.png"
    names = [os.fsdecode(odd), "caf\\udce9 你.png", "你 🦉\u2028.png", os.fsdecode(b"bad\xff.png")]
    for name in names:
        (folder / name).touch()
    printed = [run(config), run(config)]
    assert stub.asked == [*sorted(names), names[3]], "the second run finds all names again"
    escaped = "caf\\udce9 你.png"
    quoted = "caf%E9%20%E4%BD%A0.png"
    assert unquote_to_bytes(quoted) == odd
    expected = [(escaped, None), (escaped, quoted), (names[2], None)]
    for table in (
        pandas.read_json(config.output, lines=True).to_dict("records"),
        pyarrow.json.read_json(config.output).to_pylist(),
    ):
        found = [(row["file_name"], row["file_name_quoted"]) for row in table]
        assert [(name, None if pandas.isna(other) else other) for name, other in found] == expected
    assert [name_of(row) for row in rows(config)] == sorted(names)[1:]
    config.records.report.read_text("utf-8").encode()
    [error] = report(config)["errors"]
    assert (error["file_name"], error["file_name_quoted"]) == ("bad\\udcff.png", "bad%FF.png")
    assert all(names[3] in text for text in printed)


def test_names_that_are_not_utf_8_of_an_output_written_before(config, folder, stub):
    name = os.fsdecode(b"\xe9.png")
    (folder / name).touch()
    run(config)
    written, found = rows(config), report(config)
    for row in written:
        row["file_name"] = name_of(row)
        row.pop("file_name_quoted", None)
    found["files"] |= {name: found.pop("files_quoted")["%E9.png"]}
    config.output.write_text("".join(f"{json.dumps(row)}\n" for row in written))
    config.records.report.write_text(json.dumps(found))
    stub.asked.clear()
    run(config)
    assert stub.asked == []
    assert rows(config)[-1]["file_name_quoted"] == "%E9.png"


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
    args = ModelArgs(config.model_args.model, activation_bits=8)
    for changes in ({}, {"model_args": args}):
        with raises_input_error(ErrorCode.CONFLICT, "--device"):
            run(config, engine="vllm", **changes)
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
    assert signature(caption_options).parameters["prompt"].default == CAPTION_PROMPT


def test_output_of_another_program_is_not_overwritten(config, stub):
    config.output.parent.mkdir()
    for text in ('{"file_name": "a.png"}\n', ""):
        config.output.write_text(text)
        with raises_input_error(ErrorCode.FILE_EXISTS, config.records.report.name):
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


@pytest.mark.parametrize(
    "changes", [{"base": "a/base"}, {"quantize": "8bit"}, {"activation_bits": 8}]
)
def test_captions_of_other_models_are_not_mixed(config, stub, tmp_path, changes):
    changed = replace(config, model_args=replace(config.model_args, **changes))
    [name] = changes
    for first, other in ((config, changed), (changed, config)):
        output = tmp_path / name / f"{first is config}.jsonl"
        run(replace(first, output=output))
        with raises_input_error(ErrorCode.RESUME_MISMATCH, f"another {name}"):
            run(replace(other, output=output))


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


SCHEMA = {
    "type": "object",
    "properties": {"color": {"enum": ["red", "blue"]}, "count": {"type": "integer", "maximum": 9}},
    "required": ["color", "count"],
    "additionalProperties": False,
}


def test_json_captions(config, run_cli, tmp_path):
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA), "utf-8")
    options = ["--recursive", "--device", "cpu", "--dtype", "float32", "--json-schema", path]
    options += ["--model", config.model_args.model, "--output-file", config.output]
    result = run_cli("caption", config.folder, *options, "--max-new-tokens", 60)
    assert result.exit_code == 0, result.stderr
    assert [row["file_name"] for row in rows(config)] == NAMES
    for row in rows(config):
        Draft202012Validator(SCHEMA).validate(row["caption"])
    # The same command resumes; another schema is another setting.
    before = config.output.read_bytes()
    random_image(9).save(config.folder / "new.png")
    assert run_cli("caption", config.folder, *options, "--max-new-tokens", 60).exit_code == 0
    assert [row["file_name"] for row in rows(config)] == [*NAMES, "new.png"]
    assert config.output.read_bytes().startswith(before)
    path.write_text("{}", "utf-8")
    result = run_cli("caption", config.folder, *options, "--max-new-tokens", 60)
    assert (result.exit_code, "structured_outputs" in result.stderr) == (2, True)


def test_captions_that_are_cut_off_are_errors(config):
    constraint = {"regex": "[0-9]{8}"}
    with raises_input_error(ErrorCode.EMPTY_DATASET, "5"):
        run(config, structured_outputs=constraint, max_new_tokens=3)
    assert not config.output.exists()
    errors = report(config)["errors"]
    assert [error["file_name"] for error in errors] == NAMES
    assert all("--max-new-tokens" in error["error"] for error in errors)


def test_captions_from_choices(config):
    choices = ["red", "green circle", "blue"]
    run(config, structured_outputs={"choice": choices}, max_new_tokens=20)
    assert {row["caption"] for row in rows(config)} <= set(choices)


@pytest.mark.parametrize(
    ("text", "more", "needle"),
    [
        ("{", [], "schema.json"),
        ("[]", [], "schema.json"),
        ('{"type": "string"}', ["--choice", "red"], "--choice"),
        ('{"const": "' + "x" * 70_000 + '"}', [], "65536"),
        ('{"type": "string"}', ["--engine", "vllm"], "--json-schema"),
    ],
)
def test_invalid_schemas(config, run_cli, tmp_path, text, more, needle):
    path = tmp_path / "schema.json"
    path.write_text(text, "utf-8")
    options = ["--model", config.model_args.model, "--output-file", config.output, "--recursive"]
    result = run_cli("caption", config.folder, *options, "--json-schema", path, *more)
    assert result.exit_code == 2
    assert needle in " ".join(result.stderr.split())
