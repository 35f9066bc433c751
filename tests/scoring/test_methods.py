"""Published checkpoints are recognized; what they were not trained for is refused."""

import json
import shutil

import pytest

from owl2.errors import ErrorCode
from owl2.scoring import verify
from owl2.scoring.methods import CHECKPOINTS, METHODS, check_task
from owl2.scoring.scorer import ImageScorer, recognize
from owl2.scoring.verify import PublishedScore
from tests.errors import raises_input_error
from tests.scoring.golden import FAMILY, image_files, read


@pytest.fixture
def checkpoint(tmp_path):
    """`checkpoint(name, **config)` is a directory with only a configuration."""

    def make(name, **config):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": "mplug_owl2"} | config))
        return folder

    return make


@pytest.mark.parametrize("name", list(CHECKPOINTS))
def test_names_of_published_checkpoints(checkpoint, name):
    found, method = recognize(checkpoint(name.split("/")[1]))
    assert found == name
    assert method is METHODS[CHECKPOINTS[name].methods[0]]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"_name_or_path": "q-future/one-align"}, "q-align"),
        ({"_name_or_path": "VQA-CityU/Compare2Score_1"}, "compare2score"),
        ({"softkl_loss": True, "_name_or_path": "MAGAer13/mplug-owl2-llama2-7b"}, "deqa-score"),
    ],
)
def test_configurations(checkpoint, config, expected):
    assert recognize(checkpoint("mine", **config))[1].name == expected


def test_golden_adapter_is_recognized_by_its_base():
    assert recognize(FAMILY / "q_align_lora" / "adapter")[0] == "q-future/one-align"


@pytest.mark.parametrize(
    ("name", "config", "method", "code", "needle"),
    [
        ("mine", {}, None, ErrorCode.UNSUPPORTED, "q-future/one-align"),
        ("mine", {}, "nima", ErrorCode.UNKNOWN_NAME, "q-instruct"),
        ("co-instruct", {}, None, ErrorCode.UNSUPPORTED, "q-future/one-align"),
        ("one-align", {}, "q-instruct", ErrorCode.CONFLICT, "'q-align'"),
        ("DocOwl2", {"model_type": "mplug_docowl"}, None, ErrorCode.UNSUPPORTED, "one-align"),
        ("mine", {"model_type": "mplug_docowl"}, "q-align", ErrorCode.UNSUPPORTED, "one-align"),
        ("mine", {"softkl_loss": False}, "q-align", ErrorCode.CONFLICT, "'deqa-score'"),
    ],
)
def test_other_models_and_methods(checkpoint, name, config, method, code, needle):
    with raises_input_error(code, needle):
        recognize(checkpoint(name, **config), method)


def test_explicit_method_of_a_model_with_another_ancestor(checkpoint):
    folder = checkpoint("mine", _name_or_path="q-future/one-align")
    assert recognize(folder, "q-instruct") == (None, METHODS["q-instruct"])


@pytest.mark.parametrize(
    ("checkpoint_id", "task", "kind", "nearest"),
    [
        ("zhiyuanyou/DeQA-Score-Mix3", "aesthetics", "image", "q-future/one-align"),
        ("q-future/q-align-aesthetic", "quality", "image", "q-future/one-align"),
        ("VQA-CityU/Compare2Score_1", "quality", "video", "q-future/one-align"),
        ("q-future/q-align-vqa", "quality", "image", "q-future/one-align"),
        (None, "aesthetics", "image", "q-future/one-align"),
    ],
)
def test_task_of_another_model(checkpoint_id, task, kind, nearest):
    known = CHECKPOINTS.get(checkpoint_id)
    method = METHODS[known.methods[0] if known else "deqa-score"]
    with raises_input_error(ErrorCode.UNSUPPORTED, nearest, task):
        check_task(method, checkpoint_id, task, kind)
    with raises_input_error(ErrorCode.UNKNOWN_NAME, "aesthetics"):
        check_task(method, checkpoint_id, "beauty", kind)


def test_options_that_do_not_fit(family_engine):
    engine = family_engine("one_align")
    for options, code, needle in (
        ({"method": "q-align", "boost": True}, ErrorCode.CONFLICT, "q-instruct"),
        ({"method": "q-align", "prompt_form": "wiki"}, ErrorCode.UNKNOWN_NAME, "pyiqa"),
        ({"method": "compare2score"}, ErrorCode.IMAGE_COUNT_MISMATCH, "Anchor_images"),
    ):
        with raises_input_error(code, needle):
            ImageScorer(engine, **options)
    scorer = ImageScorer(engine, "q-align", checkpoint="q-future/q-align-iqa")
    with raises_input_error(ErrorCode.UNSUPPORTED, "q-future/one-align"):
        scorer.score(image_files("one_align", ["wide"]), "aesthetics")
    with raises_input_error(ErrorCode.MISSING_IMAGE, "Image 1"):
        scorer.score([*image_files("one_align", ["wide"]), "nowhere.png"])
    two = ImageScorer(engine, "q-align", prompt_form="<|image|> or <|image|>?")
    with raises_input_error(ErrorCode.IMAGE_COUNT_MISMATCH):
        two.score(image_files("one_align", ["wide"]))
    with raises_input_error(ErrorCode.MISSING_IMAGE, "frames"):
        ImageScorer(engine, "q-align").score_videos([[]])


def test_from_pretrained(tmp_path):
    model = tmp_path / "mine"
    shutil.copytree(FAMILY / "one_align" / "model", model)
    scorer = ImageScorer.from_pretrained(model, "cpu", "float32", score_range=(0, 1))
    assert scorer.checkpoint == "q-future/one-align"
    [score] = scorer.score(image_files("one_align", ["wide"]))
    assert 0 < score.score < 1
    assert score.to_dict().keys() == {"score", "probabilities", "std"}


def test_info_verify(tmp_path, run_cli, monkeypatch):
    """The golden images are the published ones here."""
    monkeypatch.setenv("COLUMNS", "200")
    cases = read("one_align", "scores.json")["q_instruct.plain"]
    images = image_files("one_align", cases["pictures"])
    model = tmp_path / "q-instruct-mplug-owl2-1031"
    shutil.copytree(FAMILY / "one_align" / "model", model)
    command = ["info", model, "--verify", "--device", "cpu", "--dtype", "float32"]
    for offset, exit_code in ((0.002, 0), (0.1, 1)):
        published = [PublishedScore("https://x", one + offset) for one in cases["score_0_to_1"][:2]]
        monkeypatch.setitem(verify.PUBLISHED, "q-future/q-instruct-mplug-owl2-1031", published)
        result = run_cli(*command, "--image", images[0], "--image", images[1])
        assert result.exit_code == exit_code
        for score in cases["score_0_to_1"][:2]:
            assert f"{score:.6f}"[:5] in result.stdout
        assert ("| NO |" in result.stdout) == bool(exit_code)
    for name in ("float32", "torch", "Verification of released weights"):
        assert name in result.stdout
    result = run_cli(*command, "--image", images[0])
    assert (result.exit_code, "2 published" in result.stderr) == (2, True)
    assert run_cli("info", "--verify").exit_code == 2


@pytest.mark.parametrize(
    ("name", "needle"), [("deqa_score", "test image"), ("co_instruct", "Answer")]
)
def test_info_verify_without_published_scores(run_cli, name, needle):
    options = ["--verify", "--device", "cpu", "--dtype", "float32"]
    result = run_cli("info", FAMILY / name / "model", *options)
    assert result.exit_code == 0
    assert needle in result.stdout
