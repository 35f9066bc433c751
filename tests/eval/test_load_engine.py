"""The options of the ablations change the model, and never the checkpoint."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from owl2.engine import load_model
from owl2.engine.load_model import ModelArgs
from owl2.errors import ErrorCode, InputError
from owl2.eval import evaluate
from owl2.eval.evaluate import EvalConfig, load_engine
from owl2.model.variants import VISUAL_KEY
from owl2.workers import WorkerRank
from tests.errors import raises_input_error


def inputs(engine):
    image = Image.new("RGB", (30, 20), "red")
    content = [{"type": "image", "image": image}, {"type": "text", "text": "what is this?"}]
    return engine.processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def logits(engine, **changed):
    with torch.no_grad():
        return engine.model(**{**inputs(engine), **changed}).logits


def load(checkpoint, image_policy=None, **changes):
    args = ModelArgs(str(checkpoint), "cpu", "float32", image_policy)
    return load_engine(EvalConfig(args, Path("unused"), **changes), WorkerRank())


@pytest.fixture
def trained(tiny_checkpoint, tmp_path):
    """The tiny checkpoint with visual weights that differ from the text weights."""
    engine = load(tiny_checkpoint)
    with torch.no_grad():
        for name, weight in engine.model.named_parameters():
            if VISUAL_KEY in name:
                weight += 0.3 * torch.randn(
                    weight.shape, generator=torch.Generator().manual_seed(1)
                )
    engine.model.save_pretrained(tmp_path)
    engine.processor.save_pretrained(tmp_path)
    return tmp_path


def test_without_mam_images_use_the_text_weights(trained):
    files = {path: path.read_bytes() for path in trained.iterdir()}
    plain, without = load(trained), load(trained, mam=False)
    assert not without.model.config.use_mam
    assert (logits(plain) - logits(without)).abs().max() > 1e-3
    as_text = torch.zeros_like(inputs(plain)["mm_token_type_ids"])
    torch.testing.assert_close(logits(without), logits(plain, mm_token_type_ids=as_text))
    assert without.chat([{"role": "user", "content": "what is this?"}], max_new_tokens=3)
    assert files == {path: path.read_bytes() for path in trained.iterdir()}


def test_mam_of_a_lora_cannot_be_disabled(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(evaluate, "has_adapter", lambda model: True)
    with raises_input_error(ErrorCode.UNSUPPORTED, "owl2 merge"):
        load(tiny_checkpoint, mam=False)


def test_image_size_and_policy(tiny_checkpoint):
    engine = load(tiny_checkpoint, image_size=16, image_policy="pad")
    pixels = inputs(engine)["pixel_values"]
    assert pixels.shape == (1, 3, 16, 16)
    assert engine.model.config.image_size == 16
    # A red image of 30 x 20 in the middle of the mean color.
    assert pixels[0, :, 0].abs().max() < 0.02
    assert pixels[0, 0, 8].min() > 1
    assert logits(engine).isfinite().all()


def test_each_process_has_its_own_gpu(tiny_checkpoint, monkeypatch):
    def stop(args):
        raise InputError(f"on {args.device}", ErrorCode.INVALID_VALUE)

    monkeypatch.setattr(load_model, "select_device", lambda device: torch.device(device or "cuda"))
    monkeypatch.setattr(ModelArgs, "load_model", stop)
    for device, worker, expected in (
        (None, WorkerRank(), "cuda"),
        (None, WorkerRank(3, 4, 1), "cuda:1"),
        ("cuda:2", WorkerRank(3, 4, 1), "cuda:2"),
        ("cpu", WorkerRank(3, 4, 1), "cpu"),
    ):
        with pytest.raises(InputError) as error:
            load_engine(EvalConfig(ModelArgs("x", device), Path("unused")), worker)
        assert str(error.value) == f"on {expected}"
