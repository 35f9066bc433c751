"""On text, scores of an Owl2 model in lm-eval equal those of its plain language model.

The model `hf` of lm-eval evaluates the language model, and `owl2` a checkpoint that `owl2 init`
created from it, with the same dtype, batch size and tasks.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("lm_eval")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from owl2.eval.lm_eval import register
from owl2.train.init_model import init_checkpoint
from recipes.study.study import smollm2_file

HAMEXAM = Path("/usr/share/hamexam")  # a package of Debian
DOCS = Path(__file__).parents[3] / "docs"
SIZES = {
    "vision": {
        "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 16, "image_size": 8, "patch_size": 4,
    },
    "abstractor": {"num_hidden_layers": 1, "intermediate_size": 12, "num_learnable_queries": 2},
}  # fmt: skip
QUESTIONS = [
    {
        "question": "Which is a bird?",
        "choices": ["an owl", "a stone", "a fish", "a pen"],
        "gold": 0,
    },
    {"question": "How many are  two and two?", "choices": ["1", "2", "3", "4"], "gold": 3},
    {"question": "What\nis dark?", "choices": ["noon", "a lamp", "night", "the sun"], "gold": 2},
]
TEXTS = ["An owl sat on a post.\n\nIt was   night, 12:30.", "Où est le hibou? 在这里。", "a " * 150]


@pytest.fixture
def tasks(tmp_path):
    """Writes three tasks: four options by letter and by text, and perplexity."""

    def write(questions, texts):
        folder = tmp_path / "tasks"
        folder.mkdir()
        for name, rows in (("q", questions), ("t", [{"text": text} for text in texts])):
            (folder / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
        common = {"dataset_path": "json", "test_split": "test", "metadata": {"version": 1.0}}
        with_options = "{% for c in choices %}{{ 'ABCD'[loop.index0] }}. {{ c }}\n{% endfor %}"
        choice = {
            **common,
            "dataset_kwargs": {"data_files": {"test": str(folder / "q.json")}},
            "output_type": "multiple_choice",
            "doc_to_target": "gold",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        }
        letters = {
            "doc_to_text": f"{{{{question}}}}\n{with_options}Answer:",
            "doc_to_choice": list("ABCD"),
        }
        words = {"doc_to_text": "Question: {{question}}\nAnswer:", "doc_to_choice": "choices"}
        perplexity = {
            **common,
            "dataset_kwargs": {"data_files": {"test": str(folder / "t.json")}},
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        }
        for name, config in (
            ("by_letter", choice | letters), ("by_content", choice | words), ("by_text", perplexity)
        ):  # fmt: skip
            text = yaml.safe_dump({"task": name, **config}, allow_unicode=True)
            (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
        return folder

    return write


def evaluate(model, directory, folder, names, monkeypatch, batch_size):
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    results = simple_evaluate(
        model,
        model_args={"pretrained": str(directory), "dtype": "float32"},
        tasks=list(names),
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        batch_size=batch_size,
        device="cpu",
        bootstrap_iters=0,
    )
    answers = {
        name: {sample["doc_id"]: sample["resps"] for sample in results["samples"][name]}
        for name in names
    }
    scores = {
        name: {key: value for key, value in found.items() if isinstance(value, float)}
        for name, found in results["results"].items()
    }
    assert all(scores.values())
    return scores, answers


@pytest.fixture(scope="module", autouse=True)
def registered():
    register()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A random LLaMA with a tokenizer, and an Owl2 checkpoint with its weights."""
    root = tmp_path_factory.mktemp("small")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|endoftext|>", "<|im_start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*TEXTS, *(row["question"] for row in QUESTIONS)], trainer)
    ends = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends).save_pretrained(root / "plain")
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=330,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,  # shorter than the longest text: windows
            tie_word_embeddings=True,
            initializer_range=0.3,
        )
    ).save_pretrained(root / "plain")
    (root / "sizes.yaml").write_text(yaml.safe_dump(SIZES))
    init_checkpoint(str(root / "plain"), "fresh", root / "owl2", config=root / "sizes.yaml")
    return root


