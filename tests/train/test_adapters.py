"""Runs with LoRA: trainable and frozen parameters, saved adapters, merging."""

import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from owl2.checkpoints.adapters import lora_layers
from owl2.checkpoints.weight_names import released_name
from owl2.engine.engine import Engine
from owl2.errors import ErrorCode
from owl2.processing.processor import Owl2Processor
from owl2.train.adapters import apply_lora, merge, prepare_for_training
from owl2.train.optimizer import parameter_groups
from owl2.train.recipe_sections import LoraSettings
from owl2.train.run import train
from owl2.train.trainable import ModelPart, summarize_trainable
from owl2.train.trainer import Owl2Trainer
from tests.errors import raises_input_error
from tests.tiny import make_model
from tests.train.runs import (
    LORA,
    ask,
    assert_same_weights,
    load_model,
    quiet,
    read_jsonl,
    train_until,
    trainable_names,
    weights,
)
from tests.train.tiny import QUESTION

PARTS = LORA | {"parts": ["decoder"], "modules_to_save": ["abstractor", "vision"]}
ALL = LORA | {"parts": ["decoder", "abstractor", "vision"]}


def names_with_lora(model):
    return {name for name, _ in lora_layers(model)}


# ------------------------------------------------------------------ target modules


def test_default_targets_are_all_linears_of_the_decoder():
    model = make_model()
    apply_lora(model, LoraSettings(), seed=0)
    layer = "model.layers.{}."
    kinds = ["self_attn.q_proj", "self_attn.o_proj"]
    kinds += [f"self_attn.multiway.{way}.{p}_proj" for p in "kv" for way in (0, 1)]
    kinds += [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
    assert names_with_lora(model) == {layer.format(i) + kind for i in range(2) for kind in kinds}


@pytest.mark.parametrize(
    ("settings", "pattern"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, r"model\.layers\.\d\.self_attn\..*(q|v)_proj"),
        (
            {"target_modules": ["k_proj.multiway.1"]},
            r"model\.layers\.\d\.self_attn\.multiway\.1\.k_proj",
        ),
        ({"parts": ["abstractor"]}, r"model\.visual_abstractor\..*(w\d|query|key|value|proj|fc)"),
        (
            {"parts": ["vision"], "target_modules": ["fc1"]},
            r"model\.vision_model\.encoder\.layers\.\d\.mlp\.fc1",
        ),
    ],
)
def test_parts_and_target_modules(settings, pattern):
    model = make_model()
    linears = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    expected = {name for name in linears if re.fullmatch(pattern, name)}
    apply_lora(model, LoraSettings(**settings), seed=0)
    assert names_with_lora(model) == expected
    assert expected


def test_unknown_target_module_is_refused():
    with raises_input_error(
        ErrorCode.UNKNOWN_NAME, "'qkv'", "down_proj, gate_proj, k_proj, o_proj"
    ):
        apply_lora(make_model(), LoraSettings(target_modules=["q_proj", "qkv"]), seed=0)


def test_seed_determines_lora_and_leaves_the_random_state_unchanged():
    torch.manual_seed(5)
    models = [make_model() for _ in range(3)]
    state = torch.get_rng_state()
    for model, seed in zip(models, (1, 1, 2), strict=True):
        apply_lora(model, LoraSettings(), seed)
    assert torch.equal(state, torch.get_rng_state())
    one, same, other = (model.state_dict() for model in models)
    name = "model.layers.0.mlp.up_proj.lora_A.default.weight"
    assert torch.equal(one[name], same[name])
    assert not torch.equal(one[name], other[name])


# ------------------------------------------------------------------ trainable parameters


