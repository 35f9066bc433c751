"""An untrained model from a LLaMA and a vision tower computes what its backbones compute."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from owl2.checkpoints.from_backbones import load_llm, load_vision
from owl2.errors import ErrorCode
from owl2.model.modeling import Owl2ForConditionalGeneration
from tests.errors import raises_input_error
from tests.model.conftest import make_modalities_differ
from tests.tiny import CLIP_TOWER, PARTIAL_MAM, make_config

ABSTRACTOR = {"num_hidden_layers": 1, "intermediate_size": 12, "num_learnable_queries": 2}
LLAMAS = {
    "mha": {"num_key_value_heads": 4},
    "gqa": {},
    "tied": {"tie_word_embeddings": True},
    "biased": {"attention_bias": True, "mlp_bias": True},
    "scaled": {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5e5},
}


from_backbones = Owl2ForConditionalGeneration.from_backbones


def make_llama(**settings):
    values = make_config(**settings).to_dict()
    llama = LlamaForCausalLM(
        LlamaConfig(**{name: values[name] for name in LlamaConfig().to_dict() if name in values})
    ).eval()
    make_modalities_differ(llama)
    return llama


def make_tower(**settings):
    torch.manual_seed(3)
    tower = CLIPVisionModel(
        CLIPVisionConfig(**CLIP_TOWER | {"layer_norm_eps": 1e-6} | settings)
    ).eval()
    make_modalities_differ(tower)
    return tower


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def text():
    return torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("mam", [{}, {"use_mam": False}, *PARTIAL_MAM], ids=str)
@pytest.mark.parametrize("kind", LLAMAS)
def test_text_logits_are_bit_identical_to_the_llama(kind, mam, tmp_path):
    llama = make_llama(**LLAMAS[kind])
    before = logits(llama, text())
    model = from_backbones(llama, CLIP_TOWER, abstractor=ABSTRACTOR, **mam).eval()
    assert torch.equal(logits(model, text()), before)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(again, text()), before)


def test_visual_weights_are_copies():
    state = from_backbones(
        make_llama(attention_bias=True), CLIP_TOWER, abstractor=ABSTRACTOR
    ).state_dict()
    visual = {name for name in state if ".multiway.1." in name}
    assert len(visual) == 2 * 6
    for name in visual:
        text_weight = state[name.replace(".multiway.1.", ".multiway.0.")]
        assert torch.equal(state[name], text_weight)
        assert state[name].data_ptr() != text_weight.data_ptr()


def features_of(tower, pixels):
    """CLIP's features with the last norm on all tokens (Specification §1.1), not only on CLS."""
    inner = getattr(tower, "vision_model", tower)
    with torch.no_grad():
        return inner.post_layernorm(tower(pixels).last_hidden_state)


@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
def test_features_equal_clip(hidden_act):
    tower, pixels = make_tower(hidden_act=hidden_act), torch.randn(2, 3, 8, 8)
    model = from_backbones(make_llama(), tower, abstractor=ABSTRACTOR).eval()
    with torch.no_grad():
        features = model.get_image_features(pixels).last_hidden_state
    torch.testing.assert_close(features, features_of(tower, pixels), rtol=1e-6, atol=1e-6)


def test_positions_of_a_tower_are_resized():
    tower = make_tower()
    model = from_backbones(make_llama(), tower, abstractor=ABSTRACTOR, image_size=16)
    assert model.config.image_size == 16
    features = model.get_image_features(torch.randn(1, 3, 16, 16)).last_hidden_state
    assert features.shape == (1, 17, 8)
    stored = tower.state_dict()
    name = next(name for name in stored if name.endswith("position_embedding.weight"))
    positions = model.model.vision_model.embeddings.position_embedding
    assert torch.equal(positions[0, 0], stored[name][0])


def test_new_vision_encoder_has_the_requested_size():
    model = from_backbones(make_llama(), CLIP_TOWER, abstractor=ABSTRACTOR, image_size=16)
    assert model.get_image_features(torch.randn(1, 3, 16, 16)).pooler_output.shape == (1, 3, 16)


def test_all_parts_have_the_dtype_of_the_llama():
    model = from_backbones(make_llama().to(torch.bfloat16), make_tower(), abstractor=ABSTRACTOR)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16}


