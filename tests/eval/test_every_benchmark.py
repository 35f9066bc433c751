"""``owl2 eval --suite paper``: each benchmark from its published files to a figure in the report.

The files are tests/eval/fixtures; what is in them, and the figures, the readers' and metrics' own
tests check. One row of most is broken on purpose.
"""

import json
import shutil
from pathlib import Path

import pytest

from owl2.eval import evaluate as evaluate_module
from owl2.eval.evaluate import Judge, Settings, evaluate
from owl2.eval.image_refs import find_image
from owl2.eval.model_args import Subject
from owl2.eval.task_config import recipes
from owl2.eval.tasks import find_tasks
from owl2.processing.image_io import load_image
from owl2.processing.image_processing import Owl2ImageProcessor
from owl2.processing.processor import Owl2Processor
from owl2.processing.tokenizer import Owl2Tokenizer
from tests.eval.stub import completion, serving
from tests.tiny import make_model

FIXTURES = Path(__file__).parent / "fixtures"
PAPER = [name for name, recipe in recipes().items() if recipe.suite]

pytest.importorskip("lm_eval")
pytest.importorskip("pycocoevalcap")


@pytest.fixture(scope="module")
def run(tiny_checkpoint, tmp_path_factory):
    """The folder of an evaluation of all of them, by a model whose context holds five shots."""
    from owl2.eval.adapters.lm_eval_model import Owl2Text

    model, output = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("run")
    tokenizer = Owl2Tokenizer(tiny_checkpoint / "tokenizer.model")
    make_model(
        vocab_size=len(tokenizer), initializer_range=0.4, max_position_embeddings=4096
    ).save_pretrained(model)
    Owl2Processor(Owl2ImageProcessor(8), tokenizer, num_image_tokens=3).save_pretrained(model)
    settings = Settings(
        Subject(str(model), "cpu", "float32"), output, suite="paper", data=FIXTURES, batch_size=16
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate_module, "has_matplotlib", lambda: False)
        patch.setattr(Owl2Text, "max_gen_toks", 8)
        evaluate(settings)
    return output


@pytest.fixture(scope="module")
def results(run):
    return json.loads((run / "results.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", PAPER)
def test_a_benchmark(results, run, name):
    assert name not in results["skipped"]
    result, recipe = results["tasks"][name], recipes()[name]
    assert result["n"] > 0
    lines = (run / "answers" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == result["n"]
    assert all(row["prompt"] for row in rows)
    assert result["data"]["files"], "what was read"
    if recipe.judge:
        assert result["main"] not in result["metrics"]
        assert {row["score"] for row in rows} == {None}
    else:
        assert result["main"] in result["metrics"]
        assert all(0 <= row["score"] <= 1 for row in rows if row["score"] is not None)
    assert {metric: entry["paper"] for metric, entry in result["figures"].items()} == recipe.paper


def test_images_are_in_the_prompts_of_all_but_text(run):
    for name in PAPER:
        lines = (run / "answers" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        has_image = "<|image|>" in json.loads(lines[0])["prompt"]
        assert has_image == (recipes()[name].suite != "text"), name


def test_each_file_that_was_read_has_its_fingerprint(results):
    """MME has files of the same name in its folders."""
    for name in PAPER:
        files = results["tasks"][name]["data"]["files"]
        [task] = find_tasks(name)
        source = task.source(FIXTURES)
        task.read(source)
        assert files.keys() >= {source.name(path) for path in source.read}, name
        assert len({source.name(path) for path in source.read}) == len(set(source.read)), name
    assert "OCR/6610.txt" in results["tasks"]["mme"]["data"]["files"]


def test_images_of_all_can_be_looked_at_later(run):
    """MMBench's are within its file, those of videos are frames."""
    for name in PAPER:
        lines = (run / "answers" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        names = json.loads(lines[0])["images"]
        assert bool(names) == (recipes()[name].suite != "text"), name
        for image in names:
            assert min(load_image(find_image(image, run / "answers")).size) > 0


def test_the_report_has_them_all(run):
    text = (run / "report.md").read_text(encoding="utf-8")
    for name in PAPER:
        assert f"({name}) |" in text
    assert text.count("to be judged") == 3, "MM-Vet's figure, MMHal-Bench's two"


def test_what_needs_a_judge_is_judged_later(run, tmp_path, plain):
    """Against a server that fails first, and then gives both benchmarks their kind of reply."""
    output = shutil.copytree(run, tmp_path / "run")

    def reply(body):
        is_hallucination = "hallucination" in json.dumps(body).lower()
        return completion("Rating: 6" if is_hallucination else "0.5")

    with serving((500, "busy", 0.0), reply) as server:
        evaluate_module.judge(output, Judge(server.url, "judge-1"), plain)
    judged = json.loads((output / "results.json").read_text(encoding="utf-8"))["tasks"]
    for name in ("mm_vet", "mmhal"):
        assert judged[name]["judge"]["model"] == "judge-1"
        assert judged[name]["judge"]["judged"] + len(judged[name]["judge"]["not_judged"]) == 3
    assert judged["mm_vet"]["metrics"]["score"] == pytest.approx(0.5)
    assert "| MM-Vet (mm_vet) | score | 3 | 50.00% | 36.2 |" in (output / "report.md").read_text()
