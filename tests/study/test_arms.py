"""The models of the arms equal the common model before training."""

from pathlib import Path

import pytest
import torch
import yaml
from arms import make_arm, make_start, widen_mlps
from cells import Runner
from rich.console import Console
from study import ModelChanges, Start, read_study
from transformers import LlamaConfig, LlamaForCausalLM

from owl2 import Owl2Config, Owl2ForConditionalGeneration
from owl2.cli.info import parameter_counts
from owl2.errors import ErrorCode
from owl2.processing.tokenizer import train_tokenizer
from owl2.train.trainable import apply_stage
from tests.errors import raises_input_error
from tests.model.conftest import make_modalities_differ
from tests.study.conftest import RECIPES
from tests.tiny import CLIP_TOWER, make_model

ALL = ["input_layernorm", "post_attention_layernorm", "k_proj", "v_proj"]
# SmolLM2-135M with the vision encoder and the abstractor of the study.
SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def common(tiny_checkpoint, tmp_path_factory):
    """A model without MAM, as after the shared stages."""
    folder = tmp_path_factory.mktemp("common")
    make_arm(tiny_checkpoint, ModelChanges(mam_modules=[]), folder / "model", 0)
    return folder / "model"


def inputs(model):
    image = model.config.image_token_id
    pixels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return {"input_ids": torch.tensor([[1, 5, *[image] * 3, 9, 11]]), "pixel_values": pixels}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mam_modules": ALL},
        {"mam_modules": ["k_proj", "v_proj"]},
        {"intermediate_size": 40},
        {"mam_modules": ["input_layernorm"], "intermediate_size": 32},
    ],
    ids=str,
)
def test_an_arm_starts_with_the_results_of_the_common_model(changes, common, tmp_path):
    make_arm(common, ModelChanges(**changes), tmp_path / "arm", seed=3)
    base, arm = (
        Owl2ForConditionalGeneration.from_pretrained(path) for path in (common, tmp_path / "arm")
    )
    assert arm.config.separate_modules == tuple(changes.get("mam_modules", ()))
    width = changes.get("intermediate_size", base.config.intermediate_size)
    assert arm.config.intermediate_size == width
    added = 2 * 3 * 16 * (width - base.config.intermediate_size)  # two layers
    visual = sum(p.numel() for n, p in arm.named_parameters() if ".multiway.1." in n)
    assert arm.num_parameters() == base.num_parameters() + added + visual
    with torch.no_grad():
        found, expected = (model(**inputs(base)).logits for model in (arm, base))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_all_new_units_are_trained():
    """Two steps: the columns of `down_proj` first, because they start as zeros."""
    model = make_model()
    make_modalities_differ(model)
    widen_mlps(model, 32, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mlp = model.model.layers[0].mlp
    before = [mlp.gate_proj.weight[24:].clone(), mlp.up_proj.weight[24:].clone()]
    for _ in range(2):
        optimizer.zero_grad()
        model(**inputs(model), labels=inputs(model)["input_ids"]).loss.backward()
        optimizer.step()
    assert mlp.down_proj.weight[:, 24:].count_nonzero() == mlp.down_proj.weight[:, 24:].numel()
    for old, linear in zip(before, (mlp.gate_proj, mlp.up_proj), strict=True):
        assert (linear.weight[24:] != old).all()


def test_new_units_depend_on_the_seed_only():
    models = [make_model() for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        widen_mlps(model, 40, seed)
    rows = [model.model.layers[1].mlp.up_proj.weight[24:] for model in models]
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])


@pytest.mark.parametrize(
    ("settings", "width", "code"),
    [
        ({}, 8, ErrorCode.INVALID_VALUE),
        ({"mlp_bias": True}, 40, ErrorCode.UNSUPPORTED),
    ],
)
def test_mlps_that_cannot_be_widened(settings, width, code):
    with raises_input_error(code):
        widen_mlps(make_model(**settings), width, 0)


