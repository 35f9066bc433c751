"""`owl2 data check` finds the invalid samples that training refuses, in all kinds of datasets."""

import io
import json
import multiprocessing
import os
import signal
import tarfile
from pathlib import Path
from random import Random

import pytest
from PIL import Image
from rich.console import Console

from owl2.data.augment import AUGMENTATIONS
from owl2.data.collate import encode_sample
from owl2.data.json_dataset import JsonDataset
from owl2.data.open_dataset import open_dataset, unique_names
from owl2.data.sample import InvalidSample, get_or_invalid
from owl2.data.validate import command
from owl2.data.validate.command import validate_datasets
from owl2.data.validate.validator import SampleValidator, sample_hash
from owl2.data.webdataset import TarDataset
from owl2.errors import ErrorCode
from owl2.processing.processor import Owl2Processor
from owl2.progress import ProgressReporter
from tests.data.bad_rows import BAD, MAX_LENGTH, ROWS, row, save_checkpoint, write_rows
from tests.errors import raises_input_error


@pytest.fixture
def checkpoint(tmp_path, processor):
    return save_checkpoint(tmp_path, processor)


@pytest.fixture
def chat(tmp_path):
    return write_rows(tmp_path)


@pytest.fixture
def load(checkpoint):
    return lambda: Owl2Processor.from_pretrained(checkpoint)


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def run(load, datasets, max_length=MAX_LENGTH, check_images=True, fetch_urls=False, **options):
    options = {"num_workers": 1, "console": quiet()} | options
    validator = SampleValidator(load(), max_length, check_images, fetch_urls)
    return validate_datasets(datasets, validator, **options)


def invalid_codes(report) -> dict[str, str]:
    return {sample.source.rpartition(", ")[2]: sample.code for sample in report.first}


# ------------------------------------------------------------------ what is found


def test_every_kind_of_invalid_row_is_reported(load, chat):
    report = run(load, {"chat": JsonDataset(chat)})
    assert invalid_codes(report) == BAD
    total = report.total
    assert (total.rows, total.usable, total.truncated) == (len(ROWS), len(ROWS) - len(BAD), 1)
    assert report.duplicates == 1


@pytest.mark.parametrize("augment", ["none", "crop_flip"])
def test_training_refuses_the_same_samples(load, chat, augment):
    rows = JsonDataset(chat)
    augmentation = AUGMENTATIONS[augment]
    encoded = [
        encode_sample(get_or_invalid(rows, i), load(), MAX_LENGTH, augmentation, Random(i))
        for i in range(len(ROWS))
    ]
    refused = {
        (sample.source, sample.code) for sample in encoded if isinstance(sample, InvalidSample)
    }
    found = {(sample.source, sample.code) for sample in run(load, {"": JsonDataset(chat)}).first}
    assert refused == found
    assert len(found) == len(BAD)


def test_invalid_rows_of_messages_are_reported(load, tmp_path):
    lines = [
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
        '{"messages": [{"role": "user", "content": 3}, {"role": "assistant", "content": "b"}]}',
        '{"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]}',
        '{"messages": [{"role": "system", "content": "be kind"}]}',
        '{"messages": ',
    ]
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    expected = {
        "line 2": ErrorCode.INVALID_TYPE,
        "line 3": ErrorCode.INVALID_TYPE,
        "line 4": ErrorCode.INVALID_ROLE,
    }
    assert invalid_codes(run(load, {"": JsonDataset(path)})) == expected | {
        "line 5": ErrorCode.INVALID_FORMAT
    }


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))


