"""Write a tiny model that answers with short words, or with short JSON strings.

::

    python make_model.py DIRECTORY

Clients need an answer and the end of a JSON string within a few tokens, not a correct answer. The
model is trained for a few seconds on texts without images. The script needs the environment of the
server.
"""

import random
import sys
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from owl2.processing.image_processing import Owl2ImageProcessor
from owl2.processing.labeling import encode_labeled
from owl2.processing.messages import parse_messages
from owl2.processing.processor import Owl2Processor
from owl2.processing.tokenizer import Owl2Tokenizer, train_tokenizer
from tests.tiny import make_model

ANSWERS = [
    "a red circle",
    "hello there",
    '{"setup": "why", "punchline": "so"}',
    '{"color": "red", "count": 2}',
    '{"name": "Ada", "age": 36}',
    '{"items": ["a", "b"]}',
]
QUESTIONS = ["Hello", "what is this?", "Return JSON.", "Tell me a joke about cats."]
STEPS = 250
ROWS = 12
ALPHABET = [*map(chr, range(33, 127)), *" " * 15]


def main(directory: Path) -> None:
    """Create the tokenizer, train the model, and save both."""
    directory.mkdir(parents=True, exist_ok=True)
    texts = [f"USER: {question} ASSISTANT: {a}" for question in QUESTIONS for a in ANSWERS]
    train_tokenizer([*texts, " ".join(ALPHABET)] * 3, directory / "tokenizer.model", 400)
    tokenizer = Owl2Tokenizer(directory / "tokenizer.model")
    model = make_model(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        max_position_embeddings=4096,
    )
    processor = Owl2Processor(Owl2ImageProcessor(8), tokenizer, num_image_tokens=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    chooser = random.Random(0)
    for step in range(STEPS):
        rows = [_sample(processor, chooser) for _ in range(ROWS)]
        ids = pad_sequence([row[0] for row in rows], batch_first=True)
        labels = pad_sequence([row[1] for row in rows], batch_first=True, padding_value=-100)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == STEPS - 1:
            print(f"step {step}: loss {loss.item():.2f}")
    model.save_pretrained(directory)
    processor.save_pretrained(directory)


def _sample(processor: Owl2Processor, chooser: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels of a question, often a random text, and an answer independent of it."""
    question = chooser.choice(QUESTIONS)
    if chooser.random() < 0.5:
        question = "a" + "".join(chooser.choices(ALPHABET, k=chooser.randrange(150)))
    answer = {"role": "assistant", "content": chooser.choice(ANSWERS)}
    messages = parse_messages([{"role": "user", "content": question}, answer])
    sample, _ = encode_labeled(processor, messages)
    ids, mask = torch.tensor(sample.ids), torch.tensor(sample.loss_mask)
    return ids, ids.masked_fill(~mask.bool(), -100)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
