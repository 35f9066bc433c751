"""The prompts and lengths of the authors' evaluation scripts, to the token."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from owl2.engine.load_model import ModelArgs
from owl2.eval.evaluate import EvalConfig, evaluate
from owl2.eval.results import task_result
from owl2.eval.samples import limit_samples
from owl2.eval.task_config import task_configs
from owl2.eval.task_run import TaskRun, chat_format
from owl2.eval.tasks import find_tasks
from owl2.processing.default_templates import CHAT_TEMPLATES
from owl2.processing.image_processing import Owl2ImageProcessor
from owl2.processing.processor import Owl2Processor
from tests.eval.reading import FIXTURES, LETTER_REQUEST, REQUEST, by_id, response
from tests.processing.conftest import llama, llama_file  # noqa: F401 - fixtures

CAPTION = "Provide a one-sentence caption for the provided image."
# (task, id of a sample, text after "USER: <|image|>" and before " ASSISTANT:", a space follows)
PROMPTS = [
    ("vqav2", "1101001", "How many walls are there?" + REQUEST, True),
    ("okvqa", None, None, True),
    ("textvqa", "34602", "what does the sign say?" + REQUEST, True),
    ("gqa", None, None, True),
    ("vizwiz", None, None, True),
    ("pope_random", None, None, True),
    ("coco", "1101", CAPTION, True),
    ("flickr30k", "2201.jpg", CAPTION, True),
    ("mme", "posters/tt6605#2", "Is this a poster of a play? \n" + REQUEST.strip(), True),
    (
        "mmbench",
        "1000252",
        'The image has one color.\nIt is "warm".\nWhich of the two is true?\nA. It is cold.\n'
        "B. It is warm." + LETTER_REQUEST,
        False,
    ),
    (
        "seed_bench",
        "101669",
        "N/A\nHow many squares are there?\nA. One\nB. Two\nC. Three\nD. Four" + LETTER_REQUEST,
        False,
    ),
    ("q_bench", None, None, False),
    ("science_qa", None, None, False),
    ("mmmu", "validation_Accounting_1", None, True),
]


@pytest.fixture
def processor(llama):  # noqa: F811 - the fixture
    """Trained with a line break after the image and the system text of v1."""
    images = Owl2ImageProcessor(56)
    return Owl2Processor(images, llama, "v1", num_image_tokens=3, image_newline=True)


def run_of(name, **options):
    [task] = find_tasks(name)
    return TaskRun(name, task, task.data(FIXTURES, **options), [], [])


def text_of(processor, sample):
    return processor.apply_chat_template(sample.messages, add_generation_prompt=True)


@pytest.mark.parametrize(("name", "key", "text", "has_space"), PROMPTS)
def test_prompt_of_the_authors(processor, name, key, text, has_space):
    samples = by_id(name)
    sample = samples[key] if key else next(iter(samples.values()))
    run_of(name).set_chat_format(processor, chat_format(processor))
    prompt = text_of(processor, sample)
    assert prompt.endswith(" ASSISTANT: " if has_space else " ASSISTANT:")
    assert prompt.startswith("USER: <|image|>")
    if text is not None:
        assert prompt == f"USER: <|image|>{text} ASSISTANT:" + " " * has_space
    ids = processor.encode(sample.messages).ids
    assert (ids[-1] == processor.tokenizer.convert_tokens_to_ids("▁")) == has_space


def test_prompts_without_a_form_of_the_authors_are_those_of_the_checkpoint(processor):
    own = chat_format(processor)
    sample = next(iter(by_id("vqav2").values()))
    for run in (run_of("vqav2", prompts="plain"), run_of("vqav2", prompt="short")):
        run_of("vqav2").set_chat_format(processor, own)
        run.set_chat_format(processor, own)
        assert chat_format(processor) == own
    plain = run_of("vqav2", prompts="plain").data.prompt
    assert plain == "{question}\n" + REQUEST.strip()
    prompt = text_of(processor, sample)
    assert "USER: <|image|>\n" in prompt and not prompt.startswith("USER")
    run_of("xsum").set_chat_format(processor, own)
    assert chat_format(processor) == own


def test_checkpoint_with_another_chat_format_keeps_it(processor):
    processor.chat_template = "{% for m in messages %}Q: {{ m['content'] }}{% endfor %} A:"
    own = chat_format(processor)
    run_of("mme").set_chat_format(processor, own)
    assert chat_format(processor) == own
    processor.chat_template = CHAT_TEMPLATES["mplug_owl2"]


LENGTHS = {  # most and least new tokens
    **dict.fromkeys(("vqav2", "okvqa", "textvqa", "mme", "mmbench"), (10, 1)),
    **dict.fromkeys(("coco", "flickr30k"), (60, 8)),
    "mmmu": (20, 1),
}


def test_lengths_of_the_authors():
    configs = task_configs()
    found = {name: (configs[name].max_new_tokens, configs[name].min_new_tokens) for name in LENGTHS}
    assert found == LENGTHS
    assert run_of("coco").generation_kwargs == {
        "do_sample": False,
        "max_new_tokens": 60,
        "min_new_tokens": 8,
    }


def test_every_task_names_the_source_of_its_prompt():
    """The authors have scripts for VQA, captions, MME, MMBench, MMMU and documents only."""
    scripts = {}
    documents = [name for name, one in task_configs().items() if one.suite == "document"]
    for name, config in task_configs().items():
        assert {*config.sources} == {"prompt", "scoring"}, name
        if config.sources["prompt"].endswith(".py"):
            scripts[name] = config.sources["prompt"]
    assert scripts == {
        **dict.fromkeys(("vqav2", "okvqa", "textvqa"), "evaluate_vqa.py"),
        "coco": "that of Flickr30K in evaluate_caption.py",
        "flickr30k": "evaluate_caption.py",
        "mme": "evaluate_mme.py",
        "mmbench": "evaluate_mmbench.py",
        "mmmu": "evaluate_mmmu.py",
        **dict.fromkeys(documents, "docowl_benchmark_evaluate.py"),
    }
    assert task_configs()["seed_bench"].sources["prompt"].startswith("our choice")


@pytest.mark.parametrize(
    ("prompts", "end"), [("authors", " ASSISTANT: "), ("plain", " ASSISTANT:")]
)
def test_evaluation_uses_the_selected_prompts(prompts, end, tiny_checkpoint, tmp_path, plain):
    args = ModelArgs(str(tiny_checkpoint), "cpu", "float32")
    config = EvalConfig(args, tmp_path, "vqav2", data=FIXTURES, prompts=prompts)
    result = evaluate(config, plain)["tasks"]["vqav2"]
    assert result["generation"]["chat_format"].endswith(f"?{end}")
    assert '"prompt": "USER: ' in (tmp_path / "responses/vqav2.jsonl").read_text()


# ------------------------------------------------------------------ --limit


def test_limit_samples_all_categories_and_keeps_pairs_together():
    samples = [*by_id("mme").values()]
    chosen = limit_samples(samples, 28)
    assert len({sample.category for sample in chosen}) == 14
    for sample in chosen:
        pair = [s for s in chosen if s.metadata == sample.metadata]
        assert len(pair) == 2
    assert len(limit_samples(samples, 5)) == 5
    assert limit_samples(samples, None) == samples
    rounds = limit_samples([*by_id("mmbench").values()], 4)
    assert len({sample.metadata["question"] for sample in rounds}) == 1
    many = [SimpleNamespace(id=str(n), category="ab"[n > 7], metadata={}) for n in range(10)]
    assert [sample.id for sample in limit_samples(many, 6)] == ["0", "1", "2", "3", "8", "9"]


def test_limited_mme_has_no_result_of_the_paper():
    run = run_of("mme")
    run.responses = [response("Yes", "Yes", category="OCR", image="1")]
    run.conditions, run.scores = {}, run.task.metric.score(run.responses)
    assert task_result(run)["paper"] == {"perception": 1450.19}
    run.limit = 1
    assert task_result(run)["paper"] == {}


def test_documented_prompts_are_those_of_the_tasks():
    """One row of docs/evaluation.md for the tasks that share prompt, length and sources."""
    rows = {}
    for name, config in task_configs().items():
        if config.lm_eval is None and config.rating is None:
            least = f"{config.min_new_tokens} to " if config.min_new_tokens else ""
            space = {True: "yes", False: "no", None: "checkpoint"}[config.assistant_space]
            prompt = f"`{config.prompt}`".replace("\n", "\\n")
            length = f"{least}{config.max_new_tokens}"
            cells = (prompt, space, length, *config.sources.values())
            rows.setdefault(" | ".join(cells), []).append(f"`{name}`")
    text = (Path(__file__).parents[2] / "docs/evaluation.md").read_text(encoding="utf-8")
    for cells, names in rows.items():
        assert f"| {', '.join(names)} | {cells} |" in text


def test_every_scoring_task_is_documented():
    text = (Path(__file__).parents[2] / "docs/evaluation.md").read_text(encoding="utf-8")
    for name, config in task_configs().items():
        if config.rating is not None:
            assert f"| `{name}` | {config.rating.task} of {config.rating.kind}s |" in text
