"""The user's words for each kind of data, and messages made of them (SPEC 1.5).

As in the authors' training on LLaVA-style JSON, an image comes first, then a line break, then the
words.
"""

from collections.abc import Iterable, Sequence

from owl2.data.sample import Message

VQA_PROMPT = "{question}\nAnswer the question using a single word or phrase."
CHOICE_REQUEST = "Answer with the option's letter from the given choices directly."
CAPTION_PROMPT = "Provide a one-sentence caption for the provided image."

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

Pair = tuple[str, str]  # what the user says, what the assistant answers


def short_question(question: str) -> str:
    """The question, with the request for a short answer; a blank one stays blank."""
    return VQA_PROMPT.replace("{question}", question) if question else ""


def choice_question(question: str, options: Sequence[str]) -> str:
    """The question with its options as lines "A. ...", and the request for a letter."""
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([question, *lines, CHOICE_REQUEST])


def about_image(image: str, pairs: Iterable[Pair]) -> list[Message]:
    """A conversation about one image, which comes at the start; `image`: its path."""
    messages: list[Message] = []
    for words, answer in pairs:
        parts: list[Message] = [{"type": "text", "text": words}]
        if not messages:
            parts = [{"type": "image", "path": image}, {"type": "text", "text": f"\n{words}"}]
        messages.append({"role": "user", "content": parts})
        messages.append({"role": "assistant", "content": answer})
    return messages


def image_and_text(image: str, text: str) -> list[Message]:
    """An image-text pair of pre-training: no words but the text itself."""
    return [
        {"role": "user", "content": [{"type": "image", "path": image}]},
        {"role": "assistant", "content": text},
    ]
