"""Pipelines and Auto classes of transformers on a checkpoint with a processor."""

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    pipeline,
)

from tests.peers.subjects import checkpoint

IMAGE = Image.new("RGB", (20, 10), "red")
MESSAGES = [
    {
        "role": "user",
        "content": [{"type": "image", "image": IMAGE}, {"type": "text", "text": "What is this?"}],
    }
]


class PipelineSuite:
    subject: str

    @pytest.fixture
    def model(self):
        return checkpoint(self.subject)

    @pytest.fixture(autouse=True)
    def without_torchvision(self, monkeypatch):
        """Only its videos need torchvision, which is not available for every build of torch."""
        monkeypatch.setattr("transformers.pipelines.any_to_any.requires_backends", lambda *_: None)

    @pytest.mark.parametrize("task", ["image-text-to-text", "any-to-any"])
    @pytest.mark.parametrize(
        "options",
        [{}, {"device_map": "cpu"}, {"model_kwargs": {"attn_implementation": "eager"}}],
        ids=["default", "device_map", "model_kwargs"],
    )
    def test_pipeline(self, model, task, options):
        pipe = pipeline(task, model=model, **options)
        answer = pipe(text=MESSAGES, max_new_tokens=3, return_full_text=False)
        assert isinstance(answer[0]["generated_text"], str)

    @pytest.mark.parametrize("task", ["image-text-to-text", "any-to-any"])
    def test_pipeline_with_images_and_a_prompt(self, model, task):
        pipe = pipeline(task, model=model)
        prompt = f"{pipe.processor.image_token} What is this?"
        answers = pipe(images=[IMAGE, IMAGE], text=[prompt, prompt], max_new_tokens=3)
        assert len(answers) == 2

    def test_text_pipeline(self, model):
        answer = pipeline("text-generation", model=model)("what is", max_new_tokens=3)
        assert answer[0]["generated_text"].startswith("what is")

    def test_feature_extraction_pipeline(self, model):
        features = pipeline("feature-extraction", model=model)("what is this")
        assert len(features[0][0]) == 32

    @pytest.mark.parametrize(
        "auto_class",
        [AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM],
    )
    def test_auto_class(self, model, auto_class):
        loaded = auto_class.from_pretrained(model, dtype=torch.bfloat16)
        inputs = AutoProcessor.from_pretrained(model).apply_chat_template(
            MESSAGES, tokenize=True, return_dict=True, return_tensors="pt"
        )
        outputs = loaded(**inputs.to(torch.bfloat16))
        assert outputs[0].dtype == torch.bfloat16


class TestOwl2Pipelines(PipelineSuite):
    subject = "owl2"


class TestOwl2_1Pipelines(PipelineSuite):
    subject = "owl2_1"


class TestDocOwlPipelines(PipelineSuite):
    subject = "docowl"


class TestDocOwl2Pipelines(PipelineSuite):
    subject = "docowl2"


class TestLlavaPipelines(PipelineSuite):
    subject = "llava"
