"""Adapters as the training scripts of Q-Align and DeQA-Score write them: two pickled files."""

import json
import shutil

import pytest
import torch

from owl2.checkpoints.adapters import find_adapter, merge_adapter
from owl2.engine.engine import Engine
from owl2.errors import ErrorCode
from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.processing.processor import Owl2Processor
from owl2.scoring.scorer import ImageScorer
from tests.errors import raises_input_error
from tests.scoring.golden import FAMILY, image_files, load_cases, read

FOLDER = FAMILY / "q_align_lora"
BASE, ADAPTER = FOLDER / "base", FOLDER / "adapter"


def load(folder=ADAPTER, **options):
    options = {"base": BASE, "dtype": "float32"} | options
    return Owl2ForConditionalGeneration.from_pretrained(folder, **options).eval()


def logits(model):
    cases, config = load_cases("q_align_lora"), model.config
    ids = [
        id_
        for one in cases["input_ids"][0].tolist()
        for id_ in ([config.image_token_id] * config.num_image_tokens if one == -200 else [one])
    ]
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids, ids]), pixel_values=cases["pixel_values"]).logits


def check(model):
    expected = load_cases("q_align_lora")["logits"]
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4)


def test_live_and_merged():
    model = load()
    check(model)
    merge_adapter(model, find_adapter(ADAPTER, {}))
    assert not any("lora" in name for name, _ in model.named_parameters())
    check(model)


def test_merge_command_and_adapter_written_by_owl2(tmp_path, run_cli):
    result = run_cli(
        "merge", ADAPTER, "--base", BASE, "--output", tmp_path / "merged", "--dtype", "float32"
    )
    assert result.exit_code == 0, result.stderr
    check(load(tmp_path / "merged", base=None))
    load().save_pretrained(tmp_path / "again")
    assert not list((tmp_path / "again").glob("*.bin"))
    check(load(tmp_path / "again"))


def test_scores(tmp_path):
    """The processor is the base's: the authors' adapters have no tokenizer."""
    golden = read("q_align_lora", "scores.json")
    files = image_files("q_align_lora", golden["pictures"])
    for folder, key in ((ADAPTER, "score_1_to_5"), (BASE, "of_the_base_alone")):
        options = {"base": BASE} if folder == ADAPTER else {}
        scorer = ImageScorer.from_pretrained(folder, "cpu", "float32", **options)
        scores = [one.score for one in scorer.score(files)]
        assert scores == pytest.approx(golden[key], abs=1e-4)
    engine = Engine.from_pretrained(ADAPTER, "cpu", "float32", base=BASE)
    assert engine.processor.image_processor.image_policy == "pad"
    # Without an option, the base model is the one that the adapter names.
    shutil.copytree(ADAPTER, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(BASE)})
    )
    found = Owl2Processor.from_pretrained(tmp_path / "adapter")
    assert found.tokenizer.get_vocab() == engine.processor.tokenizer.get_vocab()
    check(load(tmp_path / "adapter", base=None))


class Unsafe:
    def __reduce__(self):
        return print, ("code of a pickle",)


@pytest.mark.parametrize("file", ["adapter_model.bin", "non_lora_trainables.bin"])
def test_files_with_code_or_without_a_key_are_rejected(tmp_path, capsys, file):
    shutil.copytree(ADAPTER, tmp_path / "adapter")
    path = tmp_path / "adapter" / file
    tensors = torch.load(path)
    key = next(key for key in tensors if "vit_eos" in key or "lora_A" in key)
    torch.save({name: tensor for name, tensor in tensors.items() if name != key}, path)
    with raises_input_error(ErrorCode.MISSING_WEIGHTS, key.split(".")[-2]):
        load(tmp_path / "adapter")
    torch.save(tensors | {"x": Unsafe()}, path)
    with raises_input_error(ErrorCode.UNREADABLE_FILE, file):
        load(tmp_path / "adapter")
    assert "code of a pickle" not in capsys.readouterr().out
    path.unlink()
    if file == "adapter_model.bin":
        with raises_input_error(ErrorCode.MISSING_WEIGHTS, file):
            load(tmp_path / "adapter")
