"""The terminal: one question, and a conversation with its commands."""

import io

import pytest
from PIL import Image

from owl2.cli.repl import HELP, Conversation, ask
from owl2.engine.load_model import ModelArgs
from owl2.errors import InputError
from owl2.processing.chat_template import user_message
from tests.engine.conftest import ask as one_turn
from tests.engine.conftest import image

OPTIONS = {"max_new_tokens": 6}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "an image.png"
    image(3).save(path)
    return path


def talk(engine, *lines, images=(), **options):
    """A conversation of these lines (an exception is raised instead of a line), and its output."""
    waiting, written = iter(lines), []

    def read(prompt):
        line = next(waiting, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    conversation = Conversation(engine, OPTIONS | options, list(images), read, written.append)
    conversation.run()
    return conversation, "".join(written)


# ------------------------------------------------------------------ one question


def test_one_question(tiny_checkpoint, shared_engine, file):
    settings = ModelArgs(str(tiny_checkpoint), device="cpu")
    out = io.StringIO()
    ask(settings, "what is this?", [str(file)], OPTIONS, out)
    expected = shared_engine.chat(one_turn("what is this?", Image.open(file)), **OPTIONS)
    assert out.getvalue() == expected + "\n"


def test_images_stand_before_the_question_or_where_it_says():
    turn = user_message("what?", ["a", "b"])
    kinds = [part.get("image") or part["text"] for part in turn["content"]]
    assert kinds == ["a", "b", "what?"]
    turn = user_message("is <|image|> like <|image|>?", ["a", "b"])
    kinds = [part.get("image") or part["text"] for part in turn["content"]]
    assert kinds == ["is ", "a", " like ", "b", "?"]
    for text, images in (("<|image|> what?", []), ("<|image|> what?", ["a", "b"])):
        with pytest.raises(InputError, match=f"1 .* for {len(images)} image"):
            user_message(text, images)


def test_faults_are_found_before_the_weights_are_read(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(ModelArgs, "load_model", lambda *_: pytest.fail("the model was loaded"))
    settings = ModelArgs(str(tiny_checkpoint))
    for question, images in (("", []), ("what?", [str(tmp_path / "none.png")])):
        with pytest.raises(InputError):
            ask(settings, question, images, OPTIONS)


# ------------------------------------------------------------------ a conversation


def test_a_conversation_remembers(shared_engine):
    conversation, shown = talk(shared_engine, "what is this?", "and now?")
    first = shared_engine.chat(one_turn("what is this?"), **OPTIONS)
    history = [*one_turn("what is this?"), {"role": "assistant", "content": first}]
    second = shared_engine.chat([*history, *one_turn("and now?")], **OPTIONS)
    assert shown == f"{first}\n{second}\n\n"
    assert len(conversation.messages) == 4


def test_images_go_with_the_next_question(shared_engine, file):
    _, shown = talk(shared_engine, f"/image {file}", f'/image "{file}"', "what?", "/quit", "more")
    assert "(1 image for the next question)" in shown
    assert "(2 images for the next question)" in shown
    both = one_turn("what?", Image.open(file), Image.open(file))
    assert shared_engine.chat(both, **OPTIONS) in shown
    conversation, _ = talk(shared_engine, "what?", "and?", images=[image(3)])
    counts = [len(turn["content"]) for turn in conversation.messages[::2]]
    assert counts == [2, 1], "the first question has the image, the second none"


def test_clear_forgets(shared_engine, file):
    conversation, shown = talk(shared_engine, "what?", f"/image {file}", "/clear")
    assert (conversation.messages, conversation.images) == ([], [])
    assert "(a new conversation)" in shown


def test_help_and_wrong_commands(shared_engine):
    _, shown = talk(shared_engine, "/help", "/dance", "/image", "", "no")
    assert HELP in shown
    assert "error: there is no command /dance; /help lists them" in shown
    assert "error: /image needs a file" in shown
    assert shared_engine.chat(one_turn("no"), **OPTIONS) in shown, "errors must not end it"


def test_an_error_leaves_the_conversation_as_it_was(shared_engine, tmp_path):
    conversation, shown = talk(
        shared_engine, "what?", f"/image {tmp_path}/none.png", "is <|image|> red?", "no " * 200
    )
    assert shown.count("error: ") == 3
    assert "none.png" in shown
    assert "too many" in shown
    assert len(conversation.messages) == 2


def test_ctrl_c_stops_the_answer_only(engine):
    steps = []

    def interrupt(text):
        steps.append(text)
        if len(steps) == 1:
            raise KeyboardInterrupt

    conversation = Conversation(engine, {"max_new_tokens": 60}, [], input, interrupt)
    conversation.take("what is this?")
    assert " (stopped)" in steps
    answer = conversation.messages[1]["content"]
    assert answer == steps[0]
    conversation.take("and now?")
    assert len(conversation.messages) == 4


def test_ctrl_c_at_the_prompt(shared_engine):
    _, shown = talk(shared_engine, KeyboardInterrupt(), "no")
    assert "Ctrl-D" in shown
    assert shared_engine.chat(one_turn("no"), **OPTIONS) in shown


def test_no_answer_is_no_round(engine):
    engine.stream = lambda *_, **__: iter([])
    conversation, shown = talk(engine, "what?", images=[image(1)])
    assert "no answer" in shown
    assert conversation.messages == []
    assert len(conversation.images) == 1
