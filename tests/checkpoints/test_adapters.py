"""Adapters on disk: what is saved is what is loaded, merged, and read by peft itself."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from owl2.checkpoints.adapters import find_adapter, lora_layers, lora_parameters, merge_adapter
from owl2.checkpoints.config_file import read_config
from owl2.checkpoints.weight_names import released_name
from owl2.errors import ErrorCode
from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.train.adapters import apply_lora
from owl2.train.recipe_sections import LoraSettings
from tests.checkpoints.conftest import load, make_adapted, make_base
from tests.errors import raises_input_error
from tests.tiny import PARTIAL_MAM

EVERYWHERE = ["decoder", "abstractor", "vision"]
CASES = {
    "default": ({}, {}),
    "everywhere": ({"parts": EVERYWHERE}, {}),
    "trained parts": ({"modules_to_save": ["abstractor", "vision"]}, {}),
    "no mam": (
        {"parts": ["decoder", "vision"], "modules_to_save": ["abstractor"]},
        {"use_mam": False},
    ),
    "partial mam": ({"target_modules": ["k_proj", "v_proj"]}, PARTIAL_MAM[2]),
    "tied": ({}, {"tie_word_embeddings": True}),
    "mPLUG-Owl2.1": ({"parts": EVERYWHERE}, {"member": "mplug_owl2_1"}),
    "DocOwl1.5": ({"modules_to_save": ["abstractor"]}, {"member": "mplug_docowl"}),
    "DocOwl2": (
        {"parts": ["decoder"], "modules_to_save": ["abstractor"]},
        {"member": "mplug_docowl2"},
    ),
    "all heads": ({"target_modules": ["k_proj", "v_proj"]}, {"num_key_value_heads": 4}),
}
IMAGES = {
    "input_ids": torch.tensor([[1, 5, 40, 40, 40, 6, 7, 40, 40, 40, 9, 11]]),
    "pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)),
}
PAGES = {  # the same ids with two pages for a DocOwl2
    "pixel_values": torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(2)),
    "image_grids": torch.tensor([[1, 1], [2, 1]]),
}
TEXT = {"input_ids": torch.tensor([[1, 5, 6, 7, 9, 11, 30]])}


def logits(model, inputs=IMAGES):
    if model.config.visual_config.has_image_grids and "pixel_values" in inputs:
        inputs = inputs | PAGES
    with torch.no_grad():
        return model.eval()(**inputs).logits


def assert_close(one, other):
    """Both kinds of input; float32, within 1e-5."""
    for inputs in (IMAGES, TEXT):
        torch.testing.assert_close(logits(one, inputs), logits(other, inputs), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("adapter", "settings"), CASES.values(), ids=CASES)
def test_live_reloaded_and_merged_agree(tmp_path, adapter, settings):
    base = make_base(tmp_path / "base", **settings)
    live = make_adapted(base, **adapter)
    assert not torch.allclose(logits(live), logits(load(base)), atol=0.01)
    live.save_pretrained(tmp_path / "adapter")

    reloaded = load(tmp_path / "adapter")
    assert type(reloaded) is Owl2ForConditionalGeneration
    for name, tensor in live.state_dict().items():
        assert torch.equal(tensor, reloaded.state_dict()[name]), name
    assert_close(live, reloaded)

    merge_adapter(reloaded, find_adapter(tmp_path / "adapter", {}))
    assert not lora_parameters(reloaded)
    assert_close(live, reloaded)
    reloaded.save_pretrained(tmp_path / "merged")
    plain = load(tmp_path / "merged")
    assert plain.state_dict().keys() == load(base).state_dict().keys()
    assert_close(live, plain)


def test_files_are_small_and_peft_reads_them(saved, base):
    live, folder = saved
    assert {path.name for path in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "base.json",
        "config.json",
    }
    stored = load_file(folder / "adapter_model.safetensors")
    # LoRA of the decoder and the ViT, and the complete abstractor, and nothing else.
    assert all(
        ".lora_" in key or key.startswith("base_model.model.model.visual_abstractor.")
        for key in stored
    )
    for peft_model in (
        PeftModel.from_pretrained(load(base), str(folder)),
        PeftModel.from_pretrained(load(base), str(folder), is_trainable=True),
    ):
        assert_close(live, peft_model)


@pytest.mark.parametrize("targets", [None, released_name(r".*\.(multiway\.1\.v_proj|q_proj)")])
def test_transformers_loads_the_adapter(base, tmp_path, targets):
    """With the names of modules, or with released names."""
    kinds = {"target_modules": targets and ["q_proj", "multiway.1.v_proj"]}
    live = make_adapted(base, parts=["decoder"] if targets else EVERYWHERE, **kinds)
    live.save_pretrained(tmp_path)
    if targets:
        file = tmp_path / "adapter_config.json"
        config = json.loads(file.read_text(encoding="utf-8")) | {"target_modules": targets}
        file.write_text(json.dumps(config), encoding="utf-8")
    model = load(base)
    model.load_adapter(str(tmp_path))
    assert_close(live, model)


def test_adapter_with_released_module_names(saved, base, tmp_path):
    """The authors' code and earlier versions of owl2 write them, as a list or a regex."""
    live, folder = saved
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    for number, targets in enumerate(
        [
            "|".join(t for t in config["target_modules"].split("|") if "attn\\.multiway" not in t),
            sorted({released_name(name) for name, _ in lora_layers(live)}),
        ]
    ):
        old = Path(shutil.copytree(folder, tmp_path / str(number)))
        (old / "adapter_config.json").write_text(
            json.dumps(config | {"target_modules": targets}), encoding="utf-8"
        )
        assert "multiway" in str(targets)
        assert_close(live, load(old))
        with pytest.raises(RuntimeError, match="load the adapter with"):
            PeftModel.from_pretrained(load(base), str(old))
        config_of_old = find_adapter(old, {}).config  # docs/ecosystem.md
        found = PeftModel.from_pretrained(load(base), str(old), config=config_of_old)
        assert_close(live, found)
        load(old).save_pretrained(tmp_path / "new")
        assert_close(live, PeftModel.from_pretrained(load(base), str(tmp_path / "new")))


