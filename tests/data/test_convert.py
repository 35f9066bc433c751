"""`owl2 data convert`: output files, refused inputs, round trips."""

import json
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from owl2.data.convert import convert_dataset, listing
from owl2.data.datasets.easy_vqa import easy_vqa
from owl2.data.datasets.registry import DATASET_CARDS, read_published
from owl2.data.json_dataset import JsonDataset
from owl2.data.sample import validated
from owl2.data.webdataset import TarDataset
from owl2.errors import ErrorCode
from owl2.train.recipe_sections import DataSource
from tests.data.datasets.published_files import SHORT, put, summarize
from tests.data.datasets.test_aokvqa import question as aokvqa_question
from tests.data.datasets.test_coco import CAPTIONS, official
from tests.data.datasets.test_gqa import question
from tests.data.datasets.test_img2dataset import put_shard
from tests.data.datasets.test_llava import row as llava_row
from tests.data.datasets.test_ocr_vqa import WHO, cover
from tests.data.datasets.test_refcoco import BOXES, THINGS, put_things
from tests.data.datasets.test_text_chat import SHAREGPT, SLIMORCA, orca, shared
from tests.data.datasets.test_textcaps import CAPTIONS as TEXTCAPS
from tests.data.datasets.test_textcaps import published as textcaps_file
from tests.data.datasets.test_visual_genome import phrase, publish
from tests.data.datasets.test_vqa import (
    ANSWERED,
    ASKED,
    NAMES,
    WHY,
    annotations,
    okvqa,
    questions,
    vqav2,
)
from tests.errors import raises_input_error


@pytest.fixture
def console():
    return Console(record=True, width=200)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "published"
    folder.mkdir()
    return folder


def publish_gqa(folder: Path) -> None:
    rows = {
        "1": question("5", "Is it dark?", "yes"),
        "2": question("6", "Is it réd?\u2028", "no"),
        "3": question("5", "Is it blue?", ""),
    }
    put(folder, "train_balanced_questions.json", rows)


def publish_vqa(read, folder: Path) -> None:
    put(folder, NAMES[read][0], questions(*ASKED))
    put(folder, NAMES[read][1], annotations(*ANSWERED, WHY))


def publish_refcoco(folder: Path) -> None:
    put(folder, "instances.json", BOXES)
    put_things(folder, THINGS)


CONVERSATION = (("human", "Hi\u2028"), ("gpt", "Hello"))
PUBLISH = {
    "coco_captions": lambda f: put(f, "captions_train2014.json", official(*CAPTIONS)),
    "textcaps": lambda f: put(f, "TextCaps_0.1_train.json", textcaps_file(*TEXTCAPS)),
    "vqav2": lambda f: publish_vqa(vqav2, f),
    "okvqa": lambda f: publish_vqa(okvqa, f),
    "gqa": publish_gqa,
    "ocr_vqa": lambda f: put(f, "dataset.json", {"1": cover(1, WHO), "2": cover(3, WHO)}),
    "aokvqa": lambda f: put(f, "aokvqa_v1p0_train.json", [aokvqa_question()]),
    "refcoco": publish_refcoco,
    "visual_genome": lambda f: publish(f, {"id": 1, "regions": [phrase(5, "a man")]}),
    "llava_instruct": lambda f: put(
        f, "llava_instruct_150k.json", [llava_row(("human", "<image>\nWhat?"), ("gpt", "A bus."))]
    ),
    "opinion_scores": lambda f: put(f, "mos.json", {"a.jpg": {"mos": 1}, "b.jpg": {"mos": "2.5"}}),
    "sharegpt": lambda f: put(f, SHAREGPT, [shared(*CONVERSATION)]),
    "slimorca": lambda f: (f / SLIMORCA).write_text(
        json.dumps(orca(("system", "Be."), *CONVERSATION))
    ),
}


def test_every_dataset_with_samples_is_tested():
    assert {*PUBLISH, "easy_vqa"} == {
        name for name, entry in DATASET_CARDS.items() if not entry.is_shards
    }


