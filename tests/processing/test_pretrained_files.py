"""Processors are saved with checkpoints and loaded; the released layout is supported."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image
from transformers import AutoProcessor, CLIPImageProcessor
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from owl2.checkpoints import config_file
from owl2.errors import ErrorCode
from owl2.processing.image_processing import Owl2ImageProcessor
from owl2.processing.messages import user_message
from owl2.processing.processor import Owl2Processor
from owl2.processing.tokenizer import Owl2Tokenizer
from tests.errors import raises_input_error
from tests.family import SIBLINGS, load_processor
from tests.processing.samples import CHATML, equal_processors

GOLDEN = Path(__file__).parent.parent / "golden"


PAD = {"image_aspect_ratio": "pad"}
CODE = {"auto_map": {"AutoConfig": "configuration_mplug_owl2.MPLUGOwl2Config"}}


@pytest.mark.parametrize(
    ("config", "pixels", "option", "expected", "reason"),
    [
        ({}, {}, None, "resize", "default of mplug_owl2"),
        (PAD, {}, None, "pad", "image_aspect_ratio"),  # Compare2Score, Co-Instruct
        (CODE, {}, None, "resize", "default of mplug_owl2"),
        (PAD | CODE, {}, None, "pad", "image_aspect_ratio"),  # OneAlign, DeQA-Score
        (PAD | CODE, {"image_policy": "resize"}, None, "resize", "image_policy"),
        ({}, {"image_policy": "pad"}, None, "pad", "image_policy"),
        (PAD | CODE, {"image_policy": "pad"}, "resize", "resize", "image_policy"),
    ],
)
def test_order_of_the_image_policies(
    tmp_path, processor, run_cli, monkeypatch, config, pixels, option, expected, reason
):
    monkeypatch.setenv("COLUMNS", "200")
    processor.save_pretrained(tmp_path)
    golden = json.loads((GOLDEN / "model_mha" / "config.json").read_text())
    golden["vocab_size"] = processor.tokenizer.vocab_size
    (tmp_path / "config.json").write_text(json.dumps(golden | config))
    file = tmp_path / "preprocessor_config.json"
    values = json.loads(file.read_text())
    del values["image_policy"]
    own = json.loads((tmp_path / "processor_config.json").read_text())
    assert own.pop("interleave_images") is False
    (tmp_path / "processor_config.json").write_text(json.dumps(own))  # as written before
    file.write_text(json.dumps(values | pixels))
    loaded = Owl2Processor.from_pretrained(tmp_path, image_policy=option)
    assert loaded.image_processor.image_policy == expected
    # Prompts of OneAlign and Co-Instruct have images inside the text.
    assert loaded.interleave_images == ("image_aspect_ratio" in config)
    shown = run_cli("info", tmp_path).stdout
    assert reason in shown and (option or expected in shown)


@pytest.mark.parametrize(
    ("shard", "expected"),
    [("pytorch_model-1-of-33.bin", "resize"), ("pytorch_model-00001-of-00002.bin", "pad")],
)
def test_released_checkpoint_stretches_images_whatever_its_configuration_says(
    released, shard, expected
):
    config = json.loads((released / "config.json").read_text())
    (released / "config.json").write_text(json.dumps(config | PAD))
    index = {"metadata": {}, "weight_map": {"lm_head.weight": shard}}
    (released / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    loaded = Owl2Processor.from_pretrained(released)
    assert loaded.image_processor.image_policy == expected
    assert loaded.interleave_images == (expected == "pad")


@pytest.mark.parametrize("kind", ["llama", "byte level"])
def test_round_trip(tmp_path, kind, llama, byte_level, image):
    tokenizer = llama if kind == "llama" else byte_level
    template = None if kind == "llama" else CHATML
    token_id = None if kind == "llama" else 512
    pixels = Owl2ImageProcessor(28, "pad", max_pixels=5_000)
    processor = Owl2Processor(pixels, tokenizer, template, 9, token_id)
    processor.save_pretrained(tmp_path / "a")
    again = Owl2Processor.from_pretrained(tmp_path / "a")
    equal_processors(processor, again, image)
    assert again.image_token_id == (token_id or 32000) and again.num_image_tokens == 9
    assert again.image_processor.to_dict() == pixels.to_dict()
    again.save_pretrained(tmp_path / "b")
    files, files_again = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "ab"
    )
    if kind == "byte level":  # a fast tokenizer's own: transformers adds to it when it loads
        del files["tokenizer_config.json"], files_again["tokenizer_config.json"]
    assert files == files_again
    changed = Owl2Processor.from_pretrained(
        tmp_path / "a", image_policy="resize", max_pixels=7, chat_template="x"
    )
    assert changed.image_processor.image_policy == "resize" and changed.chat_template == "x"
    assert changed.image_processor.max_pixels == 7


@pytest.fixture
def released(tmp_path, llama_file) -> Path:
    """A directory as the authors released it: nothing of ours."""
    config = {
        "model_type": "mplug_owl2",
        "vocab_size": 32000,
        "visual_config": {"visual_abstractor": {"num_learnable_queries": 5}},
    }
    tokenizer = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "padding_side": "right"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    shutil.copy(llama_file, tmp_path / "tokenizer.model")
    shutil.copy(GOLDEN / "image" / "preprocessor_config.json", tmp_path)
    return tmp_path


def test_released_layout(released, processor, llama_file, image):
    processor.tokenizer = Owl2Tokenizer(llama_file, legacy=False, padding_side="left")
    loaded = Owl2Processor.from_pretrained(released)
    equal_processors(processor, loaded, image)
    assert (loaded.num_image_tokens, loaded.image_token_id) == (6, 32000)
    assert loaded.image_processor.image_policy == "resize"


def test_model_vocabulary_may_be_larger_than_the_tokenizer(released):
    config = json.loads((released / "config.json").read_text())
    (released / "config.json").write_text(json.dumps({**config, "vocab_size": 32064}))
    loaded = Owl2Processor.from_pretrained(released)
    assert loaded.image_token_id == 32064
    loaded.save_pretrained(released)
    (released / "config.json").unlink()
    assert Owl2Processor.from_pretrained(released).image_token_id == 32064


def test_defaults_without_a_count_of_queries(released):
    (released / "config.json").write_text(json.dumps({"model_type": "mplug_owl2"}))
    assert Owl2Processor.from_pretrained(released).num_image_tokens == 65


def test_image_size_comes_from_the_model_config_without_a_preprocessor_file(released):
    """Only sizes differ from checkpoint to pretrained_files, and config.json has them."""
    (released / "preprocessor_config.json").unlink()
    config = json.loads((released / "config.json").read_text())
    config["visual_config"]["visual_model"] = {"image_size": 28}
    (released / "config.json").write_text(json.dumps(config))
    assert Owl2Processor.from_pretrained(released).image_processor.edge == 28
    (released / "config.json").unlink()
    with raises_input_error(ErrorCode.FILE_NOT_FOUND, "preprocessor_config.json"):
        Owl2Processor.from_pretrained(released)


def refuse(*args: object, **kwargs: object) -> None:
    raise OSError("not today")


def test_wrong_path_requests_the_hub_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []

    def unreachable(name: str, file: str, **kwargs: object) -> None:
        asked.append(file)
        raise OSError("no connection") from LocalEntryNotFoundError("no connection")

    with raises_input_error(ErrorCode.FILE_NOT_FOUND, "runs/modl", "offline"):
        Owl2Processor.from_pretrained("runs/modl")
    monkeypatch.setattr(config_file, "cached_file", unreachable)
    monkeypatch.setattr(config_file, "is_offline_mode", lambda: False)
    with raises_input_error(ErrorCode.NETWORK, "runs/modl"):
        Owl2Processor.from_pretrained("runs/modl")
    assert asked == ["config.json"]
    (tmp_path / "runs").mkdir()
    with raises_input_error(ErrorCode.FILE_NOT_FOUND, "runs/modl"):
        Owl2Processor.from_pretrained("runs/modl")
    assert asked == ["config.json"]


def test_incomplete_hub_repository_is_named(released, monkeypatch):
    config = str(released / "config.json")
    monkeypatch.setattr(
        config_file,
        "cached_file",
        lambda _, file, **kw: config if file == "config.json" else None,
    )
    with raises_input_error(ErrorCode.FILE_NOT_FOUND, "owner/nothing", "hub", "tokenizer.model"):
        Owl2Processor.from_pretrained("owner/nothing")


def test_tokenizer_config_alone_is_rejected(released):
    (released / "tokenizer.model").unlink()
    (released / "vocab.json").write_text("{}")
    with raises_input_error(ErrorCode.FILE_NOT_FOUND, "tokenizer.model or tokenizer.json"):
        Owl2Processor.from_pretrained(released)
    empty = {"model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": []}
    (released / "tokenizer.json").write_text(json.dumps(empty))
    with raises_input_error(ErrorCode.UNREADABLE_FILE, "tokenizer"):
        Owl2Processor.from_pretrained(released)


@pytest.mark.parametrize(
    ("file", "content", "code", "needle"),
    [
        ("tokenizer_config.json", b"{", ErrorCode.INVALID_CONFIG, "tokenizer_config.json"),
        (
            "tokenizer_config.json",
            b"[" * 100_000,
            ErrorCode.INVALID_CONFIG,
            "tokenizer_config.json",
        ),
        ("tokenizer_config.json", b"[]", ErrorCode.INVALID_CONFIG, "tokenizer_config.json"),
        ("tokenizer_config.json", b'{"bos_token": 5}', ErrorCode.INVALID_CONFIG, "bos_token"),
        (
            "tokenizer_config.json",
            b'{"extra_special_tokens": 5}',
            ErrorCode.UNREADABLE_FILE,
            "tokenizer_config.json",
        ),
        (
            "preprocessor_config.json",
            b'{"size": 56, "image_mean": 5}',
            ErrorCode.INVALID_CONFIG,
            "image_mean 5",
        ),
        ("config.json", b'{"model_type": "llama"}', ErrorCode.UNSUPPORTED, "llama"),
        *(
            (file, f'{{"size": 56, "{key}": "XProcessor"}}'.encode(), ErrorCode.UNSUPPORTED, "a XP")
            for file, key in (
                ("processor_config.json", "processor_class"),
                ("preprocessor_config.json", "processor_class"),
                ("preprocessor_config.json", "image_processor_type"),
                ("preprocessor_config.json", "feature_extractor_type"),
            )
        ),
        (
            "config.json",
            b'{"model_type": "mplug_owl2", "vocab_size": null}',
            ErrorCode.INVALID_CONFIG,
            "vocab_size",
        ),
        (
            "processor_config.json",
            b'{"num_image_tokens": 0}',
            ErrorCode.INVALID_CONFIG,
            "num_image_tokens",
        ),
        ("chat_template.jinja", b"\xff\xfe", ErrorCode.UNREADABLE_FILE, "chat_template.jinja"),
    ],
)
def test_invalid_files_are_named(released, file, content, code, needle):
    (released / file).write_bytes(content)
    with raises_input_error(code, needle):
        Owl2Processor.from_pretrained(released)


def test_incomplete_checkpoints_are_rejected(tmp_path, released, monkeypatch):
    with raises_input_error(ErrorCode.FILE_NOT_FOUND, "./nowhere"):
        Owl2Processor.from_pretrained("./nowhere")
    with monkeypatch.context() as patch:
        patch.setattr(config_file, "cached_file", refuse)
        with raises_input_error(ErrorCode.NETWORK, "config.json"):
            Owl2Processor.from_pretrained("owner/nothing")
    empty = tmp_path / "empty"
    empty.mkdir()
    with raises_input_error(
        ErrorCode.FILE_NOT_FOUND, "tokenizer.model", "preprocessor_config.json"
    ):
        Owl2Processor.from_pretrained(empty)
    (released / "preprocessor_config.json").write_text("[1")
    with raises_input_error(ErrorCode.INVALID_CONFIG, "preprocessor_config.json"):
        Owl2Processor.from_pretrained(released)
    (released / "preprocessor_config.json").write_text("[1]")
    with raises_input_error(ErrorCode.INVALID_CONFIG, "preprocessor_config.json"):
        Owl2Processor.from_pretrained(released)
    with pytest.raises(TypeError, match="policy"):
        Owl2Processor.from_pretrained(released, policy="pad")


def test_arguments_of_the_parts(released, processor):
    options = {"use_fast": False, "backend": "pil", "trust_remote_code": True}
    options |= {"padding_side": "right", "sep_token": "(SEP)", "do_normalize": False}
    loaded = AutoProcessor.from_pretrained(released, image_newline=True, **options)
    assert (loaded.tokenizer.padding_side, loaded.tokenizer.sep_token) == ("right", "(SEP)")
    assert (loaded.image_processor.do_normalize, loaded.image_newline) == (False, True)
    assert Owl2Processor.from_pretrained(released).tokenizer.padding_side == "left"
    parts = {"image_processor": Owl2ImageProcessor(8), "tokenizer": processor.tokenizer}
    loaded = Owl2Processor.from_pretrained(released, **parts)
    assert all(getattr(loaded, name) is part for name, part in parts.items())


def test_saved_processor_is_read_by_transformers(tmp_path, processor):
    processor.image_processor = Owl2ImageProcessor(28, "pad")
    processor.save_pretrained(tmp_path)
    assert AutoProcessor.from_pretrained(tmp_path).to_dict() == processor.to_dict()
    part = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(part) is Owl2ImageProcessor and repr(part) == repr(processor.image_processor)
    clip = CLIPImageProcessor.from_pretrained(tmp_path)
    assert clip.size == {"shortest_edge": 28} and clip.crop_size == {"height": 28, "width": 28}
    written = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert written["image_processor_type"] == "CLIPImageProcessor"
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "x"}))
    assert Owl2Processor.from_pretrained(tmp_path).chat_template == "x"


@pytest.mark.parametrize("sibling", SIBLINGS)
def test_processor_of_a_sibling_without_its_model(sibling, tmp_path):
    """The files of the processor name its classes; there is no config.json."""
    processor = load_processor(sibling)
    processor.save_pretrained(tmp_path)
    loaded = Owl2Processor.from_pretrained(tmp_path)
    assert type(loaded.image_processor) is type(processor.image_processor)
    assert type(loaded.tokenizer) is type(processor.tokenizer)
    image = Image.new("RGB", (150, 60), "red")
    messages = [user_message("what is this?", [image, image])]
    expected, found = processor.encode(messages), loaded.encode(messages)
    assert found.ids == expected.ids
    assert torch.equal(found.pixel_values, expected.pixel_values)
    assert (found.image_grids is None) == (sibling != "docowl2")
