"""`owl2 info`: the parts of a model, without its weights."""

import json
import shutil

import pytest
import torch

from owl2.checkpoints.adapters import lora_parameters
from owl2.cli.info import adapter_rows, command_of, parameter_counts, size_table
from owl2.engine.backends.native import build
from owl2.engine.lora import LoraManager, find_adapters
from owl2.errors import ErrorCode
from owl2.model.configuration import Owl2Config
from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.runtime import select_dtype
from tests.adapters import load, make_adapter
from tests.errors import raises_input_error
from tests.scoring.golden import FAMILY
from tests.tiny import make_config, make_model

# From Specification §1: width 4096, MLP 11008, 32 layers; ViT 1024, MLP 4096, 24 layers.
K_V_NORMS = 32 * (2 * 4096 * 4096 + 2 * 4096)
VIT_BLOCK = 4 * 1024 * 1024 + 4 * 1024 + 2 * 1024 * 4096 + 4096 + 1024 + 4 * 1024
RELEASED = {
    "vision encoder": 24 * VIT_BLOCK + 1024 + 1025 * 1024 + 3 * 14 * 14 * 1024 + 4 * 1024,
    "visual abstractor": 6 * (3 * (1024 * 1024 + 1024) + 1024 * 1024 + 1024 + 3 * 2 * 1024)
    + 6 * (3 * 1024 * 2816 + 2 * 2816 + 1024 + 2 * 2816)
    + (64 * 1024 + 1024 * 4096 + 4096 + 4096),
    "decoder": 32 * (2 * 4096 * 4096 + 3 * 4096 * 11008) + K_V_NORMS + 4096,
    "decoder, visual weights (MAM)": K_V_NORMS,
    "embeddings and head": 2 * 32000 * 4096,
}


def test_released_model_has_8_197_859_328_parameters():
    counts = parameter_counts(Owl2Config())
    assert counts == RELEASED
    assert sum(counts.values()) == 8_197_859_328


def test_full_model_is_created_on_the_meta_device():
    with torch.device("meta"):
        model = Owl2ForConditionalGeneration(Owl2Config())
    assert model.num_parameters() == 8_197_859_328
    assert all(parameter.device.type == "meta" for parameter in model.parameters())


@pytest.mark.parametrize("settings", [{}, {"use_mam": False}, {"tie_word_embeddings": True}])
def test_parts_of_a_small_model(settings):
    model = make_model(**settings)
    counts = parameter_counts(make_config(**settings))
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())
    assert ("decoder, visual weights (MAM)" in counts) == settings.get("use_mam", True)
    embedding = 40 * 16
    assert (
        counts["embeddings and head"] == (1 if "tie_word_embeddings" in settings else 2) * embedding
    )


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")


def test_command_shows_the_released_sizes(run_cli):
    result = run_cli("info")
    assert "CPU kernels" in result.stdout
    assert build.kernels().instructions in result.stdout
    out = result.stdout
    assert result.exit_code == 0
    for count in RELEASED.values():
        assert f"{count:,}" in out
    assert "8,197,859,328" in out and "16.40 GB" in out
    assert "24 layers, width 1024, 448 px, patch 14" in out
    assert "6 layers, width 1024, 65 embeddings per image" in out


def test_command_shows_a_checkpoint(run_cli, tmp_path):
    make_model(use_mam=False, tie_word_embeddings=True).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()  # the configuration is enough
    result = run_cli("info", tmp_path)
    out = result.stdout
    assert result.exit_code == 0
    assert "4 heads (2 for keys and values)" in out and "vocabulary 40, tied" in out
    assert "MAM" not in out
    assert " MB in 16 bits" in out and " 0.00" not in out


@pytest.mark.parametrize("content", [None, "{broken", "{}", '{"model_type": "clip"}'])
def test_other_models_are_rejected(run_cli, tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content, encoding="utf-8")
    result = run_cli("info", tmp_path)
    assert (result.exit_code, result.stdout) == (2, "")
    assert str(tmp_path) in result.stderr and "Traceback" not in result.stderr


def test_invalid_configuration_is_rejected(tmp_path):
    values = json.loads(json.dumps(make_config().to_dict()))
    values["visual_config"]["visual_model"]["image_size"] = 9
    (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    with raises_input_error(ErrorCode.INVALID_CONFIG, "image_size"):
        size_table(str(tmp_path))


def test_memory_of_adapters(run_cli, tiny_checkpoint, tmp_path):
    """Two adapters beside their base model, one of which has its own abstractor."""
    settings = {"text": {"r": 3}, "vision": {"r": 2, "modules_to_save": ["abstractor"]}}
    folders = {
        name: make_adapter(tiny_checkpoint, tmp_path / name, 1, parts=["decoder"], **own)
        for name, own in settings.items()
    }
    model = load(tiny_checkpoint)
    copied = model.model.visual_abstractor.state_dict().values()
    abstractor = sum(tensor.numel() for tensor in copied)
    LoraManager(model, find_adapters(folders))
    lora = sum(parameter.numel() for parameter in lora_parameters(model))
    rows = {label: (size, text) for label, size, text in adapter_rows(None, folders)}
    itemsize = select_dtype(torch.device("cpu")).itemsize
    assert sum(size for size, _ in rows.values()) == (lora + abstractor) * itemsize
    assert "rank 3" in rows["adapter text"][1]
    assert "visual_abstractor" in rows["adapter vision"][1]
    modules = [f"{name}={folder}" for name, folder in folders.items()]
    result = run_cli(
        "info", tiny_checkpoint, "--lora-modules", modules[0], "--lora-modules", modules[1]
    )
    assert result.exit_code == 0
    assert "adapter text" in result.stdout and "adapter vision" in result.stdout
    assert "rank 3" in run_cli("info", folders["text"]).stdout
    result = run_cli("info", tiny_checkpoint, "--lora-modules", f"bad={tiny_checkpoint}")
    assert (result.exit_code, "bad" in result.stderr) == (2, True)


def test_the_command_for_an_adapter_is_that_of_its_base_model(tiny_checkpoint, tmp_path):
    adapter = make_adapter(tiny_checkpoint, tmp_path / "adapter", 1, parts=["decoder"])
    for base, expected in ((None, "owl2 chat"), ("q-future/one-align", "owl2 rate")):
        assert command_of(str(adapter), base)[0] == expected
        labels, values, _ = size_table(str(adapter), base=base).columns
        assert dict(zip(labels.cells, values.cells, strict=True))["use with"] == expected


def test_tokenizer_of_another_model_is_rejected(run_cli, tiny_checkpoint, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, folder)
    assert run_cli("info", folder).exit_code == 0
    for file in folder.glob("tokenizer*"):
        file.unlink()
    other = FAMILY / "one_align" / "model"
    for file in other.glob("tokenizer*"):
        shutil.copy(file, folder)
    for command in (("info", folder), ("chat", "--model", folder, "hi")):
        result = run_cli(*command)
        assert (result.exit_code, result.stdout) == (2, "")
        assert "320" in result.stderr and "560" in result.stderr