def test_new_parts_are_finite_and_end_tokens_are_kept():
    llama = make_llama()
    llama.generation_config.eos_token_id = [2, 7]
    model = from_backbones(llama, CLIP_TOWER | {"hidden_size": 256}, abstractor=ABSTRACTOR)
    assert model.generation_config.eos_token_id == [2, 7]
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    for name, parameter in model.named_parameters():
        if name.endswith(("query_embeds", "cls_token", "patch_embed.weight", "w1.weight")):
            assert 0.017 < parameter.std() < 0.023, name


def test_sizes_that_do_not_fit_are_rejected():
    with raises_input_error(ErrorCode.INVALID_CONFIG, "encoder_hidden_size"):
        from_backbones(
            make_llama(), CLIP_TOWER, abstractor={"hidden_size": 12, "encoder_hidden_size": 12}
        )
    with raises_input_error(ErrorCode.INVALID_VALUE, "image_size"):
        from_backbones(make_llama(), make_tower(), abstractor=ABSTRACTOR, image_size=10)
    with raises_input_error(ErrorCode.UNSUPPORTED, "GPT2LMHeadModel"):
        from_backbones(GPT2LMHeadModel(small_gpt2()), CLIP_TOWER)


def small_gpt2():
    return GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=40)


def test_load_llm(tmp_path):
    llama = make_llama().to(torch.bfloat16)
    llama.save_pretrained(tmp_path)
    loaded = load_llm(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(logits(loaded.eval(), text()), logits(llama, text()))
    assert load_llm(str(tmp_path), "float32").dtype == torch.float32


def test_other_language_models_are_rejected(tmp_path):
    GPT2LMHeadModel(small_gpt2()).save_pretrained(tmp_path / "gpt2")
    with raises_input_error(ErrorCode.UNSUPPORTED, "gpt2"):
        load_llm(tmp_path / "gpt2")
    make_tower().save_pretrained(tmp_path / "clip")
    with raises_input_error(ErrorCode.UNSUPPORTED, "clip"):
        load_llm(tmp_path / "clip")
    for missing in ("no-such-directory", "no/such.gguf"):
        with raises_input_error(ErrorCode.UNREADABLE_FILE, missing):
            load_llm(tmp_path / missing)
    (tmp_path / "broken.gguf").write_bytes(b"no weights")
    with raises_input_error(ErrorCode.UNREADABLE_FILE, "broken.gguf"):
        load_llm(tmp_path / "broken.gguf")


def drop(folder, name):
    tensors = load_file(folder / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if name not in n}, folder / "model.safetensors")


def test_incomplete_llama_is_rejected(tmp_path):
    """transformers would fill them with random numbers."""
    make_llama().save_pretrained(tmp_path)
    drop(tmp_path, "layers.1.mlp.up_proj")
    with raises_input_error(ErrorCode.MISSING_WEIGHTS, "layers.1.mlp.up_proj"):
        load_llm(tmp_path)
    make_llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text("utf-8")) | {"vocab_size": 50}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with raises_input_error(ErrorCode.SHAPE_MISMATCH, "(40, 16)", "(50, 16)"):
        load_llm(tmp_path)


def test_load_vision_from_a_tower_or_a_clip(tmp_path, capfd):
    pixels = torch.randn(1, 3, 8, 8)
    text_config = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    text_config |= {"num_attention_heads": 2, "vocab_size": 40}
    clip = CLIPModel(CLIPConfig(vision_config=CLIP_TOWER, text_config=text_config)).eval()
    clip.save_pretrained(tmp_path / "clip")
    loaded = load_vision(tmp_path / "clip").eval()
    expected = clip.vision_model(pixels).last_hidden_state
    torch.testing.assert_close(loaded(pixels).last_hidden_state, expected)
    tower = make_tower()
    tower.save_pretrained(tmp_path / "tower")
    loaded = load_vision(str(tmp_path / "tower")).eval()
    assert torch.equal(features_of(loaded, pixels), features_of(tower, pixels))
    assert "text_model" not in "".join(capfd.readouterr())  # no list of what is not wanted


def test_other_vision_models_are_rejected(tmp_path):
    make_llama().save_pretrained(tmp_path / "llama")
    with raises_input_error(ErrorCode.UNSUPPORTED, "llama"):
        load_vision(tmp_path / "llama")
    with raises_input_error(ErrorCode.UNREADABLE_FILE, "no-such-directory"):
        load_vision(tmp_path / "no-such-directory")
    make_tower().save_pretrained(tmp_path / "clip")
    drop(tmp_path / "clip", "layers.0.mlp.fc1")
    with raises_input_error(ErrorCode.MISSING_WEIGHTS, "layers.0.mlp.fc1"):
        load_vision(tmp_path / "clip")
