"""The model of lmms-eval: batches, positions of images, losses and invalid requests."""

import json
import math
import os
import subprocess
import sys

import pytest
from PIL import Image

pytest.importorskip("lmms_eval")

from lmms_eval.api.instance import GenerationResult, Instance

from owl2.engine.engine import Engine
from owl2.errors import ErrorCode
from owl2.eval.adapters import additional_tasks
from owl2.eval.adapters.lmms_eval import LmmsEvalModel
from tests.errors import raises_input_error

COLORS = ("red", "blue", "lime", "white", "black", "yellow")
SHORT = {"max_new_tokens": 4, "until": ["\n\n"], "temperature": 0, "top_p": 0, "num_beams": 1}


@pytest.fixture(scope="module")
def engine(tiny_checkpoint):
    return Engine.from_pretrained(tiny_checkpoint, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def documents():
    return [
        {"text": "is it " + "very " * (number % 3) + color, "color": color}
        for number, color in enumerate(COLORS)
    ]


@pytest.fixture
def model(engine, documents):
    def make(batch_size):
        model = LmmsEvalModel(engine, batch_size=batch_size)
        model.task_dict = {"colors": {"test": documents}}
        return model

    return make


def image(document):
    return [Image.new("RGB", (10, 12), document["color"])]


def request(kind, number, *arguments, visual=image, **metadata):
    metadata = {"task": "colors", "doc_id": number, "repeats": 1, **metadata}
    text, second = arguments
    return Instance(kind, (text, second, visual, number, "colors", "test"), 0, metadata)


def generations(documents, **settings):
    return [
        request("generate_until", number, document["text"], {**SHORT, **settings})
        for number, document in enumerate(documents)
    ]


def test_responses_equal_those_of_the_engine_in_any_batch(model, engine, documents):
    requests = generations(documents)
    expected = [
        engine.chat(
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": image(document)[0]},
                        {"type": "text", "text": document["text"]},
                    ],
                }
            ],
            max_new_tokens=4,
        ).split("\n\n")[0]
        for document in documents
    ]
    assert model(1).generate_until(requests) == expected
    assert model("4").generate_until(requests) == expected
    assert model("auto").generate_until(requests) == expected
    assert len(set(expected)) > 1
    assert requests[0].args[1] == SHORT, "lmms-eval uses the settings for its cache"


def test_sampled_responses_do_not_depend_on_the_batch(model, documents):
    requests = generations(documents, do_sample=True, temperature=2.0)
    sampled = model(1).generate_until(requests)
    assert sampled == model(4).generate_until(requests)
    assert sampled != model(1).generate_until(generations(documents))


def test_responses_end_at_stop_strings(model, documents):
    [request, *_] = generations(documents)
    [text] = model(1).generate_until([request])
    [first] = generations(documents[:1], until=text[1])
    assert model(1).generate_until([first]) == [text.split(text[1])[0]]


def test_padding_requests_get_no_response(model, documents):
    padding = request("generate_until", 0, "is it", SHORT, __padding_only__=True)
    assert model(2).generate_until([padding, *generations(documents[:1])])[0] == ""


def test_likelihoods_are_losses(model, engine, documents):
    choices = [" yes", " no", " a red circle"]
    requests = [
        request("loglikelihood", number, document["text"], choice)
        for number, document in enumerate(documents[:2])
        for choice in choices
    ]
    found = model(1).loglikelihood(requests)
    assert all(isinstance(loss, GenerationResult) for loss in found), "0.7.3 unwraps no tuples"
    content = [
        {"type": "image", "image": image(documents[1])[0]},
        {"type": "text", "text": documents[1]["text"]},
    ]
    expected = engine.score(
        [{"role": "user", "content": content}], ["yes", "no", "a red circle"], include_end=False
    )
    assert [loss.text[0] for loss in found[3:]] == pytest.approx([-score for score in expected])
    again = model(3).loglikelihood(requests)
    for one, other in zip(found, again, strict=True):
        assert one.text[0] == pytest.approx(other.text[0], abs=1e-4)


def test_single_continuation_is_compared_with_the_greedy_response(model, documents):
    [text_of_model] = model(1).generate_until(generations(documents[:1]))
    text = documents[0]["text"]

    def greedy(continuation):
        [found] = model(1).loglikelihood([request("loglikelihood", 0, text, continuation)])
        return found.text[1]

    assert greedy(lambda document: text_of_model[:2])
    assert not greedy(" no")


def test_invalid_image_is_logged_and_others_get_responses(model, documents, tmp_path, caplog):
    complete = tmp_path / "complete.png"
    Image.effect_noise((64, 64), 90).save(complete)
    broken = tmp_path / "broken.png"
    broken.write_bytes(complete.read_bytes()[:2000])
    sound = generations(documents[:3])

    def opened(document):
        return [Image.open(broken).convert("RGB")]

    for visual in (opened, lambda document: [str(broken)], lambda document: [b"sound"]):
        adapter = model(4)
        bad = request("generate_until", 3, "is it", SHORT, visual=visual)
        answers = adapter.generate_until([*sound[:2], bad, sound[2]])
        assert answers[2] == ""
        assert answers[:2] + answers[3:] == model(4).generate_until(sound)
        assert list(adapter.invalid) == ["colors test 3"]
        assert "colors test 3" in caplog.text
        lost = request("loglikelihood", 3, "is it", " yes", visual=visual)
        assert adapter.loglikelihood([lost])[0].text == (math.inf, False)