def test_lora_without_a_module_is_rejected(base, tmp_path):
    """transformers' and PEFT's loaders, with targets that do not contain all weights."""
    live = make_adapted(base, parts=["decoder"], target_modules=["q_proj", "multiway.1.v_proj"])
    live.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(config | {"target_modules": ["q_proj"]}), encoding="utf-8")
    with raises_input_error(ErrorCode.UNEXPECTED_WEIGHTS, "v_proj.multiway.1.lora_A"):
        load(base).load_adapter(str(tmp_path))
    with pytest.raises(RuntimeError, match="v_proj"):
        PeftModel.from_pretrained(load(base), str(tmp_path))


@pytest.mark.parametrize(
    "targets",
    [
        ["k_proj.multiway.0", "k_proj.multiway.1"],
        r".*k_proj\.multiway\.[01]",
        r".*\.(k_proj)\.multiway\.\d",
    ],
)
def test_patterns_with_released_module_names(base, tmp_path, targets):
    """Targets, ranks, and scales of an adapter that was written by an earlier version."""
    live = load(base)
    live.add_adapter(
        LoraConfig(
            r=2,
            lora_alpha=4,
            target_modules=["k_proj"],
            rank_pattern={"multiway.1.k_proj": 3},
            alpha_pattern={"multiway.1.k_proj": 64},
            init_lora_weights=False,
        )
    )
    live.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    patterns = {
        "target_modules": targets,
        "rank_pattern": {"k_proj.multiway.1": 3},
        "alpha_pattern": {"k_proj.multiway.1": 64},
    }
    file.write_text(json.dumps(json.loads(file.read_text()) | patterns))
    assert_close(live, load(tmp_path))


def test_auto_classes_load_the_adapter(saved):
    live, folder = saved
    options = {"attn_implementation": "eager"}
    model = AutoModelForImageTextToText.from_pretrained(folder, **options)
    assert type(model) is Owl2ForConditionalGeneration
    assert model.config._attn_implementation == "eager"
    assert_close(live, model)


def test_loaded_adapter_is_frozen(saved):
    model = load(saved[1])
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training


def test_saving_again_gives_the_same_files(saved, tmp_path):
    live, folder = saved
    load(folder).save_pretrained(tmp_path / "again")
    for file in folder.iterdir():
        if file.suffix == ".json":
            again = json.loads((tmp_path / "again" / file.name).read_text(encoding="utf-8"))
            assert again == json.loads(file.read_text(encoding="utf-8")), file.name
    assert_close(live, load(tmp_path / "again"))