@pytest.fixture
def shards(tmp_path, chat):
    good, cut = (tmp_path / "good.png").read_bytes(), (tmp_path / "cut.png").read_bytes()
    for number in range(2):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            for key, image in {"a": good, "b": cut, "c": good}.items():
                add(tar, f"{key}.png", image)
                add(tar, f"{key}.txt", b"" if (number, key) == (1, "c") else b"a red circle")
    data = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "2.tar").write_bytes(data[: len(data) // 2 + 700])
    return tmp_path / "{0..2}.tar"


@pytest.mark.parametrize("workers", [1, 2])
def test_shards_are_validated(load, shards, workers):
    report = run(load, {"web": TarDataset(str(shards))}, num_workers=workers)
    places = [(Path(sample.source).name, sample.code) for sample in report.first]
    assert places[:3] == [
        ("0.tar, b", ErrorCode.BROKEN_IMAGE),
        ("1.tar, b", ErrorCode.BROKEN_IMAGE),
        ("1.tar, c", ErrorCode.EMPTY_MESSAGE),
    ]
    assert places[-1][0] == "2.tar"
    assert report.stats["web"].images[1] == report.total.usable >= 3


def test_shards_without_samples_are_an_error(load, tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w"):
        pass
    with raises_input_error(ErrorCode.EMPTY_DATASET):
        run(load, {"web": TarDataset(str(tmp_path / "0.tar"))})


def test_arrow_datasets_are_validated(load, tmp_path, chat):
    datasets = pytest.importorskip("datasets")
    images = [(tmp_path / name).read_bytes() for name in ("good.png", "cut.png", "good.png")]
    columns = {
        "image": [{"bytes": data, "path": None} for data in images],
        "caption": ["a red circle", "a red circle", " "],
    }
    table = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    table.save_to_disk(tmp_path / "table")
    report = run(load, {"": open_dataset(hf_dataset=str(tmp_path / "table"))}, num_workers=2)
    assert invalid_codes(report) == {
        "row 2": ErrorCode.BROKEN_IMAGE,
        "row 3": ErrorCode.EMPTY_MESSAGE,
    }


def test_the_result_does_not_depend_on_the_number_of_workers(load, chat, tmp_path, monkeypatch):
    monkeypatch.setattr("owl2.data.validate.validator.ROWS_PER_ITEM", 3)
    results = []
    for workers in (1, 3):
        output = tmp_path / f"out{workers}"
        run(
            load,
            unique_names([("a", JsonDataset(chat)), ("a", JsonDataset(chat))]),
            num_workers=workers,
            output=output,
        )
        facts = json.loads((output / "statistics.json").read_text(encoding="utf-8"))
        assert facts.pop("num_workers") == workers
        assert facts.pop("seconds") > 0
        results.append((facts, (output / "invalid_samples.jsonl").read_text(encoding="utf-8")))
        assert (output / "statistics.png").stat().st_size > 10_000
    assert results[0] == results[1]
    facts, rows = results[0]
    assert facts["all"]["invalid_by_code"][ErrorCode.INVALID_ROLE] == 6
    assert facts["datasets"]["a"] == facts["datasets"]["a (2)"]
    assert facts["complete"] is True
    lines = [json.loads(line) for line in rows.splitlines()]
    assert [line["dataset"] for line in lines] == ["a"] * len(BAD) + ["a (2)"] * len(BAD)
    assert lines[0] == {
        "dataset": "a",
        "source": f"{chat}, row 2",
        "code": ErrorCode.MISSING_IMAGE,
        "reason": lines[0]["reason"],
    }
    assert "gone.png" in lines[0]["reason"]


def test_the_terminal_shows_the_first_invalid_samples_and_counts_all(load, chat):
    console = quiet()
    datasets = unique_names([("a", JsonDataset(chat)), ("a", JsonDataset(chat))])
    run(load, datasets, console=console)
    shown = console.file.getvalue()
    assert f"{chat}, row 2: " in shown
    assert f"... and {2 * len(BAD) - command.MAX_SHOWN} more" in shown
    assert "  image_count_mismatch" in shown
    assert f"{2 * len(BAD)} samples are invalid" in shown
    assert "2 samples (33.3%) are truncated to 40 tokens" in shown


# ------------------------------------------------------------------ images


def test_images_behind_urls_are_counted_but_not_fetched(load, tmp_path, monkeypatch):
    def fetch(*args: object, **kwargs: object) -> None:
        raise OSError("the network was asked")

    monkeypatch.setattr("urllib.request.urlopen", fetch)
    path = tmp_path / "chat.json"
    path.write_text(json.dumps([row("<image>what?", "https://example.org/a.png")]))
    console = quiet()
    report = run(load, {"": JsonDataset(path)}, console=console)
    assert (report.total.unchecked_images, report.total.invalid.total()) == (1, 0)
    assert report.total.images == {1: 1}
    assert "1 images were not opened; --fetch-urls" in console.file.getvalue()
    fetched = run(load, {"": JsonDataset(path)}, fetch_urls=True)
    assert fetched.total.invalid == {ErrorCode.MISSING_IMAGE: 1}


def test_without_check_images_only_texts_are_validated(load, chat):
    report = run(load, {"": JsonDataset(chat)}, check_images=False)
    images = (ErrorCode.MISSING_IMAGE, ErrorCode.BROKEN_IMAGE, ErrorCode.IMAGE_TOO_LARGE)
    assert set(invalid_codes(report).values()) == set(BAD.values()) - set(images)
    assert report.total.unchecked_images == 6
    assert not report.total.image_edge


def test_image_sizes_are_those_of_the_files(load, chat):
    total = run(load, {"": JsonDataset(chat)}).total
    assert total.image_edge == {30: 2}
    assert total.summary()["aspect_ratio"]["median"] == pytest.approx(1.5, rel=0.02)


def test_sample_hash_includes_the_images():
    def hashes(*images: object) -> set[int]:
        parts = [{"type": "image", "image": image} for image in images]
        return {sample_hash([{"role": "user", "content": [part]}]) for part in parts}

    one, other = (Image.new("RGB", (2, 2), color) for color in ("red", "blue"))
    assert len(hashes("a.png", "b.png", b"a", b"b", one, other)) == 6
    assert len(hashes(b"a", b"a")) == len(hashes(one, one.copy())) == 1


# ------------------------------------------------------------------ stopping


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupt_keeps_the_results_so_far(load, chat, tmp_path, monkeypatch, workers):
    monkeypatch.setattr("owl2.data.validate.validator.ROWS_PER_ITEM", 2)
    advance = ProgressReporter.advance
    before = signal.getsignal(signal.SIGINT)

    def interrupted(self, *arguments: object) -> None:
        advance(self, *arguments)
        if self.completed == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(ProgressReporter, "advance", interrupted)
    many = unique_names([("chat", JsonDataset(chat))] * 30)
    report = run(load, many, num_workers=workers, output=tmp_path / "out")
    assert not report.finished
    assert 4 <= report.total.rows < 30 * len(ROWS)
    lines = (tmp_path / "out" / "invalid_samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == report.total.invalid.total() >= 3
    facts = json.loads((tmp_path / "out" / "statistics.json").read_text(encoding="utf-8"))
    assert facts["complete"] is False
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_interrupt_raises():
    # A shell starts background jobs with the signal ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    stop = multiprocessing.Event()
    with pytest.raises(KeyboardInterrupt), command.stop_on_interrupt(stop):
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.is_set()
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_killed_worker_is_reported(load, chat, monkeypatch):
    def die(self, sample: object) -> None:
        os._exit(9)

    monkeypatch.setattr("owl2.data.validate.validator.ROWS_PER_ITEM", 2)
    monkeypatch.setattr(SampleValidator, "validate", die)
    with raises_input_error(ErrorCode.PROCESS_FAILED):
        run(load, {"": JsonDataset(chat)}, num_workers=2)


def test_one_process_needs_no_shared_memory(load, chat, monkeypatch):
    monkeypatch.setattr("owl2.data.dataloader.MIN_SHARED_MEMORY", 2**60)
    monkeypatch.setattr("owl2.data.validate.validator.ROWS_PER_ITEM", 2)
    monkeypatch.setattr(multiprocessing, "Event", None)
    assert run(load, {"": JsonDataset(chat)}, num_workers=1).total.rows == len(ROWS)
    with raises_input_error(ErrorCode.OUT_OF_MEMORY, "--workers 1"):
        run(load, {"": JsonDataset(chat)}, num_workers=2)


def test_an_unwritable_output_directory_is_refused(load, chat):
    with raises_input_error(ErrorCode.WRITE_FAILED, "/proc/nowhere"):
        run(load, {"": JsonDataset(chat)}, output="/proc/nowhere")