@pytest.mark.parametrize("adapter", [LORA, PARTS, ALL])
def test_parameter_groups_contain_the_trainable_parameters_only(adapter):
    model = make_model()
    apply_lora(model, LoraSettings(**adapter), seed=0)
    lora = {name for name, _ in model.named_parameters() if ".lora_" in name}
    parts = ("model.visual_abstractor.", "model.vision_model.")
    assert lora <= trainable_names(model)
    for name in trainable_names(model) - lora:
        assert name.startswith(parts) and "modules_to_save" in adapter, name
    groups = parameter_groups(model, learning_rate=1.0, weight_decay=0.1, vision_lr_layer_decay=0.9)
    decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
    assert all(id(model.get_parameter(name)) in decayed for name in lora)


def test_lora_counts_for_the_part_of_its_linear():
    model = make_model()
    sizes = summarize_trainable(model).sizes
    trained = apply_lora(model, LoraSettings(r=1, target_modules=["k_proj"]), seed=0)
    # In each of two layers: 16 inputs, 2 heads with 4 outputs.
    assert trained.trainable_sizes == {
        ModelPart.VISION: 0,
        ModelPart.ABSTRACTOR: 0,
        ModelPart.VISUAL_WEIGHTS: 2 * (16 + 8),
        ModelPart.DECODER: 2 * (16 + 8),
    }
    assert trained.frozen_size == sum(sizes.values())


@pytest.mark.parametrize("freeze", [["vision"], ["abstractor", "visual"], ["decoder"]])
def test_frozen_parts_do_not_change(recipe, freeze):
    settings = recipe(freeze=freeze, max_steps=4)
    result = train(settings, quiet())
    before, after = weights(settings.model), weights(result.model)
    parts = {"vision": ModelPart.VISION, "abstractor": ModelPart.ABSTRACTOR}
    parts |= {"visual": ModelPart.VISUAL_WEIGHTS, "decoder": ModelPart.DECODER}
    frozen = [parts[name] for name in freeze]
    model = make_model()
    trained = prepare_for_training(model, settings)
    for part in ModelPart:
        assert (trained.trainable_sizes[part] == 0) == (part in frozen)
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed and changed <= set(map(released_name, trainable_names(model)))


def test_freezing_everything_is_refused(recipe):
    settings = recipe(freeze=["vision", "abstractor", "visual", "decoder"])
    with raises_input_error(ErrorCode.CONFLICT, "freeze"):
        prepare_for_training(make_model(), settings)


# ------------------------------------------------------------------ runs


@pytest.mark.parametrize("adapter", [LORA, PARTS, ALL], ids=["lora", "parts", "all"])
def test_live_merged_and_reloaded_models_give_the_same_logits(
    recipe, world, tmp_path, monkeypatch, adapter
):
    settings = recipe(lora=adapter, gradient_checkpointing=adapter is ALL, max_steps=5)
    trainers = []
    # The last call of a run has the trained model.
    monkeypatch.setattr(Owl2Trainer, "check_finite", lambda self: trainers.append(self))
    result = train(settings, quiet())
    live = trainers[-1].model.eval()
    reloaded = load_model(result.model)
    merged = load_model(merge(result.model, tmp_path / "merged"))
    base = load_model(world / "start")

    # Frozen tensors are bit-identical to the base, and LoRA is trained.
    frozen = 0
    for name, tensor in live.state_dict().items():
        plain = name.replace(".base_layer", "")
        if plain in base.state_dict() and not live.get_parameter_or_buffer(name).requires_grad:
            assert torch.equal(tensor, base.state_dict()[plain]), name
            frozen += 1
    assert frozen > 10
    assert all(layer.lora_B["default"].weight.any() for _, layer in lora_layers(live))
    if "modules_to_save" in adapter:
        name = "model.visual_abstractor.query_embeds"
        assert not torch.equal(reloaded.state_dict()[name], base.state_dict()[name])

    processor = Owl2Processor.from_pretrained(result.model)
    for question in (ask(QUESTION, world / "1.png"), ask(QUESTION)):
        inputs = processor.apply_chat_template(
            question,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        with torch.no_grad():
            expected = live(**inputs).logits
            assert not torch.allclose(expected, base(**inputs).logits, atol=1e-3)
            for model in (reloaded, merged):
                torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-5, rtol=0)
    assert (tmp_path / "merged" / "tokenizer.model").is_file()
    answers = {
        Engine.from_pretrained(folder).chat(ask(QUESTION, world / "1.png"), max_new_tokens=5)
        for folder in (result.model, tmp_path / "merged")
    }
    assert len(answers) == 1