@pytest.mark.parametrize("batch_size", [1, 3])
def test_scores_of_a_small_model_are_equal(small, tasks, monkeypatch, batch_size):
    folder = tasks(QUESTIONS, TEXTS)
    names = ("by_letter", "by_content", "by_text")
    plain = evaluate("hf", small / "plain", folder, names, monkeypatch, batch_size)
    found = evaluate("owl2", small / "owl2", folder, names, monkeypatch, batch_size)
    assert found == plain
    numbers = [float(option[0][0]) for option in plain[1]["by_content"][0]]
    assert len(set(numbers)) == 4, "otherwise equality is trivial"


@pytest.mark.slow
def test_command_line(small, tasks, tmp_path):
    """The options of lm-eval work; an unknown argument exits with 2."""
    folder = tasks(QUESTIONS, TEXTS)
    command = [
        *(sys.executable, "-m", "owl2.eval.lm_eval", "--model", "owl2", "--device", "cpu"),
        *("--tasks", "by_letter", "--include_path", str(folder), "--batch_size", "2"),
        *("--num_fewshot", "1", "--apply_chat_template", "--fewshot_as_multiturn"),
        *("--output_path", str(tmp_path / "out"), "--log_samples", "--model_args"),
    ]

    def run(arguments):
        environment = {**os.environ, "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
        return subprocess.run(
            [*command, arguments], env=environment, capture_output=True, text=True, timeout=300
        )

    done = run(f"pretrained={small / 'owl2'},dtype=float32")
    assert done.returncode == 0, done.stderr
    [results] = (tmp_path / "out").rglob("results_*.json")
    assert "acc,none" in json.loads(results.read_text())["results"]["by_letter"]
    [samples] = (tmp_path / "out").rglob("samples_*.jsonl")
    arguments = json.loads(samples.read_text().splitlines()[0])["arguments"]
    prompt = arguments["gen_args_0"]["arg_0"]
    assert prompt.startswith("USER: ") and prompt.endswith("Answer: ASSISTANT:")
    assert prompt.count("ASSISTANT:") == 2

    done = run(f"pretrained={small / 'owl2'},dytpe=float32")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: unknown argument in model_args")
    assert "dytpe" in done.stderr.splitlines()[-1]


# ------------------------------------------------------------------ the real one


def hamexam():
    """The package's questions: "ID (LETTER) ...", the question, four lines "A. ..."."""
    for path in sorted(HAMEXAM.glob("[TGE]/[TGE]*")):
        first, *lines = path.read_text(encoding="utf-8").strip().splitlines()
        letter = re.match(r"\w+ \(([ABCD])\)", first)
        assert letter is not None, path
        options = [line[3:] for line in lines[-4:]]
        assert [line[:2] for line in lines[-4:]] == ["A.", "B.", "C.", "D."], path
        question = " ".join(lines[:-4])
        yield {"question": question, "choices": options, "gold": "ABCD".index(letter[1])}


@pytest.mark.slow
@pytest.mark.skipif(not HAMEXAM.is_dir(), reason="apt-get install hamexam: Debian's questions")
def test_scores_of_smollm2_are_equal(tasks, monkeypatch, tmp_path):
    from owl2.checkpoints.from_backbones import load_llm
    from owl2.train.init_model import load_tokenizer

    file = smollm2_file()
    load_llm(file).save_pretrained(tmp_path / "plain")
    load_tokenizer(file).save_pretrained(tmp_path / "plain")
    (tmp_path / "sizes.yaml").write_text(yaml.safe_dump(SIZES))
    init_checkpoint(str(file), "fresh", tmp_path / "owl2", config=tmp_path / "sizes.yaml")
    questions = list(hamexam())
    assert len(questions) == 1587
    # All of them take half an hour on a core: OWL2_HAMEXAM_QUESTIONS=1587.
    count = int(os.environ.get("OWL2_HAMEXAM_QUESTIONS", "100"))
    documents = [path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md"))]
    folder = tasks(questions[:: -(-len(questions) // count)], [text[:4000] for text in documents])
    names = ("by_letter", "by_text")
    plain = evaluate("hf", tmp_path / "plain", folder, names, monkeypatch, 8)
    found = evaluate("owl2", tmp_path / "owl2", folder, names, monkeypatch, 8)
    print(json.dumps(plain[0]))
    assert found == plain
    assert plain[0]["by_text"]["bits_per_byte,none"] < 2, "a trained language model"
