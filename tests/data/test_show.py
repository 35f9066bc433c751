import base64
import io
import json
import re
import tarfile

import pytest
from PIL import Image
from rich.console import Console

from owl2.data.open_dataset import open_from_cli
from owl2.data.show import show_samples
from owl2.errors import ErrorCode
from tests.errors import raises_input_error


@pytest.fixture
def checkpoint(tmp_path, processor):
    directory = tmp_path / "model"
    directory.mkdir()
    processor.save_pretrained(directory)
    return directory


@pytest.fixture
def chat(tmp_path):
    turns = [{"from": "human", "value": "<image>what color?"}, {"from": "gpt", "value": "red"}]
    path = tmp_path / "chat.json"
    path.write_text(json.dumps([{"image": "not opened.png", "conversations": turns}] * 3))
    return path


def test_tokens_with_a_label_are_green(checkpoint, chat):
    console = Console(force_terminal=True, color_system="standard", width=300, record=True)
    with console.capture() as capture:
        show_samples(str(checkpoint), {str(chat): open_from_cli(str(chat))}, 2, console)
    shown = capture.get()
    assert shown.count("\x1b[1;32m red</s>") == 2
    assert "\x1b[2mUSER: <|image|>×5\nwhat color? ASSISTANT:" in shown.replace(
        "\x1b[0m\n\x1b[2m", "\n"
    )
    assert f"{chat}, row 1" in shown
    assert f"{chat}, row 3" not in shown
    assert "2 of 3 samples" in shown


@pytest.fixture
def mixed(tmp_path):
    """Ten rows with their number; one has an image, one a missing image, one no answer."""
    Image.new("RGB", (600, 300), "red").save(tmp_path / "red.png")
    rows = []
    for number in range(10):
        turns = [
            {"from": "human", "value": f"what is <b>{number}</b>?"},
            {"from": "gpt", "value": f"number {number} & more"},
        ]
        rows.append({"conversations": turns})
    for number, name in ((1, "red.png"), (2, "gone.png")):
        rows[number]["image"] = name
        rows[number]["conversations"][0]["value"] += "<image>"
    rows[3]["conversations"].pop()
    path = tmp_path / "mixed.json"
    path.write_text(json.dumps(rows))
    return path


def shown(checkpoint, source, count, **options) -> str:
    console = Console(file=io.StringIO(), width=500)
    datasets = {str(source): open_from_cli(str(source))}
    show_samples(str(checkpoint), datasets, count, console, **options)
    return console.file.getvalue()


def test_without_colors_labels_are_in_brackets(checkpoint, mixed):
    text = shown(checkpoint, mixed, 1)
    assert "<s>USER: what is <b>0</b>? ASSISTANT:⟦ number 0 & more</s>⟧\n" in text
    assert text.endswith("1 of 10 samples. ⟦Marked⟧ tokens contribute to the loss.\n")
    turns = [{"role": role, "content": "yes"} for role in ("user", "assistant")] * 2
    many = mixed.with_suffix(".jsonl")
    many.write_text(json.dumps({"messages": turns}))
    expected = "<s>USER: yes ASSISTANT:⟦ yes</s>⟧USER: yes ASSISTANT:⟦ yes</s>⟧\n"
    assert expected in shown(checkpoint, many, 1)


def test_images_are_described_and_invalid_rows_are_shown(checkpoint, mixed):
    text = shown(checkpoint, mixed, 3, start=1)
    assert f"image 1: {mixed.parent / 'red.png'}, 600×300\n" in text
    assert "image 1: The image file" in text
    assert f"{mixed}, row 4\ninvalid: the last turn is a user turn" in text
    assert "row 5" not in text and "row 1\n" not in text


def test_random_samples_depend_on_the_seed(checkpoint, mixed):
    def rows(**options) -> list[str]:
        lines = shown(checkpoint, mixed, options.pop("count", 4), **options).splitlines()
        return [line for line in lines if line.startswith(f"{mixed}, row ")]

    first = rows(seed=1)
    assert len(set(first)) == 4
    assert rows(seed=1) == first != rows(seed=2)
    assert sorted(rows(seed=3, count=99)) == sorted(rows(count=99))
    assert rows(seed=1, count=2, start=2) == first[2:]


@pytest.mark.parametrize("seed", [None, 0])
def test_shards_are_shown(checkpoint, tmp_path, seed):
    image = io.BytesIO()
    Image.new("RGB", (30, 20)).save(image, "PNG")
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, data in (("a.png", image.getvalue()), ("a.txt", b"a red circle")):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    text = shown(checkpoint, tmp_path / "0.tar", 1, seed=seed)
    assert "0.tar, a\nimage 1: 30×20\n" in text
    assert "⟦ a red circle</s>⟧" in text
    assert "1 of the samples" in text


def test_the_page_contains_images_and_text(checkpoint, mixed, tmp_path):
    file = tmp_path / "page.html"
    output = shown(checkpoint, mixed, 4, html=file)
    assert output == f"Wrote 4 samples to {file}\n"
    text = file.read_text(encoding="utf-8")
    (data,) = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', text)
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (320, 160)
    assert "what is &lt;b&gt;0&lt;/b&gt;?" in text and "<b>" not in text
    assert '<span class="label"> number 0 &amp; more&lt;/s&gt;</span>' in text
    assert text.count('<p class="error">') == 2  # the image that is gone, the row without an answer
    with raises_input_error(ErrorCode.WRITE_FAILED):
        shown(checkpoint, mixed, 1, html="/proc/nowhere/page.html")


def test_the_command_line(run_cli, checkpoint, chat):
    result = run_cli("data", "show", "--model", checkpoint, chat, "--count", "1")
    assert result.exit_code == 0
    assert "ASSISTANT:⟦ red</s>⟧" in result.stdout
    result = run_cli("data", "show", "--model", checkpoint, "no-such.json")
    assert result.exit_code == 2
    assert "no-such.json" in result.stderr


def test_a_recipe_shows_all_of_its_data_with_its_model(run_cli, checkpoint, chat, mixed, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    settings = {
        "model": str(checkpoint),
        "output": "unused",
        "stage": 2,
        "max_steps": 1000,
        "data": [{"file": str(chat)}],
        "validation": {"data": [{"file": str(mixed)}]},
    }
    recipe.write_text(json.dumps(settings))
    result = run_cli("data", "show", recipe, "--count", "1")
    assert result.exit_code == 0
    assert f"{chat}, row 1\n" in result.stdout and f"{mixed}, row 1\n" in result.stdout
    assert "2 of 13 samples" in result.stdout
    result = run_cli("data", "show", chat)
    assert result.exit_code == 2
    assert "--model" in result.stderr
