"""`owl2 info`: the parts of a model, without its weights."""

import json
import sys

import pytest
import torch

from owl2 import cli
from owl2.errors import InputError
from owl2.model.configuration import Owl2Config
from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.model.parameter_counts import describe, parameter_counts
from tests.tiny import make_config, make_model

# Written out from SPEC §1: width 4096, MLP 11008, 32 layers; ViT 1024, MLP 4096, 24 layers.
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


def test_the_released_model_has_8_197_859_328_parameters():
    counts = parameter_counts(Owl2Config())
    assert counts == RELEASED
    assert sum(counts.values()) == 8_197_859_328


def test_the_full_model_is_made_on_the_meta_device():
    with torch.device("meta"):
        model = Owl2ForConditionalGeneration(Owl2Config())
    assert model.num_parameters() == 8_197_859_328
    assert all(parameter.device.type == "meta" for parameter in model.parameters())


@pytest.mark.parametrize("settings", [{}, {"use_mam": False}, {"tie_word_embeddings": True}])
def test_the_parts_of_a_small_model(settings):
    model = make_model(**settings)
    counts = parameter_counts(make_config(**settings))
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())
    assert ("decoder, visual weights (MAM)" in counts) == settings.get("use_mam", True)
    words = 40 * 16
    assert counts["embeddings and head"] == (1 if "tie_word_embeddings" in settings else 2) * words


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(sys, "argv", ["owl2", "info", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    shown = capsys.readouterr()
    return end.value.code, shown.out, shown.err


def test_the_command_shows_the_released_sizes(monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys)
    assert code == 0
    for count in RELEASED.values():
        assert f"{count:,}" in out
    assert "8,197,859,328" in out and "16.40 GB" in out
    assert "24 layers, width 1024, 448 px, patch 14" in out
    assert "6 layers, width 1024, 65 embeddings an image" in out


def test_the_command_shows_a_checkpoint(monkeypatch, capsys, tmp_path):
    make_model(use_mam=False, tie_word_embeddings=True).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()  # the configuration is enough
    code, out, _ = run(monkeypatch, capsys, tmp_path)
    assert code == 0
    assert "4 heads (2 for keys and values)" in out and "vocabulary 40, tied" in out
    assert "MAM" not in out
    assert " MB in 16 bits" in out and " 0.00" not in out


@pytest.mark.parametrize("content", [None, "{broken", "{}", '{"model_type": "clip"}'])
def test_what_is_no_model_of_ours_is_refused(monkeypatch, capsys, tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content, encoding="utf-8")
    code, out, err = run(monkeypatch, capsys, tmp_path)
    assert (code, out) == (2, "")
    assert str(tmp_path) in err and "Traceback" not in err


def test_a_configuration_that_does_not_fit_is_refused(tmp_path):
    values = json.loads(json.dumps(make_config().to_dict()))
    values["visual_config"]["visual_model"]["image_size"] = 9
    (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(InputError, match="image_size"):
        describe(str(tmp_path))
