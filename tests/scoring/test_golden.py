"""Golden values of OneAlign, Q-Instruct, DeQA-Score, Compare2Score and Co-Instruct."""

import pytest
import torch

from owl2.processing.messages import user_message
from owl2.processing.processor import Owl2Processor
from owl2.scoring.comparison import comparison_scores, preference_matrix
from owl2.scoring.methods import METHODS
from owl2.scoring.scorer import ImageScorer
from tests.scoring.golden import FAMILY, image_files, load_cases, read, with_placeholders

MEMBERS = ("one_align", "deqa_score", "compare2score", "co_instruct")
TOLERANCE = {"rtol": 0, "atol": 1e-4}


@pytest.mark.parametrize("name", MEMBERS)
def test_pixels(name):
    processor = Owl2Processor.from_pretrained(FAMILY / name / "model")
    assert processor.image_processor.image_policy == "pad"
    assert processor.interleave_images
    for key, expected in load_cases(name).items():
        kind, _, image = key.partition(".")
        if kind in ("pixels", "crop_pixels"):
            options = {"image_policy": "crop"} if kind == "crop_pixels" else {}
            [file] = image_files(name, [image])
            pixels = processor.image_processor(file, **options)["pixel_values"][0]
            torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-6)


def prompts():
    for name, key in (("one_align", "prompts"), ("deqa_score", "prompts"), ("co_instruct", "chat")):
        for form, case in read(name, "text.json")[key].items():
            yield pytest.param(name, case, id=f"{name}-{form}")
    yield pytest.param("compare2score", read("compare2score", "scores.json"), id="compare2score")


@pytest.mark.parametrize(("name", "case"), list(prompts()))
def test_ids(name, case):
    processor = Owl2Processor.from_pretrained(FAMILY / name / "model")
    ids = processor.prompt_ids(case["prompt"])
    assert with_placeholders(ids, processor.image_token_id) == case["ids"]


@pytest.mark.parametrize(("case", "images"), [("image", ["wide"]), ("video", "frames")])
def test_hidden_states(family_engine, case, images):
    """One image, and three frames at one placeholder."""
    engine, cases = family_engine("one_align"), load_cases("one_align")
    images = [f"frame{index}" for index in range(3)] if images == "frames" else images
    pixels = engine.processor.image_processor(image_files("one_align", images))["pixel_values"]
    image, size = engine.processor.image_token_id, engine.processor.num_image_tokens
    ids = [
        id_
        for one in cases[f"{case}.input_ids"][0].tolist()
        for id_ in ([image] * (size * len(images)) if one == -200 else [one])
    ]
    with torch.no_grad():
        output = engine.model(
            input_ids=torch.tensor([ids]), pixel_values=pixels, output_hidden_states=True
        )
        features = engine.model.get_image_features(pixels)
    torch.testing.assert_close(output.logits, cases[f"{case}.logits"], **TOLERANCE)
    last = len(output.hidden_states) - 1
    for key, expected in cases.items():
        if key.startswith(f"{case}.hidden."):
            index = last if key.endswith("last") else int(key.split(".")[-1])
            torch.testing.assert_close(output.hidden_states[index], expected, **TOLERANCE)
    if case == "image":
        torch.testing.assert_close(features.last_hidden_state, cases["image.vision"], **TOLERANCE)
        torch.testing.assert_close(features.pooler_output, cases["image.abstractor"], **TOLERANCE)


FORMS = [  # key of scores.json, form, task
    ("quality.image", "hub", "quality"),
    ("aesthetics.image", "hub", "aesthetics"),
    ("pyiqa.aesthetic.image", "pyiqa", "aesthetics"),
    ("iqa_eval", "evaluation", "quality"),
    ("iaa_eval", "evaluation", "aesthetics"),
]


@pytest.mark.parametrize(("key", "form", "task"), FORMS)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_one_align(family_engine, key, form, task, batch_size):
    expected = read("one_align", "scores.json")[key]
    files = image_files("one_align", expected["pictures"])
    for score_range, name in (((1, 5), "score_1_to_5"), ((0, 1), "score_0_to_1")):
        scorer = ImageScorer(
            family_engine("one_align"), "q-align", prompt_form=form, score_range=score_range
        )
        scores = scorer.score(files, task, batch_size=batch_size)
        assert [one.score for one in scores] == pytest.approx(expected[name], abs=1e-4)
    found = [list(one.probabilities.values()) for one in scores]
    torch.testing.assert_close(
        torch.tensor(found), torch.tensor(expected["probabilities"]), **TOLERANCE
    )
    default = ImageScorer(family_engine("one_align"), "q-align", prompt_form=form)
    assert default.form.score_range == ((0, 1) if form == "evaluation" else (1, 5))


@pytest.mark.parametrize("task", ["quality", "aesthetics"])
def test_prompt_of_the_user(family_engine, task):
    text = (
        "USER: How would you rate the {task} of this {kind}?\n<|image|>\n"
        "ASSISTANT: The {kind} of the {task} is"
    )
    scorer = ImageScorer(family_engine("one_align"), "q-align", prompt_form=text)
    expected = read("one_align", "scores.json")[f"github_score_method.{task}.image"]
    scores = scorer.score(image_files("one_align", expected["pictures"]), task)
    assert [one.score for one in scores] == pytest.approx(expected["score_1_to_5"], abs=1e-4)