@pytest.mark.parametrize("name", PUBLISH)
def test_written_samples_equal_the_originals(name, tmp_path, folder, console):
    PUBLISH[name](folder)
    out = tmp_path / "out.jsonl"
    convert_dataset(name, folder, out, [], console)
    samples = [item for item in read_published(name, folder) if hasattr(item, "messages")]
    back = JsonDataset(out, tmp_path)
    assert len(back) == len(samples) > 0
    for was, now in zip(samples, back, strict=True):
        image, rounds = summarize(validated(now))
        expected, same = summarize(was)
        assert rounds == same
        assert image == (None if expected is None else f"{tmp_path}/{expected}")
    lines = out.read_text(encoding="utf-8").split("\n")[:-1]
    assert [json.loads(line)["messages"] for line in lines] == [each.messages for each in samples]
    assert [json.loads(line)["source"] for line in lines] == [each.source for each in samples]
    assert [each.opinion for each in back] == [each.opinion for each in samples]


def test_counts_are_printed_and_written(tmp_path, folder, console):
    publish_gqa(folder)
    out = tmp_path / "deep" / "gqa.jsonl"
    convert_dataset("gqa", folder, out, ["file=train_balanced_questions.json"], console)
    assert json.loads(out.with_name("gqa.stats.json").read_text()) == {
        "name": "gqa",
        "options": {"source": str(folder), "file": "train_balanced_questions.json"},
        "samples": 2,
        "answers": 2,
        "images": 2,
        "skipped": {"questions without text or without an answer": 1},
    }
    output = console.export_text()
    assert f"Wrote 2 samples with 2 answers about 2 images to {out}" in output
    assert "Skipped: 1 questions without text or without an answer" in output
    assert sorted(path.name for path in out.parent.iterdir()) == ["gqa.jsonl", "gqa.stats.json"]


def test_skipped_rows_are_counted_individually(tmp_path, folder, console):
    put(folder, "captions_train2014.json", official((7, ""), (7, " "), (9, ""), (7, "a dog")))
    convert_dataset("coco_captions", folder, tmp_path / "coco.jsonl", [], console)
    skipped = json.loads((tmp_path / "coco.stats.json").read_text())["skipped"]
    assert skipped == {"captions without text": 3}


def test_conversion_is_deterministic(tmp_path, folder, console):
    put(folder, "captions_train2014.json", official(*CAPTIONS))
    texts = {}
    for seed in [*range(10), *range(10)]:
        out = tmp_path / f"{seed}.jsonl"
        convert_dataset("coco_captions", folder, out, [f"seed={seed}"], console)
        assert texts.setdefault(seed, out.read_bytes()) == out.read_bytes()
    assert len(set(texts.values())) > 1


def test_converted_easy_vqa_equals_the_dataset(tmp_path, console):
    out = tmp_path / "easy_vqa.jsonl"
    convert_dataset("easy_vqa", Path("package"), out, ["style=captions"], console)
    back = JsonDataset(out)
    samples = easy_vqa("train", style="captions")
    assert len(back) == len(samples)
    for place in (0, 1999, 3999):
        assert summarize(back[place]) == summarize(samples[place])


def test_training_reads_the_converted_file(tmp_path, folder, console, processor, image):
    publish_gqa(folder)
    (folder / "images").mkdir()
    for number in (5, 6):
        image.with_name(f"{number}.jpg").write_bytes(image.read_bytes())
        image.with_name(f"{number}.jpg").rename(folder / "images" / f"{number}.jpg")
    convert_dataset("gqa", folder, tmp_path / "gqa.jsonl", [], console)
    for sample, answer in zip(
        JsonDataset(tmp_path / "gqa.jsonl", folder), ("yes", "no"), strict=True
    ):
        features = processor.for_training(sample.messages)
        labels = features["labels"].flatten()
        assert processor.tokenizer.decode(labels[labels >= 0]).strip() == f"{answer}</s>"
        assert len(features["pixel_values"]) == 1


# ------------------------------------------------------------------ images


def test_missing_images_stop_or_are_skipped_and_counted(tmp_path, folder, console):
    publish_gqa(folder)
    images = tmp_path / "gqa"
    (images / "images").mkdir(parents=True)
    (images / "images" / "6.jpg").write_bytes(b"not opened")
    out = tmp_path / "gqa.jsonl"
    check = f"check_images={images}"
    with raises_input_error(ErrorCode.MISSING_IMAGE, "/gqa/images/5.jpg"):
        convert_dataset("gqa", folder, out, [check], console)
    assert not out.exists()
    convert_dataset("gqa", folder, out, [check, "missing=skip"], console)
    (sample,) = JsonDataset(out, images)
    assert summarize(sample)[1] == [(f"<|image|>\nIs it réd?{SHORT}", "no")]
    skipped = json.loads(out.with_name("gqa.stats.json").read_text())["skipped"]
    assert skipped["samples whose image does not exist"] == 1