DROPOUT = {"lora": LORA | {"lora_dropout": 0.3}, "packing": True, "dataloader_num_workers": 2}


# Neither batches nor workers use the random state of dropout. PARTS: the state of the fully trained
# vision encoder is saved.
@pytest.mark.parametrize("settings", [DROPOUT, {"lora": PARTS}], ids=["dropout", "parts"])
def test_interrupted_and_resumed_equals_uninterrupted(recipe, tmp_path, settings):
    settings = settings | {"max_steps": 7}
    uninterrupted = train(recipe(output=str(tmp_path / "uninterrupted"), **settings), quiet())
    stopped = train_until(4, recipe(**settings))
    assert (stopped.finished, stopped.step) == (False, 4)
    resumed = train(recipe(**settings), quiet())
    assert resumed.finished
    assert_same_weights(weights(uninterrupted.model), weights(resumed.model))
    adapter = load_file(resumed.model / "adapter_model.safetensors")
    assert any(tensor.any() for name, tensor in adapter.items() if "lora_B" in name)
    losses = [read_jsonl(run.output / "log.jsonl")[-1]["loss"] for run in (uninterrupted, resumed)]
    assert losses[0] == losses[1]


def test_run_with_a_changed_base_model_is_not_resumed(recipe, world, tmp_path):
    start = tmp_path / "start"
    shutil.copytree(world / "start", start)
    settings = recipe(model=str(start), lora=LORA)
    train_until(4, settings)
    model = load_model(start)
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-3
    model.save_pretrained(start)
    with raises_input_error(ErrorCode.BASE_MODEL_MISMATCH):
        train(settings, quiet())


@pytest.fixture(scope="module")
def lora_model(recipe_in, tmp_path_factory):
    """A model directory with a trained adapter; read-only."""
    return train(recipe_in(tmp_path_factory.mktemp("lora"), lora=LORA, max_steps=3), quiet()).model


def test_run_does_not_start_from_an_adapter(recipe, lora_model, tmp_path):
    with raises_input_error(ErrorCode.UNSUPPORTED, "owl2 merge"):
        train(recipe(model=str(lora_model)), quiet())
    merged = merge(lora_model, tmp_path / "merged")
    assert train(recipe(model=str(merged), max_steps=3), quiet()).finished


def test_merge_command(lora_model, world, tmp_path, run_cli):
    arguments = ("merge", lora_model, "--output", tmp_path / "merged")
    merged = run_cli(*arguments)
    assert merged.exit_code == 0 and str(tmp_path / "merged") in merged.stdout
    answers = []
    for model in (lora_model, tmp_path / "merged"):
        image = ["--image", world / "1.png", "--max-new-tokens", 5]
        answers.append(run_cli("chat", "--model", model, *image, QUESTION).stdout)
    assert answers[0] == answers[1] != ""
    again = run_cli(*arguments)
    assert again.exit_code == 2 and str(tmp_path / "merged") in again.stderr


def test_invalid_merge_is_refused(world, tmp_path):
    with raises_input_error(ErrorCode.FILE_NOT_FOUND, "adapter_config.json"):
        merge(world / "start", tmp_path / "merged")
    with raises_input_error(ErrorCode.FILE_EXISTS, tmp_path):
        merge(world / "start", tmp_path)
    with raises_input_error(ErrorCode.UNKNOWN_NAME, "int8"):
        merge(world / "start", tmp_path / "merged", dtype="int8")
    assert not (tmp_path / "merged").exists()


def test_merge_to_another_dtype(lora_model, tmp_path):
    merge(lora_model, tmp_path / "merged", dtype="bfloat16")
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
