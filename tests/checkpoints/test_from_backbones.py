"""An untrained model from a LLaMA and a vision tower: nothing of either is lost on the way."""

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

from owl2.checkpoints.from_backbones import assemble, load_llm, load_vision
from owl2.errors import InputError
from tests.model.conftest import make_modalities_differ
from tests.tiny import make_config

FRESH = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 8,
    "patch_size": 4,
}
ABSTRACTOR = {"num_hidden_layers": 1, "intermediate_size": 12, "num_learnable_queries": 2}
LLAMAS = {
    "mha": {"num_key_value_heads": 4},
    "gqa": {},
    "tied": {"tie_word_embeddings": True},
    "biased": {"attention_bias": True, "mlp_bias": True},
    "scaled": {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5e5},
}


def make_llama(**settings):
    values = make_config(**settings).to_dict()
    llama = LlamaForCausalLM(
        LlamaConfig(**{name: values[name] for name in LlamaConfig().to_dict() if name in values})
    ).eval()
    make_modalities_differ(llama)
    return llama


def make_tower(**settings):
    torch.manual_seed(3)
    tower = CLIPVisionModel(CLIPVisionConfig(**FRESH | {"layer_norm_eps": 1e-6} | settings)).eval()
    make_modalities_differ(tower)
    return tower


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def text():
    return torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("use_mam", [True, False])
@pytest.mark.parametrize("kind", LLAMAS)
def test_text_logits_are_bit_identical_to_the_llamas(kind, use_mam, tmp_path):
    llama = make_llama(**LLAMAS[kind])
    before = logits(llama, text())
    model = assemble(llama, FRESH, abstractor=ABSTRACTOR, use_mam=use_mam).eval()
    assert torch.equal(logits(model, text()), before)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(again, text()), before)


def test_visual_weights_are_copies():
    state = assemble(make_llama(attention_bias=True), FRESH, abstractor=ABSTRACTOR).state_dict()
    visual = {name for name in state if ".multiway.1." in name}
    assert len(visual) == 2 * 6
    for name in visual:
        text_weight = state[name.replace(".multiway.1.", ".multiway.0.")]
        assert torch.equal(state[name], text_weight)
        assert state[name].data_ptr() != text_weight.data_ptr()


def features_of(tower, pixels):
    """CLIP's tokens with its last norm on all of them (SPEC 1.1); CLIP itself norms CLS only."""
    inner = getattr(tower, "vision_model", tower)
    with torch.no_grad():
        return inner.post_layernorm(tower(pixels).last_hidden_state)


@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
def test_the_features_are_clips(hidden_act):
    tower, pixels = make_tower(hidden_act=hidden_act), torch.randn(2, 3, 8, 8)
    model = assemble(make_llama(), tower, abstractor=ABSTRACTOR).eval()
    with torch.no_grad():
        features = model.get_image_features(pixels).last_hidden_state
    torch.testing.assert_close(features, features_of(tower, pixels), rtol=1e-6, atol=1e-6)


def test_a_towers_positions_are_resized():
    tower = make_tower()
    model = assemble(make_llama(), tower, abstractor=ABSTRACTOR, image_size=16)
    assert model.config.image_size == 16
    features = model.get_image_features(torch.randn(1, 3, 16, 16)).last_hidden_state
    assert features.shape == (1, 17, 8)
    stored = tower.state_dict()
    name = next(name for name in stored if name.endswith("position_embedding.weight"))
    positions = model.model.vision_model.embeddings.position_embedding
    assert torch.equal(positions[0, 0], stored[name][0])


def test_a_fresh_tower_has_the_size_that_is_asked_for():
    model = assemble(make_llama(), FRESH, abstractor=ABSTRACTOR, image_size=16)
    assert model.get_image_features(torch.randn(1, 3, 16, 16)).pooler_output.shape == (1, 3, 16)


def test_everything_is_in_the_llamas_dtype():
    model = assemble(make_llama().to(torch.bfloat16), make_tower(), abstractor=ABSTRACTOR)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16}


