import pytest

from owl2.errors import InputError
from owl2.train import attn_implementation
from owl2.train.attn_implementation import layout, require_attention
from owl2.train.run import train
from owl2.train.trainer import Owl2Trainer
from tests.train.runs import quiet


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)


@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention"])
def test_what_needs_a_gpu_is_refused_without_one(recipe, monkeypatch, name):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(
        InputError, match=f"{name} trains on a GPU only; set attn_implementation=sdpa"
    ):
        train(recipe(attn_implementation=name), quiet())


def test_flash_attention_needs_its_package_and_bfloat16(make_recipe, monkeypatch, gpu):
    monkeypatch.setattr(attn_implementation, "is_flash_attn_2_available", lambda: False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install flash-attn"):
        require_attention(make_recipe(attn_implementation="flash_attention_2"))
    monkeypatch.setattr(attn_implementation, "is_flash_attn_2_available", lambda: True)
    require_attention(make_recipe(attn_implementation="flash_attention_2", dtype="bfloat16"))
    with pytest.raises(InputError, match="bfloat16"):
        require_attention(make_recipe(attn_implementation="flash_attention_2", dtype="float32"))


@pytest.mark.parametrize("name", [None, "eager", "sdpa"])
def test_what_runs_everywhere(make_recipe, name):
    require_attention(make_recipe(attn_implementation=name))


def test_the_model_computes_as_the_recipe_says(recipe, monkeypatch):
    seen = []
    step = Owl2Trainer.training_step

    def spy(self, model, *args, **kwargs):
        seen.append(model.config._attn_implementation)
        return step(self, model, *args, **kwargs)

    monkeypatch.setattr(Owl2Trainer, "training_step", spy)
    train(recipe(attn_implementation="eager", max_steps=1, warmup_steps=0), quiet())
    assert seen == ["eager"]


def test_rows_of_packed_samples(make_recipe):
    assert layout(make_recipe()) == "padded"
    assert layout(make_recipe(packing=True)) == "packed"
    flash = make_recipe(max_length=70, packing=True, attn_implementation="flash_attention_2")
    assert layout(flash) == "one row"