@pytest.mark.parametrize(
    ("settings", "expected_error"),
    [
        (["missing=skip"], (ErrorCode.MISSING_VALUE, "check_images=DIR")),
        (["check_images=none/there"], (ErrorCode.FILE_NOT_FOUND, "none/there")),
        (["check_images=.", "missing=ignore"], (ErrorCode.INVALID_VALUE, "ignore")),
    ],
)
def test_options_of_the_image_check(tmp_path, folder, settings, expected_error, console):
    with raises_input_error(*expected_error):
        convert_dataset("gqa", folder, tmp_path / "gqa.jsonl", settings, console)


# ------------------------------------------------------------------ shards


def test_shards_become_an_entry_of_a_recipe(tmp_path, folder, console):
    for number in (0, 1, 2, 4):
        put_shard(folder, number, number + 1)
    put_shard(folder, 3).with_name("00003_stats.json").unlink()
    out = tmp_path / "cc3m.yaml"
    convert_dataset("cc3m", folder, out, ["read=true"], console)
    assert out.read_text() == (
        "# An entry for `data` in a recipe: 4 shards with 11 pairs\n"
        "- name: cc3m\n"
        "  shards:\n"
        f"  - {folder}/{{00000..00002}}.tar\n"
        f"  - {folder}/00004.tar\n"
        "  weight: 11\n"
    )
    output = console.export_text()
    assert "Wrote 4 shards with 11 pairs" in output
    assert "Skipped: 1 shards without statistics" in output
    (entry,) = yaml.safe_load(out.read_text())
    source = DataSource(**entry)
    assert TarDataset(source.shards).urls == [
        f"{folder}/{number:05d}.tar" for number in (0, 1, 2, 4)
    ]


def test_no_complete_shard_is_an_error(tmp_path, folder, console):
    put_shard(folder, 0).with_name("00000_stats.json").unlink()
    with raises_input_error(ErrorCode.EMPTY_DATASET):
        convert_dataset("laion", folder, tmp_path / "laion.yaml", [], console)
    assert not (tmp_path / "laion.yaml").exists()


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("name", "out", "settings", "expected_error"),
    [
        ("gqq", "out.jsonl", [], (ErrorCode.UNKNOWN_NAME, "gqq")),
        ("gqa", "out.json", [], (ErrorCode.INVALID_VALUE, "out.json")),
        ("cc3m", "out.jsonl", [], (ErrorCode.INVALID_VALUE, "out.jsonl")),
        ("gqa", "out.jsonl", ["seed=1"], (ErrorCode.UNKNOWN_NAME, "seed")),
        ("gqa", "out.jsonl", ["source=x"], (ErrorCode.UNKNOWN_NAME, "source")),
        ("gqa", "out.jsonl", ["split"], (ErrorCode.INVALID_FORMAT, "option=value")),
        ("gqa", "out.jsonl", ["split=test"], (ErrorCode.INVALID_VALUE,)),
        ("gqa", "out.jsonl", ["split=3"], (ErrorCode.INVALID_TYPE, "split=3")),
        ("gqa", "out.jsonl", ["file=[a]"], (ErrorCode.INVALID_TYPE, "file=")),
        ("coco_captions", "out.jsonl", ["seed=x"], (ErrorCode.INVALID_TYPE, "seed=x")),
        ("coco_captions", "out.jsonl", ["seed=true"], (ErrorCode.INVALID_TYPE, "seed=True")),
        ("laion", "out.yaml", ["read=1"], (ErrorCode.INVALID_TYPE, "read=1")),
        ("laion", "out.yaml", ["check_images=."], (ErrorCode.UNKNOWN_NAME, "check_images")),
    ],
)
def test_invalid_conversion_options_are_refused(
    tmp_path, folder, name, out, settings, expected_error, console
):
    with raises_input_error(*expected_error):
        convert_dataset(name, folder, tmp_path / out, settings, console)
    assert not (tmp_path / out).exists()