def test_fresh_parts_are_finite_and_the_end_tokens_are_kept():
    llama = make_llama()
    llama.generation_config.eos_token_id = [2, 7]
    model = assemble(llama, FRESH | {"hidden_size": 256}, abstractor=ABSTRACTOR)
    assert model.generation_config.eos_token_id == [2, 7]
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    for name, parameter in model.named_parameters():
        if name.endswith(("query_embeds", "cls_token", "patch_embed.weight", "w1.weight")):
            assert 0.017 < parameter.std() < 0.023, name


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="encoder_hidden_size"):
        assemble(make_llama(), FRESH, abstractor={"hidden_size": 12, "encoder_hidden_size": 12})
    with pytest.raises(InputError, match="image_size"):
        assemble(make_llama(), make_tower(), abstractor=ABSTRACTOR, image_size=10)
    with pytest.raises(InputError, match="must be a LLaMA, this is a GPT2LMHeadModel"):
        assemble(GPT2LMHeadModel(small_gpt2()), FRESH)


def small_gpt2():
    return GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=40)


def test_loading_a_llama(tmp_path):
    llama = make_llama().to(torch.bfloat16)
    llama.save_pretrained(tmp_path)
    loaded = load_llm(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(logits(loaded.eval(), text()), logits(llama, text()))
    assert load_llm(str(tmp_path), "float32").dtype == torch.float32


def test_what_is_no_llama_is_refused(tmp_path):
    GPT2LMHeadModel(small_gpt2()).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(InputError, match="is a gpt2 model; a LLaMA is needed"):
        load_llm(tmp_path / "gpt2")
    make_tower().save_pretrained(tmp_path / "clip")
    with pytest.raises(InputError, match="language model"):
        load_llm(tmp_path / "clip")
    for missing in ("no-such-directory", "no/such.gguf"):
        with pytest.raises(InputError, match=missing):
            load_llm(tmp_path / missing)
    (tmp_path / "broken.gguf").write_bytes(b"no weights")
    with pytest.raises(InputError, match=r"broken\.gguf"):
        load_llm(tmp_path / "broken.gguf")


def drop(folder, name):
    tensors = load_file(folder / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if name not in n}, folder / "model.safetensors")


def test_a_llama_with_gaps_is_refused(tmp_path):
    """transformers would fill them with random numbers."""
    make_llama().save_pretrained(tmp_path)
    drop(tmp_path, "layers.1.mlp.up_proj")
    with pytest.raises(InputError, match=r"lacks weights(.|\n)*layers\.1\.mlp\.up_proj"):
        load_llm(tmp_path)
    make_llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text("utf-8")) | {"vocab_size": 50}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(InputError, match=r"\(40, 16\) in the file, \(50, 16\) in the model"):
        load_llm(tmp_path)


def test_loading_a_tower_alone_or_out_of_a_whole_clip(tmp_path, capfd):
    pixels = torch.randn(1, 3, 8, 8)
    text_config = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    text_config |= {"num_attention_heads": 2, "vocab_size": 40}
    whole = CLIPModel(CLIPConfig(vision_config=FRESH, text_config=text_config)).eval()
    whole.save_pretrained(tmp_path / "whole")
    loaded = load_vision(tmp_path / "whole").eval()
    expected = whole.vision_model(pixels).last_hidden_state
    torch.testing.assert_close(loaded(pixels).last_hidden_state, expected)
    tower = make_tower()
    tower.save_pretrained(tmp_path / "tower")
    loaded = load_vision(str(tmp_path / "tower")).eval()
    assert torch.equal(features_of(loaded, pixels), features_of(tower, pixels))
    assert "text_model" not in "".join(capfd.readouterr())  # no list of what is not wanted


def test_what_is_no_tower_is_refused(tmp_path):
    make_llama().save_pretrained(tmp_path / "llama")
    with pytest.raises(InputError, match="is a llama model; a CLIP tower is needed"):
        load_vision(tmp_path / "llama")
    with pytest.raises(InputError, match="no-such-directory"):
        load_vision(tmp_path / "no-such-directory")
    make_tower().save_pretrained(tmp_path / "clip")
    drop(tmp_path / "clip", "layers.0.mlp.fc1")
    with pytest.raises(InputError, match=r"lacks weights(.|\n)*layers\.0\.mlp\.fc1"):
        load_vision(tmp_path / "clip")
