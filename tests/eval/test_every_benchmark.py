"""``owl2 eval --suite paper``: each benchmark from its published files to the report.

The files are in tests/eval/fixtures. The tests of the readers and metrics check their values. Most
files contain one invalid row.
"""

import json
import shutil
from pathlib import Path

import pytest

from owl2.engine.load_model import ModelArgs
from owl2.eval import evaluate as evaluate_module
from owl2.eval.evaluate import EvalConfig, evaluate
from owl2.eval.image_refs import find_image
from owl2.eval.judge import judge_run
from owl2.eval.openai_client import ChatEndpoint
from owl2.eval.task_config import task_configs
from owl2.eval.tasks import find_tasks
from owl2.processing.image_io import load_image
from owl2.processing.image_processing import Owl2ImageProcessor
from owl2.processing.processor import Owl2Processor
from owl2.processing.tokenizer import Owl2Tokenizer
from tests.eval.stub import completion, serving
from tests.tiny import ONE_LAYER, make_model

FIXTURES = Path(__file__).parent / "fixtures"
PAPER = [name for name, one in task_configs().items() if one.suite and one.in_paper]

pytest.importorskip("lm_eval")
pytest.importorskip("pycocoevalcap")


@pytest.fixture(scope="module")
def run(tiny_checkpoint, tmp_path_factory):
    """The directory of an evaluation of all tasks; five examples fit into the context."""
    from owl2.eval.adapters.lm_eval_model import LmEvalModel

    model, output = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("run")
    tokenizer = Owl2Tokenizer(tiny_checkpoint / "tokenizer.model")
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 4096, **ONE_LAYER}
    make_model(initializer_range=0.4, **sizes).save_pretrained(model)
    Owl2Processor(Owl2ImageProcessor(8), tokenizer, num_image_tokens=3).save_pretrained(model)
    settings = EvalConfig(
        ModelArgs(str(model), "cpu", "float32"),
        output,
        suite="paper",
        data=FIXTURES,
        batch_size=16,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate_module, "has_matplotlib", lambda: False)
        patch.setattr(LmEvalModel, "max_gen_toks", 8)
        evaluate(settings)
    return output


@pytest.fixture(scope="module")
def results(run):
    return json.loads((run / "results.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", PAPER)
def test_results_of_a_benchmark(results, run, name):
    assert name not in results["skipped"]
    result, config = results["tasks"][name], task_configs()[name]
    assert result["n"] > 0
    lines = (run / "responses" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == result["n"]
    assert all(row["prompt"] for row in rows)
    assert result["data"]["files"]
    if config.judge:
        assert result["main_metric"] not in result["metrics"]
        assert {row["score"] for row in rows} == {None}
    else:
        assert result["main_metric"] in result["metrics"]
        assert all(0 <= row["score"] <= 1 for row in rows if row["score"] is not None)
    assert result["paper"] == config.paper


def test_prompts_of_all_suites_but_text_have_images(run):
    for name in PAPER:
        lines = (run / "responses" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        has_image = "<|image|>" in json.loads(lines[0])["prompt"]
        assert has_image == (task_configs()[name].suite != "text"), name


def test_every_file_has_its_own_fingerprint(results):
    """Folders of MME contain files of the same name."""
    for name in PAPER:
        files = results["tasks"][name]["data"]["files"]
        [task] = find_tasks(name)
        source = task.data(FIXTURES)
        task.read(source)
        assert files.keys() >= {source.relative_name(path) for path in source.files}, name
        assert len({source.relative_name(path) for path in source.files}) == len(
            set(source.files)
        ), name
    assert "OCR/6610.txt" in results["tasks"]["mme"]["data"]["files"]


def test_images_of_all_responses_are_found_again(run):
    """MMBench has images in its file, and videos have frames."""
    for name in PAPER:
        lines = (run / "responses" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        names = json.loads(lines[0])["images"]
        assert bool(names) == (task_configs()[name].suite != "text"), name
        for image in names:
            assert min(load_image(find_image(image, run / "responses")).size) > 0


def test_report_has_all_tasks(run):
    text = (run / "report.md").read_text(encoding="utf-8")
    for name in PAPER:
        assert f"({name}) |" in text
    assert text.count("to be judged") == 3, "one metric of MM-Vet and two of MMHal-Bench"


def test_responses_are_judged_later(run, tmp_path, plain):
    """The server fails first, and then replies in the format of each benchmark."""
    output = shutil.copytree(run, tmp_path / "run")

    def reply(body):
        is_hallucination = "hallucination" in json.dumps(body).lower()
        return completion("Rating: 6" if is_hallucination else "0.5")

    with serving((500, "busy", 0.0), reply) as server:
        judge_run(output, ChatEndpoint(server.url, "judge-1"), plain)
    judged = json.loads((output / "results.json").read_text(encoding="utf-8"))["tasks"]
    for name in ("mm_vet", "mmhal"):
        assert judged[name]["judge"]["model"] == "judge-1"
        assert judged[name]["judge"]["judged"] + len(judged[name]["judge"]["failed"]) == 3
    assert judged["mm_vet"]["metrics"]["score"] == pytest.approx(0.5)
    assert "| MM-Vet (mm_vet) | score | 3 | 50.00% | 36.2 |" in (output / "report.md").read_text()
