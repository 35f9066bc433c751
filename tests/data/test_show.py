import json
import sys

import pytest
from rich.console import Console

from owl2.cli import main
from owl2.data.show import show
from owl2.data.sources import open_words
from owl2.errors import InputError


@pytest.fixture
def checkpoint(tmp_path, processor):
    directory = tmp_path / "model"
    directory.mkdir()
    processor.save_pretrained(directory)
    return directory


@pytest.fixture
def talks(tmp_path):
    turns = [{"from": "human", "value": "<image>what color?"}, {"from": "gpt", "value": "red"}]
    path = tmp_path / "talks.json"
    path.write_text(json.dumps([{"image": "not opened.png", "conversations": turns}] * 3))
    return path


def test_learned_words_are_green_and_others_are_not(checkpoint, talks):
    console = Console(force_terminal=True, color_system="standard", width=300, record=True)
    with console.capture() as capture:
        show(str(checkpoint), str(talks), [], 2, console)
    shown = capture.get()
    assert shown.count("\x1b[1;32m red</s>") == 2
    assert "\x1b[2mUSER: <|image|>×5\nwhat color? ASSISTANT:" in shown.replace(
        "\x1b[0m\n\x1b[2m", "\n"
    )
    assert f"{talks}, row 1" in shown
    assert f"{talks}, row 3" not in shown
    assert "2 of 3 samples" in shown


def test_dataset_with_options():
    samples = open_words("easy_vqa", ["split=train", "style=joined", "prompt=short", "seed=5"])
    assert len(samples) == 4000


def test_file_with_picture_directory(talks, tmp_path):
    (tmp_path / "pictures").mkdir()
    (sample, *_) = open_words(str(talks), [f"images={tmp_path / 'pictures'}"])
    assert str(tmp_path / "pictures" / "not opened.png") in repr(sample.messages)


@pytest.mark.parametrize(
    ("source", "settings", "complaint"),
    [
        ("easy_vq", [], "'easy_vq' is no dataset. Do you mean 'easy_vqa'"),
        ("easy_vqa", ["style"], "'style' must have the form option=value"),
        ("easy_vqa", ["=3"], "must have the form option=value"),
        ("easy_vqa", ["stile=joined"], "Do you mean 'style'"),
        ("easy_vqa", ["name=joined"], "'name' is no option"),
        ("easy_vqa", ["style=[unclosed"], "the value cannot be read"),
        ("talks.json", ["split=train"], "has no setting split: only images"),
    ],
)
def test_wrong_settings(source, settings, complaint):
    with pytest.raises(InputError, match=complaint):
        open_words(source, settings)


def test_the_command(checkpoint, talks, monkeypatch, capsys):
    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["owl2", "data", "show", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code

    assert run("--model", str(checkpoint), str(talks), "--count", "1") == 0
    assert "ASSISTANT: red</s>" in capsys.readouterr().out
    assert run("--model", str(checkpoint), "no-such.json") == 2
    expected = "error: no-such.json cannot be read: No such file or directory.\n"
    assert capsys.readouterr().err == expected
