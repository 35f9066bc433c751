"""A sibling model type needs one registry entry and the parts that are new."""

from dataclasses import replace

import pytest
import torch

from owl2.checkpoints.config_file import read_config
from owl2.errors import ErrorCode
from owl2.model.abstractor import VisualAbstractor
from owl2.model.configuration import Owl2Config
from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.model.registry import DEFAULT_MODEL_TYPE, MODEL_TYPES, get_model_type
from tests.errors import raises_input_error
from tests.tiny import make_config


class SiblingConfig(Owl2Config):
    model_type = "mplug_sibling"


class SiblingConnector(VisualAbstractor):
    """A connector whose embeddings have twice the size."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(features)


@pytest.fixture
def sibling(monkeypatch):
    module = "tests.model.test_registry"
    parts = replace(
        MODEL_TYPES[DEFAULT_MODEL_TYPE],
        config=f"{module}:SiblingConfig",
        connector=f"{module}:SiblingConnector",
    )
    monkeypatch.setitem(MODEL_TYPES, "mplug_sibling", parts)


def test_registered_sibling_is_created_saved_and_loaded(sibling, tmp_path):
    config = SiblingConfig(**make_config().to_dict() | {"model_type": "mplug_sibling"})
    model = Owl2ForConditionalGeneration(config)
    assert type(model.model.visual_abstractor).__name__ == "SiblingConnector"
    model.save_pretrained(tmp_path)
    assert type(read_config(tmp_path)).__name__ == "SiblingConfig"
    loaded = Owl2ForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config.model_type == "mplug_sibling"
    pixels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model.eval().get_image_features(pixels).pooler_output
        assert torch.equal(loaded.get_image_features(pixels).pooler_output, expected)


def test_unknown_model_type_is_rejected():
    with raises_input_error(ErrorCode.UNSUPPORTED, "mplug_unknown"):
        get_model_type("mplug_unknown")


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("mplug-owl", "mPLUG-Owl (1)"),
        ("mplugowl3", "mPLUG-Owl3"),
        ("llava_llama", "LLaVA"),
        ("llava", "Llava"),  # as transformers writes it
        ("qwen2_vl", "Qwen2VL"),
        ("internvl_chat", "InternVL"),
    ],
)
def test_other_architectures_are_named_with_the_nearest_model(name, title):
    with raises_input_error(ErrorCode.UNSUPPORTED, "MAGAer13/mplug-owl2-llama2-7b", f" {title} "):
        get_model_type(name)


@pytest.mark.parametrize("part", ["config", "decoder_layer", "vision_encoder", "connector"])
def test_parts_can_be_imported(part):
    assert callable(MODEL_TYPES[DEFAULT_MODEL_TYPE].load(part))
