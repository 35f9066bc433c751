"""Quantized siblings of mPLUG-Owl2, whose weights have other names in their files."""

import shutil

import pytest
import torch

from owl2 import Owl2ForConditionalGeneration
from owl2.checkpoints.config_file import read_config
from owl2.checkpoints.hf_quantizer import Owl2QuantizationConfig, StoredDtypeLinear
from owl2.checkpoints.lazy_weights import WeightReader
from owl2.checkpoints.load_memory import loaded_size
from owl2.checkpoints.weight_files import read_tensors, weight_files
from owl2.checkpoints.weight_names import EMBEDDINGS_WEIGHT, HEAD_WEIGHT, released_name
from owl2.engine.backends.weight_only_quantization import quantize_linear
from owl2.errors import ErrorCode
from owl2.quantization.command import quantize
from tests.errors import raises_input_error
from tests.family import FOLDER as FAMILY
from tests.family import SIBLINGS
from tests.quantization.test_quantize_checkpoint import assert_same_state, load


def test_a_weight_of_a_sibling_that_does_not_fit(tmp_path):
    """The shapes are equal after padding, and the names have other prefixes."""
    folder = shutil.copytree(FAMILY / "mplug_owl2_1" / "model", tmp_path / "model")
    key = "transformer.h.0.mlp.w1.weight"
    [file] = [file for file in weight_files(folder) if key in read_tensors(file)]
    tensors = torch.load(file)
    torch.save(tensors | {key: tensors[key][:-1].clone()}, file)
    with raises_input_error(ErrorCode.SHAPE_MISMATCH, released_name(key)):
        load(folder, quantization_config=Owl2QuantizationConfig(4))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("sibling", SIBLINGS)
def test_embeddings_and_head_of_a_sibling(sibling, tied, tmp_path):
    source = FAMILY / sibling / "model"
    if tied:
        config = read_config(source)
        config.tie_word_embeddings = True
        source = tmp_path / "source"
        Owl2ForConditionalGeneration(config).save_pretrained(source)
    model = load(quantize(source, tmp_path / "out"))
    assert_same_state(model, load(source, quantization_config=Owl2QuantizationConfig(4)))
    reader = WeightReader(weight_files(source))
    embeddings = reader.read(reader.stored_name(EMBEDDINGS_WEIGHT))
    assert torch.equal(model.model.embed_tokens.weight, embeddings.to(model.dtype))
    weight, scale = quantize_linear(embeddings if tied else reader.read(HEAD_WEIGHT), 8)
    assert torch.equal(model.lm_head.weight, weight)
    assert torch.equal(model.lm_head.scale, scale)


@pytest.mark.parametrize("sibling", SIBLINGS)
def test_size_of_a_sibling_with_16_bit_weights(sibling, tmp_path):
    half = load(FAMILY / sibling / "model", dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    config = Owl2QuantizationConfig(4)
    model = load(tmp_path / "half", dtype=torch.float32, quantization_config=config)
    visual = model.model.visual_abstractor.modules()
    assert any(isinstance(module, StoredDtypeLinear) for module in visual)
    reader = WeightReader(weight_files(tmp_path / "half"))
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert loaded_size(reader.tensors, torch.float32, config) == size
