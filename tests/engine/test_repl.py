"""`owl2 chat`: one question, and the interactive chat with its commands."""

import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from owl2.cli.model_choices import CHOICES, SMALL_MODEL
from owl2.cli.repl import HELP, Repl, placeholder_note
from owl2.engine.load_model import ModelArgs
from owl2.errors import ErrorCode
from owl2.processing.messages import user_message
from owl2.processing.video import load_video
from tests.engine.conftest import ask, random_image
from tests.errors import raises_input_error
from tests.videos import make_video

OPTIONS = {"max_new_tokens": 6}


@pytest.fixture
def image_file(tmp_path):
    path = tmp_path / "an image.png"
    random_image(3).save(path)
    return path


def run_lines(engine, *lines, images=(), **settings):
    """The state and the output of a chat with these lines; exceptions are raised by `read`."""
    remaining, written = iter(lines), []

    def read(prompt):
        line = next(remaining, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    repl = Repl(engine, OPTIONS, list(images), read, written.append, **settings)
    repl.run()
    return repl, "".join(written)


# ------------------------------------------------------------------ one question


def test_one_question(run_cli, tiny_checkpoint, shared_engine, image_file):
    result = run_cli(
        *("chat", "--model", tiny_checkpoint, "--image", image_file, "--device", "cpu"),
        *("--dtype", "float32", "--max-new-tokens", 6, "what is this?"),
    )
    expected = shared_engine.chat(ask("what is this?", Image.open(image_file)), **OPTIONS)
    assert (result.exit_code, result.stdout) == (0, expected + "\n")


def test_one_question_of_an_image_and_a_placeholder(
    run_cli, tiny_checkpoint, shared_engine, image_file
):
    options = ("--image", image_file, "--device", "cpu", "--dtype", "float32")
    options += ("--max-new-tokens", 6)
    for question, note in (("", ""), ("<image> what?", "note: <image>")):
        result = run_cli("chat", "--model", tiny_checkpoint, *options, question)
        expected = shared_engine.chat(ask(question, Image.open(image_file)), **OPTIONS)
        assert (result.exit_code, result.stdout) == (0, expected + "\n")
        assert note in result.stderr
        assert bool(note) == ("note:" in result.stderr)


def test_image_positions_of_a_user_message():
    def parts(text, images):
        content = user_message(text, images)["content"]
        return [part.get("image") or part["text"] for part in content]

    assert parts("what?", ["a", "b"]) == ["a", "b", "what?"]
    expected = ["is ", "a", " like ", "b", "?"]
    assert parts("is <|image|> like <|image|>?", ["a", "b"]) == expected
    for images in ([], ["a", "b"]):
        with raises_input_error(ErrorCode.IMAGE_COUNT_MISMATCH, f"{len(images)} image"):
            user_message("<|image|> what?", images)


@pytest.mark.parametrize(
    ("question", "images"), [("", []), ("what?", ["none.png"])], ids=["question", "image"]
)
def test_input_is_checked_before_the_model_is_loaded(
    run_cli, tiny_checkpoint, monkeypatch, question, images
):
    monkeypatch.setattr(ModelArgs, "load_model", lambda *_: pytest.fail("the model was loaded"))
    options = [option for image in images for option in ("--image", image)]
    result = run_cli("chat", "--model", tiny_checkpoint, *options, question)
    assert result.exit_code == 2
    assert all(image in result.stderr for image in images)


# ------------------------------------------------------------------ the interactive chat


def test_the_chat_sends_earlier_turns(shared_engine):
    repl, output = run_lines(shared_engine, "what is this?", "and now?")
    first = shared_engine.chat(ask("what is this?"), **OPTIONS)
    history = [*ask("what is this?"), {"role": "assistant", "content": first}]
    second = shared_engine.chat([*history, *ask("and now?")], **OPTIONS)
    assert output == f"{first}\n{second}\n\n"
    assert len(repl.messages) == 4


def test_images_go_with_the_next_question(shared_engine, image_file):
    _, output = run_lines(
        shared_engine, f"/image {image_file}", f'/image "{image_file}"', "what?", "/quit", "more"
    )
    assert "(1 image for the next question)" in output
    assert "(2 images for the next question)" in output
    both = ask("what?", Image.open(image_file), Image.open(image_file))
    assert shared_engine.chat(both, **OPTIONS) in output
    repl, _ = run_lines(shared_engine, "what?", "and?", images=[random_image(3)])
    counts = [len(turn["content"]) for turn in repl.messages[::2]]
    assert counts == [2, 1]


def test_clear(shared_engine, image_file):
    repl, output = run_lines(shared_engine, "what?", f"/image {image_file}", "/clear")
    assert (repl.messages, repl.images) == ([], [])
    assert "(new conversation)" in output


def test_drop_removes_the_oldest_turns(shared_engine):
    repl, output = run_lines(shared_engine, "a", "b", "c", "/drop", "/drop 0", "/drop x")
    assert [turn["content"][0]["text"] for turn in repl.messages[::2]] == ["b", "c"]
    assert "(2 questions are left)" in output
    assert output.count("error: ") == 2
    repl, _ = run_lines(shared_engine, "a", "b", "/drop 5", "c")
    assert [turn["content"][0]["text"] for turn in repl.messages[::2]] == ["c"]
    assert shared_engine.chat(ask("c"), **OPTIONS) == repl.messages[1]["content"]


def test_a_conversation_beyond_the_context(shared_engine):
    question = "no " * 20
    lines = [question] * 3
    repl, output = run_lines(shared_engine, *lines)
    assert "/clear" in output
    assert "/drop" in output
    assert "too many" in output
    assert 2 <= len(repl.messages) < 6
    _, alone = run_lines(shared_engine, "no " * 200)
    assert "/clear" not in alone


def test_truncate_history_drops_the_oldest_turns(shared_engine):
    question = "no " * 20
    repl, output = run_lines(shared_engine, "what?", *[question] * 3, truncate_history=True)
    assert "error" not in output
    assert "turns are dropped)" in output
    used = shared_engine.processor.encode(repl.messages[:-1]).ids
    assert len(used) + OPTIONS["max_new_tokens"] <= shared_engine.context_length
    assert shared_engine.chat(repl.messages[:-1], **OPTIONS) == repl.messages[-1]["content"]
    repl, output = run_lines(shared_engine, "what?", "no " * 200, truncate_history=True)
    assert "too many" in output
    assert len(repl.messages) == 2  # the conversation is unchanged


@pytest.mark.parametrize("tag", ["<image>", "<IMAGE>", "<img>", "<video>", "<|image_1|>"])
def test_placeholders_of_other_models_are_pointed_out(shared_engine, image_file, tag):
    _, output = run_lines(shared_engine, f"/image {image_file}", f"{tag} what is this?")
    assert f"note: {tag} is sent as text" in output
    assert ("<|video|>" if tag == "<video>" else "<|image|>") in output
    answer = shared_engine.chat(ask(f"{tag} what is this?", Image.open(image_file)), **OPTIONS)
    assert answer in output
    for question in ("<|image|> what?", "is a < b?", "an image"):
        assert placeholder_note(question) == ""


def test_an_empty_line_sends_the_images_alone(shared_engine, image_file):
    repl, _ = run_lines(shared_engine, "", f"/image {image_file}", "", "", "and now?")
    answer = shared_engine.chat(ask("", Image.open(image_file)), **OPTIONS)
    assert [message["role"] for message in repl.messages] == ["user", "assistant"] * 2
    assert repl.messages[1]["content"] == answer
    assert not repl.images


def test_help_and_invalid_commands(shared_engine):
    _, output = run_lines(shared_engine, "/help", "/dance", "/image", "", "no")
    assert HELP in output
    assert output.count("error: ") == 2
    assert "/dance" in output
    assert shared_engine.chat(ask("no"), **OPTIONS) in output


def test_an_error_leaves_the_conversation_unchanged(shared_engine, tmp_path):
    repl, output = run_lines(
        shared_engine, "what?", f"/image {tmp_path}/none.png", "is <|image|> red?", "no " * 200
    )
    assert output.count("error: ") == 3
    assert "none.png" in output
    assert "too many" in output
    assert len(repl.messages) == 2


def test_ctrl_c_stops_the_answer_only(engine):
    steps = []

    def interrupt(text):
        steps.append(text)
        if len(steps) == 1:
            raise KeyboardInterrupt

    repl = Repl(engine, {"max_new_tokens": 60}, [], input, interrupt)
    repl.handle_line("what is this?")
    assert " (stopped)" in steps
    answer = repl.messages[1]["content"]
    assert answer == steps[0]
    repl.handle_line("and now?")
    assert len(repl.messages) == 4


def test_ctrl_c_at_the_prompt(shared_engine):
    _, output = run_lines(shared_engine, KeyboardInterrupt(), "no")
    assert "Ctrl-D" in output
    assert shared_engine.chat(ask("no"), **OPTIONS) in output


def test_ctrl_c_while_an_image_is_loaded_keeps_the_conversation(shared_engine, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("owl2.cli.repl.load_image", interrupt)
    repl, output = run_lines(shared_engine, "no", "/image http://slow/a.png", "yes")
    assert "Ctrl-D" in output
    assert [len(repl.messages), repl.images] == [4, []]


def test_an_empty_answer_is_not_stored(engine):
    engine.stream = lambda *_, **__: iter([])
    repl, output = run_lines(engine, "what?", images=[random_image(1)])
    assert "empty answer" in output
    assert repl.messages == []
    assert len(repl.images) == 1


# ------------------------------------------------------------------ videos


@pytest.fixture
def video_file(tmp_path):
    return make_video(tmp_path / "a video.mp4")


def test_one_question_about_a_video(
    run_cli, tiny_checkpoint, shared_engine, video_file, image_file
):
    """Images come first, then the frames."""
    options = ("--model", tiny_checkpoint, "--device", "cpu", "--dtype", "float32")
    options += ("--max-new-tokens", 6, "--video", video_file, "--num-frames", 3)
    frames = load_video(video_file, 3)
    result = run_cli("chat", *options, "what is this?")
    expected = shared_engine.chat([user_message("what is this?", frames)], **OPTIONS)
    assert (result.exit_code, result.stdout) == (0, expected + "\n")
    result = run_cli("chat", *options, "--image", image_file, "what?")
    message = user_message("what?", [Image.open(image_file), *frames])
    assert result.stdout == shared_engine.chat([message], **OPTIONS) + "\n"
    result = run_cli("chat", *options, "is <|video|> red?")
    message = user_message("is <|image|><|image|><|image|> red?", frames)
    assert result.stdout == shared_engine.chat([message], **OPTIONS) + "\n"


def test_default_number_of_frames(run_cli, tiny_checkpoint, shared_engine, video_file):
    options = ("--model", tiny_checkpoint, "--device", "cpu", "--dtype", "float32")
    result = run_cli("chat", *options, "--max-new-tokens", 6, "--video", video_file, "what?")
    expected = shared_engine.chat([user_message("what?", load_video(video_file, 8))], **OPTIONS)
    assert result.stdout == expected + "\n"


def test_too_many_frames_are_refused_before_weights_and_videos_are_read(
    run_cli, tiny_checkpoint, tmp_path
):
    checkpoint = tmp_path / "model"
    weights = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(tiny_checkpoint, checkpoint, ignore=weights)
    (tmp_path / "broken.gif").write_bytes(b"GIF89a")
    options = ("--video", tmp_path / "broken.gif", "--num-frames", 50)
    result = run_cli("chat", "--model", checkpoint, *options, "what?")
    assert result.exit_code == 2
    assert "maximum context length is 128" in result.stderr
    assert "50 images or frames" in " ".join(result.stderr.split())


@pytest.mark.parametrize("quote", ["", "'"])
def test_video_of_a_chat(shared_engine, video_file, image_file, quote):
    path = f"{quote}{video_file}{quote}"
    repl, output = run_lines(
        shared_engine, f"/video {path}", f"/image {image_file}", "what?", "yes?", "/quit"
    )
    frames = load_video(video_file, 8)
    first = user_message("what?", [Image.open(image_file), *frames])
    answer = {"role": "assistant", "content": shared_engine.chat([first], **OPTIONS)}
    second = shared_engine.chat([first, answer, user_message("yes?")], **OPTIONS)
    assert answer["content"] in output
    assert second in output
    assert "1 video for" in output
    assert (repl.videos, repl.images) == ([], [])


def test_video_commands_with_errors(shared_engine, tmp_path):
    repl, output = run_lines(shared_engine, "/video", f"/video {tmp_path / 'no.mp4'}", "/quit")
    assert output.count("error:") == 2
    assert "no.mp4" in output
    assert repl.videos == []


def test_names_of_models_are_complete_in_a_narrow_terminal(run_cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    listed = run_cli("chat", "hello?").stderr
    assert all(choice.model in listed for choice in CHOICES)


def test_without_a_model_the_models_are_listed(run_cli, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    listed = run_cli("chat", "hello?")
    assert (listed.exit_code, listed.stdout) == (2, "")
    for choice in CHOICES:
        assert choice.model in listed.stderr
    assert "make small-model" in listed.stderr and "--model" in listed.stderr
    # Billions of weights in 16 or 32 bits, and quantized.
    sizes = {
        line.split()[1]: [float(size) for size in re.findall(r"([\d.]+) GB", line)]
        for line in listed.stderr.splitlines()
        if " GB" in line and "/" in line
    }
    for model, billions in (("MAGAer13/mplug-owl2-llama2-7b", 8.2), ("mPLUG/DocOwl2", 8.56)):
        full, eight, four = sizes[model]
        assert full == pytest.approx(billions * (2 if full < 20 else 4), abs=0.1)
        assert four < eight < full / 1.7

    Path(SMALL_MODEL).parent.mkdir(parents=True)
    Path(SMALL_MODEL).symlink_to(tiny_checkpoint)
    again = run_cli("chat")
    assert again.exit_code == 2 and "make small-model" not in again.stderr
    [row] = [line for line in again.stderr.splitlines() if SMALL_MODEL in line]
    assert row.count("MB") == 3
