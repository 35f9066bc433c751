"""The same conversation has the same ids in training, chat, `Engine`, the server and evaluation."""

import asyncio
import json

import pytest
from PIL import Image

from owl2.data.json_dataset import JsonDataset
from owl2.eval.tasks import find_tasks
from owl2.processing.messages import user_message
from owl2.processing.processor import Owl2Processor
from owl2.serve.protocol import ChatCompletionRequest
from tests.serve.images import data_uri, encode
from tests.serve.running import request_images

QUESTION = "what is this?"
# System text, number of images, question, and the text of the user turn for the model.
CONVERSATIONS = [
    ("", 1, QUESTION, f"<|image|>\n{QUESTION}"),
    ("", 2, QUESTION, f"<|image|><|image|>\n{QUESTION}"),
    ("", 3, QUESTION, f"<|image|><|image|><|image|>\n{QUESTION}"),
    ("", 1, "", "<|image|>"),
    ("", 2, "", "<|image|><|image|>"),
    ("yes", 1, QUESTION, f"<|image|>\nyes\n{QUESTION}"),
    ("yes", 2, QUESTION, f"<|image|><|image|>\nyes\n{QUESTION}"),
    ("yes", 1, "", "<|image|>\nyes\n"),
    ("yes", 2, "", "<|image|><|image|>\nyes\n"),
    ("yes", 0, QUESTION, f"yes\n{QUESTION}"),
]


@pytest.fixture(scope="module")
def processor(tiny_checkpoint):
    return Owl2Processor.from_pretrained(tiny_checkpoint, image_newline=True)


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / f"{index}.png" for index in range(3)]
    for index, path in enumerate(paths):
        Image.new("RGB", (8, 8), (index * 90, 0, 0)).save(path)
    return paths


def training_ids(processor, row, directory):
    """The ids of a row before its answer."""
    file = directory / "rows.json"
    file.write_text(json.dumps([row]))
    [sample] = JsonDataset(file)
    encoded = processor.for_training(sample.messages)
    first = (encoded["labels"][0] != -100).nonzero()[0].item()
    return encoded["input_ids"][0, :first].tolist()


def rows(system, images, question):
    """The conversation in several formats of rows, with its placeholders on one line or several."""
    for placeholder in ("<image>\n", "<image> ", "<image>"):
        text = placeholder * len(images) + question
        common = {"image": images} | ({"system": system} if system else {})
        turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "red"}]
        yield common | {"conversations": turns}
        turns = [{"role": "user", "content": text}, {"role": "assistant", "content": "red"}]
        yield common | {"messages": turns}
        yield common | {"query": text, "response": "red"}


def server_messages(processor, messages, images):
    async def run():
        reader = request_images(processor.image_processor)
        try:
            return await reader.messages(ChatCompletionRequest.model_validate(fields).messages)
        finally:
            reader.decoder.close()

    *system, user = messages
    urls = [{"type": "image_url", "image_url": {"url": image}} for image in images]
    content = [*urls, *(part for part in user["content"] if part["type"] == "text")]
    fields = {"model": "m", "messages": [*system, {"role": "user", "content": content}]}
    return asyncio.run(run())


@pytest.mark.parametrize(("system", "count", "question", "text"), CONVERSATIONS)
def test_a_conversation_has_the_ids_of_training(
    processor, files, tmp_path, system, count, question, text
):
    paths = [str(path) for path in files[:count]]
    first = [{"role": "system", "content": system}] if system else []
    chat = [*first, user_message(question, paths)]
    rendered = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert rendered == f"USER: {text} ASSISTANT:"
    expected = list(processor.encode(chat).ids)

    for row in rows(system, paths, question):
        assert training_ids(processor, row, tmp_path) == expected, row
    for placeholder in ("<|image|>\n", "<|image|> "):
        typed = user_message(placeholder * count + question, paths)
        assert list(processor.encode([*first, typed]).ids) == expected
    images = [data_uri(encode(Image.open(path))) for path in paths]
    assert list(processor.encode(server_messages(processor, chat, images)).ids) == expected
    if question and not system:
        file = tmp_path / "mine.jsonl"
        file.write_text(json.dumps({"image": paths, "question": question, "answer": "red"}))
        [task] = find_tasks(str(file))
        [sample], _ = task.read(task.data(None))
        assert list(processor.encode(sample.messages).ids) == expected


def test_text_between_images_keeps_their_positions(processor, files, tmp_path):
    paths = [str(path) for path in files[:2]]
    row = next(iter(rows("", paths, "")))
    row["conversations"][0]["value"] = "yes <image>\nno <image>\nwhat?"
    chat = [user_message("yes <|image|>\nno <|image|>\nwhat?", paths)]
    assert training_ids(processor, row, tmp_path) == list(processor.encode(chat).ids)
    assert processor.apply_chat_template(chat) == "USER: yes <|image|>\nno <|image|>\nwhat?"
