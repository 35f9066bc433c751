from functools import partial

from owl2.data.datasets.registry import read_published
from owl2.errors import ErrorCode
from tests.data.datasets.published_files import put, split_skipped, summarize_all
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


def test_paths_of_the_mixture_of_llava_15_are_not_changed(tmp_path):
    turns = [("human", "<image>\nWhat?"), ("gpt", "A bus.")]
    names = ["coco/train2017/1.jpg", "vg/VG_100K_2/2.jpg", "ocr_vqa/images/3.jpg", "4.jpg"]
    text = row(("human", "Hi"), ("gpt", "Hello."))
    del text["image"]
    content = [*(row(*turns, image=name) for name in names), text | {"model": ""}]
    put(tmp_path, "llava_v1_5_mix665k.json", content)
    images = [image for image, _ in summarize_all(llava_instruct(tmp_path))]
    assert images == [*names[:3], "train2017/4.jpg", None]


def test_an_empty_answer_is_skipped_and_counted(tmp_path):
    good = row(("human", "<image>\nWhat?"), ("gpt", "A bus."))
    bad = row(("human", "<image>\nWhat?"), ("gpt", " "))
    put(tmp_path, "llava_instruct_150k.json", [bad, good, bad])
    samples, skipped = split_skipped(llava_instruct(tmp_path))
    assert len(samples) == 1
    assert skipped == {"conversations with an empty turn": 2}


def test_a_malformed_row_is_named(tmp_path):
    good = row(("human", "<image>\nWhat?"), ("gpt", "A bus."))
    path = put(tmp_path, "llava_instruct_150k.json", [good, row(("human", "?"), ("gpt", "!"))])
    with raises_input_error(ErrorCode.IMAGE_COUNT_MISMATCH, "0") as caught:
        list(llava_instruct(tmp_path))
    assert str(caught.value).startswith(f"{path}, row 2: ")