@pytest.mark.parametrize(
    ("file", "sizes"), [("study.yaml", SMOLLM2), ("study_7b.yaml", {})], ids=["135m", "7b"]
)
def test_the_wider_model_has_as_many_parameters_as_full_mam(file, sizes):
    study = read_study(RECIPES / file)
    counts = {}
    for arm in ("none", "full", "wide"):
        changes = study.arms[arm].model
        options = {"use_mam": bool(changes.mam_modules), "mam_modules": changes.mam_modules}
        if changes.intermediate_size is not None:
            options["intermediate_size"] = changes.intermediate_size
        counts[arm] = sum(parameter_counts(Owl2Config(**sizes | options)).values())
    added = {arm: counts[arm] - counts["none"] for arm in ("full", "wide")}
    assert added["wide"] == pytest.approx(added["full"], rel=0.006)
    assert added["wide"] <= added["full"]


def test_layers_of_a_shorter_language_model(tmp_path):
    """The first and the last are kept, so that 3 of 5 are 0, 2 and 4."""
    llm = tmp_path / "llm"
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=400, num_hidden_layers=5, **sizes))
    model.save_pretrained(llm)
    texts = ["a red circle is a shape", "yes no blue green"] * 20
    train_tokenizer(texts, llm / "tokenizer.model", 300)
    (tmp_path / "sizes.yaml").write_text(yaml.safe_dump({"vision": CLIP_TOWER}))
    start = Start(
        llm=str(llm), vision="fresh", config=str(tmp_path / "sizes.yaml"), layers=3,
        settings={"abstractor": {"num_learnable_queries": 3}},
    )  # fmt: skip
    make_start(start, tmp_path / "model")
    found = Owl2ForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert found.config.num_hidden_layers == len(found.model.layers) == 3
    assert found.config.num_image_tokens == 4 and found.config.separate_modules == ()
    for layer, index in zip(found.model.layers, (0, 2, 4), strict=True):
        expected = model.model.layers[index].mlp.up_proj.weight
        assert torch.equal(layer.mlp.up_proj.weight, expected)
    with raises_input_error(ErrorCode.INVALID_VALUE, "layers", "6"):
        make_start(start.model_copy(update={"layers": 6}), tmp_path / "other")


def test_every_study_of_the_repository_is_valid():
    files = [
        file
        for file in RECIPES.parent.rglob("*.yaml")
        if "results" in yaml.safe_load(file.read_text())
    ]
    assert len(files) >= 5
    for file in files:
        study = read_study(file)
        cells = list(study.cells())
        assert len(cells) == len(set(cells)) == sum(map(study.seeds_of, study.arms))
        runner = Runner(study.model_copy(update={"measures": None}), Console(quiet=True))
        for arm, settings in study.arms.items():
            start = study.start_of(arm)
            assert start.config is None or Path(start.config).exists()
            for stage in study.shared:
                runner.recipe(stage, settings.shared, Path("model"), Path("output"))
            recipes = [recipe for seed in (0, 1) for recipe in runner.cell_recipes(arm, seed)]
            assert [recipe.seed for recipe in recipes] == [0] * len(study.stages) + [1] * len(
                study.stages
            )
            assert (recipes[-1].lora is not None) == (arm == "lora")


def test_text_passes_only_through_frozen_weights():
    """In the arm `full_frozen_text`, no weight that text uses is trained."""
    study = read_study(RECIPES / "study.yaml").model_copy(update={"measures": None})
    [recipe] = Runner(study, Console(quiet=True)).cell_recipes("full_frozen_text", 0)
    model = make_model(mam_modules=study.arms["full_frozen_text"].model.mam_modules)
    apply_stage(model, recipe.stage, recipe.freeze)
    ids = torch.tensor([[1, 5, 9, 11]])
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        for weight in trained:
            weight.fill_(torch.nan)
        assert torch.equal(model(input_ids=ids).logits, before)
        assert model(**inputs(model)).logits.isnan().any()