def test_prompt_beyond_the_context_is_invalid(model, documents):
    adapter = model(4)
    long = request("generate_until", 2, "very " * 300, SHORT)
    answers = adapter.generate_until([*generations(documents[:2]), long])
    assert answers[:2] == model(1).generate_until(generations(documents[:2]))
    assert "128" in adapter.invalid["colors test 2"]


def test_unsupported_requests_are_errors(engine, model, documents):
    with raises_input_error(ErrorCode.UNKNOWN_NAME, "dytpe"):
        LmmsEvalModel(engine, dytpe="float32")
    with raises_input_error(ErrorCode.UNSUPPORTED, "num_beams is 3"):
        model(1).generate_until(generations(documents, num_beams=3))
    bare = Instance("loglikelihood", ("", "yes"), 0, {"task": "m", "doc_id": 0, "repeats": 1})
    with raises_input_error(ErrorCode.UNSUPPORTED, "acc_mutual_info"):
        model(1).loglikelihood([bare])


def test_lmms_eval_finds_the_model():
    from lmms_eval.models import get_model

    assert get_model("owl2") is LmmsEvalModel


# ------------------------------------------------------------------ complete evaluations


@pytest.fixture
def own(tmp_path):
    """Two tasks in the format of lmms-eval: with options, and with a text."""
    Image.new("RGB", (9, 9), "red").save(tmp_path / "a.png")
    rows = [{"path": str(tmp_path / "a.png"), "text": f"is it {n}", "gold": n} for n in (0, 1)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    common = (
        "dataset_path: json\ntest_split: test\n"
        "dataset_kwargs: {data_files: {test: rows.json}}\n"
        "doc_to_visual: !function seen.visual\ndoc_to_text: text\n"
    )
    (tmp_path / "seen.py").write_text(
        "from PIL import Image\ndef visual(doc): return [Image.open(doc['path']).convert('RGB')]\n"
    )
    (tmp_path / "choice.yaml").write_text(
        f"task: made_choice\n{common}output_type: multiple_choice\n"
        "doc_to_choice: ['yes', 'no']\ndoc_to_target: gold\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    (tmp_path / "text.yaml").write_text(
        f"task: made_words\n{common}output_type: generate_until\ndoc_to_target: text\n"
        "generation_kwargs: {max_new_tokens: 3}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    return tmp_path


def test_evaluator_of_lmms_eval(own, engine, monkeypatch):
    """The most likely option is selected; lmms-eval 0.7.3 selects the lowest loss."""
    from lmms_eval import evaluator
    from lmms_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(own / "cache"))
    results = evaluator.simple_evaluate(
        model=LmmsEvalModel(engine, batch_size=2),
        tasks=["made_choice", "made_words"],
        task_manager=TaskManager(include_path=str(own), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    right = []
    for number in (0, 1):
        content = [
            {"type": "image", "path": str(own / "a.png")},
            {"type": "text", "text": f"is it {number}"},
        ]
        yes, no = engine.score(
            [{"role": "user", "content": content}], ["yes", "no"], include_end=False
        )
        right.append((0 if yes > no else 1) == number)
    assert results["results"]["made_choice"]["acc,none"] == sum(right) / 2
    assert len(results["samples"]["made_words"]) == 2


@pytest.mark.slow
def test_command_line_of_lmms_eval(own, tiny_checkpoint):
    pytest.importorskip("easy_vqa")
    for folder, tasks in ((own, {"made_choice", "made_words"}), (additional_tasks(), {"easy_vqa"})):
        out = own / f"out{len(tasks)}"
        done = subprocess.run(
            [
                *(sys.executable, "-m", "lmms_eval", "--model", "owl2", "--model_args"),
                *(f"pretrained={tiny_checkpoint},dtype=float32,device=cpu", "--batch_size", "2"),
                *("--tasks", ",".join(tasks), "--include_path", str(folder), "--limit", "4"),
                *("--output_path", str(out), "--log_samples"),
            ],
            env={
                **os.environ,
                "HF_DATASETS_OFFLINE": "1",
                "LMMS_EVAL_DATASETS_CACHE": str(own / "cache"),
            },
            capture_output=True,
            text=True,
            timeout=300,
        )
        files = [*out.rglob("*_results.json")]
        assert len(files) == 1, done.stdout + done.stderr  # its exit code is 0 in any case
        results = json.loads(files[0].read_text())["results"]
        assert results.keys() == tasks
        names = {name for found in results.values() for name in found}
        assert names & {"acc,none", "accuracy,none"}


def test_directory_of_additional_tasks():
    assert {path.stem for path in additional_tasks().glob("*.yaml")} == {
        "easy_vqa",
        "mmhal",
        "msrvtt_qa",
        "msvd_qa",
        "tgif_qa",
    }
