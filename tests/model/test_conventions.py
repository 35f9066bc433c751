"""Names and signatures that transformers' models share. `make test-peers` runs its own tests."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
)

from owl2.errors import ErrorCode
from owl2.model.modeling import Owl2ForConditionalGeneration, Owl2Model
from tests.errors import raises_input_error
from tests.tiny import make_model

IMAGE = 40  # make_model's image token
IDS = torch.tensor([[IMAGE] * 3 + [1, 2, 3]])
PIXELS = torch.linspace(-1, 1, 3 * 8 * 8).view(1, 3, 8, 8)


@pytest.fixture(scope="module")
def model():
    return make_model().eval()


def assert_same_weights(one, other):
    assert one.state_dict().keys() == other.state_dict().keys()
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in one.state_dict().items())


@pytest.mark.parametrize(
    "auto_class",
    [AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM],
)
@pytest.mark.parametrize("saved", ["base", "head"])
def test_base_and_head_checkpoints_load_into_each_other(model, tmp_path, auto_class, saved):
    (model.model if saved == "base" else model).save_pretrained(tmp_path)
    loaded = auto_class.from_pretrained(pretrained_model_name_or_path=tmp_path)
    is_base = auto_class is AutoModel
    assert type(loaded) is (Owl2Model if is_base else Owl2ForConditionalGeneration)
    assert_same_weights(loaded if is_base else loaded.model, model.model)


def test_state_dict_without_a_checkpoint(model):
    weights = model.state_dict()
    load = Owl2ForConditionalGeneration.from_pretrained
    assert_same_weights(load(None, config=model.config, state_dict=weights), model)
    del weights["lm_head.weight"]
    with raises_input_error(ErrorCode.MISSING_WEIGHTS, "lm_head.weight"):
        load(None, config=model.config, state_dict=weights)
    _, info = load(None, config=model.config, state_dict=weights, output_loading_info=True)
    assert info["missing_keys"] == {"lm_head.weight"}


def test_hidden_states_and_attentions_of_both_parts():
    model = make_model(vision={"num_hidden_layers": 3}).eval()
    model.set_attn_implementation("eager")
    options = {"output_hidden_states": True, "output_attentions": True}
    features = model.get_image_features(PIXELS, **options)
    assert len(features.hidden_states) == 4
    assert [weights.shape for weights in features.attentions] == [(1, 2, 5, 5)] * 3
    outputs = model(IDS, PIXELS, **options)
    assert len(outputs.hidden_states) == 3
    assert [weights.shape for weights in outputs.attentions] == [(1, 4, 6, 6)] * 2
    assert model.get_image_features(PIXELS).hidden_states is None


@pytest.mark.parametrize(
    ("requested", "decoder", "vision"),
    [("eager", "eager", "eager"), ({"visual_config": "eager"}, "sdpa", "eager")],
)
def test_attention_implementation_of_each_part(tmp_path, requested, decoder, vision):
    model = make_model()
    model.save_pretrained(tmp_path)
    model.set_attn_implementation(requested)
    loaded = Owl2ForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=requested)
    for config in (model.config, loaded.config):
        assert config._attn_implementation == decoder
        for part in (config.vision_config, config.visual_config.visual_abstractor):
            assert part._attn_implementation == vision


def test_shifted_labels(model):
    labels = torch.tensor([[-100, -100, -100, 1, -100, 3]])
    shifted = torch.tensor([[-100, -100, 1, -100, 3, -100]])
    expected = model(IDS, PIXELS, labels=labels).loss
    for return_logits in (True, False):
        options = {"shift_labels": shifted, "return_logits": return_logits}
        torch.testing.assert_close(model(IDS, PIXELS, **options).loss, expected)


def test_placeholder_mask(model):
    embeds = model.model.embed(IDS, model.get_image_features(PIXELS).pooler_output)
    features = model.get_image_features(PIXELS).pooler_output
    mask = model.model.get_placeholder_mask(IDS, embeds, features)
    assert mask[..., 0].tolist() == [[True] * 3 + [False] * 3]
    with raises_input_error(ErrorCode.IMAGE_COUNT_MISMATCH, "2 images"):
        model.model.get_placeholder_mask(IDS, embeds, features.repeat(2, 1, 1))


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_generate_from_embeddings_and_pixels(model, options):
    ids, pixels = IDS.repeat(2, 1), torch.cat([PIXELS, -PIXELS])
    options = {"max_new_tokens": 4, "do_sample": False, "pixel_values": pixels} | options
    expected = model.generate(ids, **options)[:, ids.shape[1] :]
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=embeds, **options), expected)


def test_uploaded_checkpoint_loads_with_remote_code(model, tmp_path, monkeypatch):
    class Hub:
        def create_repo(self, repo_id, **_):
            return SimpleNamespace(repo_id=repo_id)

        def create_commit(self, operations, **_):
            for operation in operations:
                shutil.copy(operation.path_or_fileobj, tmp_path / operation.path_in_repo)

    monkeypatch.setattr("transformers.utils.hub.hf_api", Hub)
    monkeypatch.setattr(
        "transformers.utils.hub.create_and_tag_model_card", lambda *_, **__: ModelCard("")
    )
    model.push_to_hub("someone/model")
    config = json.loads((tmp_path / "config.json").read_text())
    module, name = config["auto_map"]["AutoConfig"].split(".")
    assert name in (tmp_path / f"{module}.py").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(loaded) is Owl2ForConditionalGeneration
    loaded.save_pretrained(tmp_path / "saved")
    assert "auto_map" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    assert AutoConfig.from_pretrained(tmp_path, trust_remote_code=False).image_token_id == IMAGE