@pytest.mark.parametrize("trained", [[], ["vision"]])
def test_image_size_is_saved(base, tmp_path, trained):
    live = load(base, image_size=16)
    apply_lora(live, LoraSettings(r=2, modules_to_save=trained), seed=0)
    with torch.no_grad():
        for parameter in live.parameters():
            if parameter.requires_grad:
                parameter += 0.05
    live.save_pretrained(tmp_path)
    inputs = IMAGES | {"pixel_values": torch.randn(2, 3, 16, 16)}
    for model in (load(tmp_path), AutoModelForImageTextToText.from_pretrained(tmp_path)):
        assert model.config.image_size == 16
        torch.testing.assert_close(logits(live, inputs), logits(model, inputs))
    assert load(tmp_path, image_size=8).config.image_size == 8
    config = read_config(tmp_path)
    assert load(tmp_path, config=config).config.image_size == 16
    assert config.image_size == 16


def test_text_does_not_use_the_visual_lora(base):
    """Without an image only LoRA of the text weights runs; visual tokens use their own LoRA."""
    model = make_adapted(base, target_modules=["k_proj", "v_proj"])
    before = logits(model), logits(model, TEXT)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "multiway.1." in name and "lora_B" in name:
                parameter += 1.0
    assert torch.equal(before[1], logits(model, TEXT))
    assert not torch.allclose(before[0], logits(model), atol=1e-3)


def test_adapter_loads_from_another_directory(tmp_path, monkeypatch):
    """A base with a relative path is found from every directory; a moved base raises."""
    make_base(tmp_path / "one" / "base")
    monkeypatch.chdir(tmp_path / "one")
    live = make_adapted("base")
    live.save_pretrained(tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    assert_close(live, load("adapter"))

    (tmp_path / "one" / "base").rename(tmp_path / "moved")
    with raises_input_error(ErrorCode.FILE_NOT_FOUND, "one/base"):
        load("adapter")
    assert_close(live, load("adapter", base="moved"))
    with raises_input_error(ErrorCode.CONFLICT, "moved"):
        load("moved", base="moved")


def put_into_hub_cache(cache, repository, revision, folder):
    """Write files as huggingface_hub caches them."""
    home = cache / f"models--{repository.replace('/', '--')}"
    shutil.copytree(folder, home / "snapshots" / revision)
    (home / "refs").mkdir(exist_ok=True)
    (home / "refs" / "main").write_text(revision, encoding="utf-8")


def test_adapter_loads_from_the_hub(base, tmp_path):
    """The adapter stores the base's revision, and a later revision is not used."""
    cache, first, later = tmp_path / "cache", "1" * 40, "2" * 40
    put_into_hub_cache(cache, "owner/base", first, base)
    live = load("owner/base", cache_dir=cache)
    apply_lora(live, LoraSettings(r=2), seed=0)
    live.save_pretrained(tmp_path / "adapter")
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert written["base_model_name_or_path"] == "owner/base"
    assert written["revision"] == first

    put_into_hub_cache(cache, "owner/base", later, make_base(tmp_path / "later", seed=1))
    put_into_hub_cache(cache, "owner/adapter", "3" * 40, tmp_path / "adapter")
    assert_close(live, load("owner/adapter", cache_dir=cache))
    auto = AutoModelForImageTextToText.from_pretrained("owner/adapter", cache_dir=cache)
    assert_close(live, auto)


def test_changed_base_weights_are_rejected(tmp_path):
    base = make_base(tmp_path / "base")
    make_adapted(base).save_pretrained(tmp_path / "adapter")
    # The same weights in another format are the same base.
    model = load(base)
    shutil.rmtree(base)
    base.mkdir()
    torch.save(model.state_dict(), base / "pytorch_model.bin")
    model.config.save_pretrained(base)
    load(tmp_path / "adapter")

    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 3] += 1e-3
    torch.save(model.state_dict(), base / "pytorch_model.bin")
    with raises_input_error(ErrorCode.BASE_MODEL_MISMATCH, "base.json"):
        load(tmp_path / "adapter")
    (tmp_path / "adapter" / "base.json").unlink()
    load(tmp_path / "adapter")


def test_merging_rounds_once(base, tmp_path):
    """With a 16-bit base the sum is computed in float32 and rounded; LoRA is not rounded."""
    load(base, dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    live = make_adapted(tmp_path / "base")
    assert live.dtype == torch.bfloat16
    live.save_pretrained(tmp_path / "adapter")
    model = load(tmp_path / "adapter", dtype="auto")
    name, layer = next(lora_layers(live))
    expected = layer.get_base_layer().weight.float() + layer.get_delta_weight("default")
    merge_adapter(model, find_adapter(tmp_path / "adapter", {}))
    merged = model.get_submodule(name).weight
    assert torch.equal(merged, expected.bfloat16())
