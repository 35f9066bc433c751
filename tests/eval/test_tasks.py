import pytest

from owl2.data.datasets.easy_vqa import pictures
from owl2.errors import InputError
from owl2.eval.scoring import EXACT_MATCH, normalise
from owl2.eval.tasks import TASKS, find_tasks, full_prompt, without_pictures

easy_vqa = TASKS["easy_vqa"]


@pytest.fixture(scope="module")
def questions():
    return easy_vqa.read("Q: {question}")


def test_all_questions_of_the_test_split_and_no_others(questions):
    asked = {question.text for picture in pictures("test") for question in picture.questions}
    assert len(questions) == 9673
    assert {question.text for question in questions} == asked
    assert len({question.id for question in questions}) == len(questions)
    assert all(question.id.startswith("easy_vqa/test#") for question in questions)


def test_a_question_is_asked_with_its_picture_and_without_its_answer(questions):
    for question in questions[::500]:
        [turn] = question.messages
        image, words = turn["content"]
        assert turn["role"] == "user"
        assert "/test/" in image["path"]
        assert words["text"] == f"Q: {question.text}"


def test_kinds(questions):
    kinds = {question.expected[0]: question.kind for question in questions}
    assert len(kinds) == 13
    assert kinds["circle"] == "shape"
    assert kinds["teal"] == "colour"
    assert kinds["no"] == "yes or no"


def test_blind_messages_have_the_words_only():
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "path": "a"}, {"type": "text", "text": "b"}],
        },
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "<|image|>d"},
    ]
    blind = without_pictures(messages)
    assert blind[0]["content"] == [{"type": "text", "text": "b"}]
    assert [message["content"] for message in blind[1:]] == ["c", "d"]
    assert len(messages[0]["content"]) == 2  # those given are as they were


def test_names():
    assert find_tasks(" easy_vqa, easy_vqa,") == [easy_vqa]
    with pytest.raises(InputError, match=r"'easy_vq' is no task\. Do you mean 'easy_vqa'"):
        find_tasks("easy_vqa,easy_vq")
    with pytest.raises(InputError, match="No task is named"):
        find_tasks(",")


def test_prompts():
    assert full_prompt(easy_vqa, None).endswith("using a single word or phrase.")
    assert full_prompt(easy_vqa, "short") == "{question}"
    assert full_prompt(easy_vqa, "Say: {question}") == "Say: {question}"
    with pytest.raises(InputError, match="question"):
        easy_vqa.read("no place for it")


@pytest.mark.parametrize("answer", ["red", " Red", "RED.", "red .", "\nred\n"])
def test_right_answers(answer):
    assert EXACT_MATCH.is_right(answer, ("blue", "red"))


@pytest.mark.parametrize("answer", ["", "reddish", "red circle", "red..", "re d", "green"])
def test_wrong_answers(answer):
    assert not EXACT_MATCH.is_right(answer, ("blue", "red"))


def test_both_sides_are_normalised():
    assert normalise(" A Dog. ") == "a dog"
    assert EXACT_MATCH.is_right("a dog", ["A Dog."])
