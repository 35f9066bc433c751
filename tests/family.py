"""The golden checkpoints of the siblings of mPLUG-Owl2, see tests/golden/README.md."""

import functools
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

from owl2 import Owl2ForConditionalGeneration, Owl2Processor

FOLDER = Path(__file__).parent / "golden" / "family"
# By the name of the directory: the entry of the registry.
SIBLINGS = {"docowl1_5": "mplug_docowl", "docowl2": "mplug_docowl2", "mplug_owl2_1": "mplug_owl2_1"}
PROCESSORS = {
    "chat": {},
    "stage1": {"add_global_img": False},
    "plain": {"anchors": "grid_4", "add_textual_crop_indicator": False},
}


@dataclass(frozen=True)
class Case:
    """A prompt of a golden set.

    Attributes:
        expected: The values of the case by name.
    """

    sibling: str
    name: str
    prompt: str
    text: dict = field(repr=False)
    expected: dict[str, torch.Tensor] = field(repr=False)

    @property
    def id(self):
        return f"{self.sibling}-{self.name}"

    def processor(self):
        return load_processor(self.sibling, self.text.get("processor", "chat"))

    def messages(self):
        """The conversation, with its images before the question."""
        parts = [{"type": "image", "image": path} for path in self.images()]
        question = self.text.get("question", self.prompt[6:].removesuffix(" ASSISTANT:"))
        if "question" not in self.text:
            question = question.replace("<|image|>", "")
        return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]

    def images(self):
        names = self.text.get("pictures", [self.text.get("picture")])
        return [FOLDER / self.sibling / "images" / f"{name}.png" for name in names]

    def inputs(self):
        """The inputs of the model."""
        prompt = self.processor().encode(self.messages())
        inputs = {"input_ids": torch.tensor([prompt.ids])}
        if prompt.pixel_values is not None:
            inputs["pixel_values"] = prompt.pixel_values
        if prompt.image_grids is not None:
            inputs["image_grids"] = prompt.image_grids
        return inputs


@functools.cache
def read_text(sibling):
    return json.loads((FOLDER / sibling / "text.json").read_text(encoding="utf-8"))


@functools.cache
def load_cases(sibling):
    return load_file(FOLDER / sibling / "cases.safetensors")


@functools.cache
def load_processor(sibling, kind="chat"):
    return Owl2Processor.from_pretrained(FOLDER / sibling / "model", **PROCESSORS[kind])


@functools.cache
def load_model(sibling):
    """Shared by all tests, which must not modify it."""
    folder = FOLDER / sibling / "model"
    return Owl2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def make_cases():
    cases = []
    for sibling in SIBLINGS:
        for name, text in read_text(sibling)["cases"].items():
            values = {
                key.removeprefix(f"{name}."): value
                for key, value in load_cases(sibling).items()
                if key.startswith(f"{name}.")
            }
            cases.append(Case(sibling, name, text["prompt"], text, values))
    return cases


def with_placeholders(ids, processor):
    """Ids with one -200 for the K + 1 positions of an image."""
    marked, rest = [], list(ids)
    while rest:
        is_image = rest[0] == processor.image_token_id
        marked.append(-200 if is_image else rest[0])
        del rest[: processor.num_image_tokens if is_image else 1]
    return marked