def test_an_empty_result_is_an_error(tmp_path, folder, console):
    put(folder, "train_balanced_questions.json", {"1": question("5", "Is it?", "")})
    with raises_input_error(ErrorCode.EMPTY_DATASET, "1"):
        convert_dataset("gqa", folder, tmp_path / "gqa.jsonl", [], console)


def test_an_invalid_row_leaves_an_existing_file_unchanged(tmp_path, folder, console):
    put(folder, SHAREGPT, [shared(*CONVERSATION)])
    out = tmp_path / "sharegpt.jsonl"
    convert_dataset("sharegpt", folder, out, [], console)
    old = out.read_text()
    put(folder, SHAREGPT, [shared(*CONVERSATION)] * 3 + [{"id": "no conversations"}])
    with raises_input_error(ErrorCode.MISSING_VALUE, "conversations"):
        convert_dataset("sharegpt", folder, out, [], console)
    assert out.read_text() == old
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "published",
        "sharegpt.jsonl",
        "sharegpt.stats.json",
    ]


@pytest.mark.parametrize(("name", "out"), [("slimorca", SLIMORCA), ("cc3m", "recipe.yaml")])
def test_foreign_files_are_not_overwritten(folder, name, out, console):
    (folder / SLIMORCA).write_text(json.dumps(orca(*CONVERSATION)))
    put_shard(folder, 0)
    path = folder / out
    path.write_text(before := "# An entry\n" if name == "cc3m" else path.read_text())
    with raises_input_error(ErrorCode.FILE_EXISTS):
        convert_dataset(name, folder, path, [], console)
    assert path.read_text() == before
    other = folder / f"out{path.suffix}"
    for _ in range(2):
        convert_dataset(name, folder, other, [], console)


def test_an_unwritable_output_is_refused(tmp_path, folder, console):
    publish_gqa(folder)
    (tmp_path / "file").write_text("")
    with raises_input_error(ErrorCode.WRITE_FAILED):
        convert_dataset("gqa", folder, tmp_path / "file" / "gqa.jsonl", [], console)


# ------------------------------------------------------------------ the command


def test_the_command_line(run_cli, tmp_path, folder):
    publish_gqa(folder)
    out = tmp_path / "gqa.jsonl"
    result = run_cli("data", "convert", "gqa", folder, out, "split=train")
    assert result.exit_code == 0
    assert len(JsonDataset(out, tmp_path)) == 2
    assert "2 samples" in result.stdout
    result = run_cli("data", "convert", "gqa", folder, out, "split=val")
    assert result.exit_code == 2
    assert "val_balanced_questions.json" in result.stderr
    assert run_cli("data", "convert", "gqa", folder).exit_code == 2


def test_the_listing_shows_all_datasets(run_cli):
    result = run_cli("data", "convert", "--list")
    output = result.stdout
    assert (result.exit_code, output) == (0, listing())
    for name, entry in DATASET_CARDS.items():
        assert f"\n{name}  " in f"\n{output}"
        assert entry.url in output
        assert all(file in output for names in entry.files.values() for file in names)
        assert entry.contents in output
    assert "options  split=train coco=2014 max_rounds=... questions=... annotations=..." in output


def test_urls_of_images_are_not_changed(folder, tmp_path):
    output = [("human", "<image>\nWhat is it?"), ("gpt", "A bus.")]
    row = llava_row(*output, image="https://example.org/a.jpg")
    put(folder, "llava_instruct_150k.json", [row])
    convert_dataset("llava_instruct", folder, tmp_path / "out.jsonl", [f"check_images={tmp_path}"])
    assert "https://example.org/a.jpg" in (tmp_path / "out.jsonl").read_text()


def test_a_lone_surrogate_is_skipped(folder, tmp_path):
    """JSON can contain half of a surrogate pair; UTF-8 and tokenizers cannot."""
    turns = [{"from": "human", "value": "hi \ud83d"}, {"from": "gpt", "value": "a"}]
    valid = [{"from": "human", "value": "hi \U0001f600"}, {"from": "gpt", "value": "a"}]
    rows = [{"id": "1", "conversations": turns}, {"id": "2", "conversations": valid}]
    (folder / "ShareGPT_V3_unfiltered_cleaned_split.json").write_text(json.dumps(rows))
    convert_dataset("sharegpt", folder, tmp_path / "out.jsonl", [])
    stats = json.loads((tmp_path / "out.stats.json").read_text())
    assert stats["skipped"] == {"conversations with a lone surrogate": 1}