@pytest.mark.parametrize(("key", "form"), [("quality", "hub"), ("vqa_eval", "evaluation")])
def test_videos_of_different_length_in_one_batch(family_engine, key, form):
    scorer = ImageScorer(
        family_engine("one_align"), "q-align", prompt_form=form, score_range=(1, 5)
    )
    cases = read("one_align", "scores.json")
    name = f"{key}.video" if key == "quality" else key
    expected = [cases[f"{name}.{count}"] for count in ("three", "two", "one")]
    videos = [image_files("one_align", one["frames"]) for one in expected]
    scores = scorer.score_videos(videos, batch_size=3)
    wanted = [one["score_1_to_5"][0] for one in expected]
    assert [one.score for one in scores] == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("boost", [False, True])
def test_q_instruct(family_engine, boost):
    expected = read("one_align", "scores.json")[f"q_instruct.{'boost' if boost else 'plain'}"]
    scorer = ImageScorer(family_engine("one_align"), "q-instruct", boost=boost)
    scores = scorer.score(image_files("one_align", expected["pictures"]))
    assert [one.score for one in scores] == pytest.approx(expected["score_0_to_1"], abs=1e-4)
    found = [list(one.probabilities.values()) for one in scores]
    torch.testing.assert_close(
        torch.tensor(found), torch.tensor(expected["probabilities"]), **TOLERANCE
    )


@pytest.mark.parametrize(("key", "form"), [("score", "hub"), ("iqa_eval", "evaluation")])
def test_deqa_score(family_engine, key, form):
    expected = read("deqa_score", "scores.json")[key]
    scorer = ImageScorer(family_engine("deqa_score"), "deqa-score", prompt_form=form)
    scores = scorer.score(image_files("deqa_score", expected["pictures"]))
    assert [one.score for one in scores] == pytest.approx(expected["score_1_to_5"], abs=1e-4)
    assert [one.std for one in scores] == pytest.approx(expected["std"], abs=1e-4)


FITS = {
    "hub": "score",
    "repository": "score_repository_scorer",
    "evaluation": "score_repository_evaluation",
}


@pytest.mark.parametrize("form", ["hub", "repository"])
def test_compare2score(family_engine, form):
    golden = read("compare2score", "scores.json")
    anchors = image_files("compare2score", golden["anchors"])
    scorer = ImageScorer(
        family_engine("compare2score"), "compare2score", prompt_form=form, anchors=anchors
    )
    images = golden["pictures"]
    scores = scorer.score(image_files("compare2score", images), batch_size=2)
    expected = torch.tensor([one["preferences"] for one in images.values()])
    found = torch.tensor([one.preferences for one in scores])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    wanted = [one[FITS[form]] for one in images.values()]
    assert [one.score for one in scores] == pytest.approx(wanted, abs=2e-3)


@pytest.mark.parametrize("form", list(FITS))
def test_compare2score_fit(form):
    """The golden scores of all forms were fitted to the preferences of the hub's prompt."""
    images = read("compare2score", "scores.json")["pictures"].values()
    preferences = torch.tensor([one["preferences"] for one in images])
    scores = comparison_scores(METHODS["compare2score"].comparison, form, preferences)
    wanted = [one[FITS[form]] for one in images]
    assert scores.tolist() == pytest.approx(wanted, abs=2e-3)


def test_compare2score_matrix():
    golden = read("compare2score", "scores.json")["pictures"]["wide"]
    comparison = METHODS["compare2score"].comparison
    matrix = preference_matrix(comparison, torch.tensor([golden["preferences"]]))[0]
    torch.testing.assert_close(matrix, torch.tensor(golden["matrix"]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", ["one", "two", "three"])
def test_co_instruct_answers_about_images_anywhere_in_the_text(family_engine, case):
    golden, cases = read("co_instruct", "text.json")["chat"][case], load_cases("co_instruct")
    engine = family_engine("co_instruct")
    question = golden["prompt"].removeprefix("USER: ").removesuffix(" ASSISTANT:")
    files = image_files("co_instruct", golden["pictures"])
    placeholders = [user_message(question, files)]
    parts = [{"type": "image", "image": file} for file in files]
    texts = [{"type": "text", "text": text} for text in question.split("<|image|>")]
    content = [texts[0], *(one for pair in zip(parts, texts[1:], strict=True) for one in pair)]
    prompt = engine.encode(placeholders)
    assert engine.encode([{"role": "user", "content": content}]).ids == prompt.ids
    assert with_placeholders(prompt.ids, engine.processor.image_token_id) == golden["ids"]
    inputs = {"input_ids": torch.tensor([prompt.ids]), "pixel_values": prompt.pixel_values}
    with torch.no_grad():
        output = engine.model(**inputs, output_hidden_states=True)
    torch.testing.assert_close(output.logits, cases[f"{case}.logits"], **TOLERANCE)
    last = cases[f"{case}.hidden.last"]
    torch.testing.assert_close(output.hidden_states[-1], last, **TOLERANCE)
    options = {"max_new_tokens": 24, "do_sample": False}
    answer = engine.model.generate(**inputs, **options)[0, len(prompt.ids) :].tolist()
    assert answer == golden["new_tokens"] == cases[f"{case}.new_tokens"][0].tolist()
    text = engine.processor.decode(answer, skip_special_tokens=True)
    assert engine.chat(placeholders, **options) == text.strip()
