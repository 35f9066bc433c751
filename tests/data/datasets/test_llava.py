from functools import partial

from owl2.data.datasets.registry import read_published
from owl2.errors import ErrorCode
from tests.data.datasets.published_files import put, summarize_all
from tests.errors import raises_input_error

llava_instruct = partial(read_published, "llava_instruct")


def row(*turns: tuple[str, str], image: str = "000000033471.jpg") -> dict:
    return {
        "id": image[:12],
        "image": image,
        "conversations": [{"from": name, "value": text} for name, text in turns],
    }


def test_the_image_comes_first(tmp_path):
    content = [
        row(
            ("human", "<image>\nWhat are the colors of the bus?"),
            ("gpt", "The bus is white and red."),
            ("human", "What feature is seen?"),
            ("gpt", "An advertisement."),
        ),
        row(("human", "Describe it.\n<image>"), ("gpt", "A bus."), image="000000052846.jpg"),
    ]
    put(tmp_path, "llava_instruct_150k.json", content)
    assert summarize_all(llava_instruct(tmp_path)) == [
        (
            "train2017/000000033471.jpg",
            [
                ("<|image|>\nWhat are the colors of the bus?", "The bus is white and red."),
                ("What feature is seen?", "An advertisement."),
            ],
        ),
        ("train2017/000000052846.jpg", [("<|image|>\nDescribe it.", "A bus.")]),
    ]


def test_a_malformed_row_is_named(tmp_path):
    good = row(("human", "<image>\nWhat?"), ("gpt", "A bus."))
    path = put(tmp_path, "llava_instruct_150k.json", [good, row(("human", "?"), ("gpt", "!"))])
    with raises_input_error(ErrorCode.IMAGE_COUNT_MISMATCH, "0") as caught:
        list(llava_instruct(tmp_path))
    assert str(caught.value).startswith(f"{path}, row 2: ")
