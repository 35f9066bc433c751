"""Helpers for tests of adapters: the smallest LoRA, models in evaluation mode, questions."""

from owl2.model.modeling import Owl2ForConditionalGeneration

LORA = {"r": 2, "lora_alpha": 4.0}


def load(folder, **options):
    return Owl2ForConditionalGeneration.from_pretrained(folder, **options).eval()


def ask(question, image=None):
    parts = [{"type": "text", "text": question}]
    if image is not None:
        parts.insert(0, {"type": "image", "path": str(image)})
    return [{"role": "user", "content": parts}]
