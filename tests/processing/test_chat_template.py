"""Messages are checked, and written by a template as SPEC 1.5 has it."""

from pathlib import Path

import pytest

from owl2.errors import InputError
from owl2.processing.chat_template import (
    DEFAULT_CHAT_TEMPLATE,
    has_variable,
    parse_messages,
    render,
    render_with_answers,
    validate_prompt,
)
from tests.processing.samples import CHATML, ask

EOS = {"eos_token": "</s>"}
USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello."}

PARTS_ONLY = """\
{%- for m in messages -%}{{ m.role + ': ' }}{%- for part in m.content -%}
{%- if part.type == 'image' -%}[<|image|>]{%- else -%}{{ part.text }}{%- endif -%}
{%- endfor -%}{%- endfor -%}
"""


def write(messages, template=DEFAULT_CHAT_TEMPLATE, **options) -> str:
    return render(parse_messages(messages), template, EOS, **options)


def test_golden_prompts(golden_text):
    roles = {"human": "user", "gpt": "assistant"}
    for case in golden_text["cases"]:
        messages = [
            {"role": roles[turn["from"]], "content": turn["value"]} for turn in case["conversation"]
        ]
        assert write(messages) == case["full_prompt"]
        assert write(messages[:-1], add_generation_prompt=True) == case["open_prompt"]


def test_an_answer_is_its_space_its_words_and_the_end():
    conversation = parse_messages([USER, ANSWER, USER, {"role": "assistant", "content": " x\n"}])
    text, spans = render_with_answers(conversation, DEFAULT_CHAT_TEMPLATE, EOS)
    assert text == "USER: Hi ASSISTANT: Hello.</s>USER: Hi ASSISTANT:  x\n</s>"
    assert [text[begin:end] for begin, end in spans] == [" Hello.</s>", "  x\n</s>"]


def test_nothing_is_stripped_and_parts_are_joined_with_nothing():
    messages = ask("  a \n", object(), "\n b ", "c")
    assert write(messages, add_generation_prompt=True) == ("USER:   a \n<|image|>\n b c ASSISTANT:")


def test_an_unopened_turn_and_a_continued_one():
    assert write([USER]) == "USER: Hi"
    assert write([USER, ANSWER], continue_final_message=True) == "USER: Hi ASSISTANT: Hello."
    with pytest.raises(InputError, match="needs an assistant turn"):
        write([USER], continue_final_message=True)
    with pytest.raises(InputError, match="last message is an answer"):
        write([USER, ANSWER], add_generation_prompt=True)


def test_system_prompt_is_the_templates_matter():
    messages = [{"role": "system", "content": "Be kind."}, USER]
    with pytest.raises(InputError, match="no system prompt; put that text at the start"):
        write(messages)
    assert write(messages, CHATML).startswith("<|im_start|>system\nBe kind.<|im_end|>\n")


def test_templates_for_strings_and_for_parts_both_work():
    messages = ask(object(), "Hi")
    assert write(messages, CHATML) == "<|im_start|>user\n<|image|>Hi<|im_end|>\n"
    assert write(messages, PARTS_ONLY) == "user: [<|image|>]Hi"
    assert write([USER], PARTS_ONLY) == "user: Hi"


def test_a_template_that_marks_no_answers_is_refused_for_training_only():
    template = DEFAULT_CHAT_TEMPLATE.replace("{%- generation -%}", "")
    template = template.replace("{%- endgeneration -%}", "")
    assert write([USER, ANSWER], template).endswith("Hello.</s>")
    with pytest.raises(InputError, match=r"put {% generation %} before"):
        render_with_answers(parse_messages([USER, ANSWER]), template, EOS)


def test_template_errors_are_the_users():
    with pytest.raises(InputError, match="cannot write these messages"):
        write([USER], "{{ raise_exception('no!') }}")
    with pytest.raises(InputError, match=r"cannot write these messages: division by zero"):
        write([USER], "{{ 1/0 }}")
    with pytest.raises(InputError, match="cannot write these messages"):
        write([USER], "{% for %}")


def test_variables_of_a_template():
    assert has_variable("{% if thinking %}a{% endif %}", "thinking")
    assert not has_variable("thinking {{ other }}", "thinking")
    assert write([USER], "{{ mood }}: {{ messages[0].content }}", mood="good") == "good: Hi"


def test_images_in_all_forms_and_in_order():
    forms = [
        ({"type": "image", "image": 1}, 1),
        ({"type": "image", "path": "a.png"}, Path("a.png")),
        ({"type": "image", "url": "https://x/a.png"}, "https://x/a.png"),
        ({"type": "image", "base64": "QUJD"}, "data:;base64,QUJD"),
        ({"type": "image", "base64": "data:image/png;base64,QUJD"}, "data:image/png;base64,QUJD"),
        ({"type": "image_url", "image_url": {"url": "https://x/b.png"}}, "https://x/b.png"),
        ({"type": "image_url", "image_url": "https://x/c.png"}, "https://x/c.png"),
        ({"type": "image", "image": None, "url": "https://x/d.png"}, "https://x/d.png"),
    ]
    conversation = parse_messages([{"role": "user", "content": [part for part, _ in forms]}])
    assert list(conversation.images) == [source for _, source in forms]
    assert conversation.is_open
    assert parse_messages([{"role": "user", "content": [{"type": "image"}]}]).images == ()


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "empty"),
        ("Hi", "list of .* not a str"),
        (USER, "not a dict"),
        (None, "not None"),
        ([["user", "Hi"]], r"messages\[0\] must be a dict"),
        ([{"role": "user"}], r"messages\[0\] must be a dict with 'role' and 'content'"),
        ([{"role": "human", "content": "Hi"}], "role 'human'; roles are"),
        ([ANSWER], "'assistant' where 'user' is due"),
        ([USER, USER], r"messages\[1\] has the role 'user' where 'assistant' is due"),
        ([USER, {"role": "system", "content": "x"}], "'system' where 'assistant'"),
        ([{"role": "system", "content": "x"}], "add a user turn"),
        ([{"role": "user", "content": "  "}], r"messages\[0\] \(user\) is empty"),
        ([{"role": "user", "content": []}], "is empty"),
        ([USER, {"role": "assistant", "content": ""}], r"messages\[1\] \(assistant\) is empty"),
        ([{"role": "user", "content": None}], "must be a text or a list of parts, not None"),
        ([{"role": "user", "content": 5}], "not a int"),
        ([{"role": "user", "content": ["Hi"]}], "part 0 must be a dict"),
        ([{"role": "user", "content": [{"type": "text"}]}], "must hold a string under 'text'"),
        ([{"role": "user", "content": [{"type": "text", "text": 3}]}], "must hold a string"),
        ([{"role": "user", "content": [{"type": "video", "video": "a"}]}], "as its frames"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "type 'audio'; types are"),
        ([{"role": "user", "content": [{"type": "image", "url": 7}]}], "'url' must be a string"),
        (
            [{"role": "user", "content": [{"type": "image", "url": "a", "path": "b"}]}],
            "more than once, as url and path",
        ),
        ([USER, {"role": "assistant", "content": "<|image|>"}], "only user turns can"),
        ([USER, {"role": "assistant", "content": [{"type": "image"}]}], "only user turns can"),
    ],
)
def test_bad_messages_are_named(messages, message):
    with pytest.raises(InputError, match=message):
        parse_messages(messages)


@pytest.mark.parametrize("text", ["", " \n", "<|image|>", "<|image|>\n"])
def test_an_empty_question(text):
    with pytest.raises(InputError, match="question is empty"):
        validate_prompt(ask(object(), text))


def test_a_question():
    validate_prompt([USER])
    validate_prompt(ask(object(), "What is it?"))
    with pytest.raises(InputError, match="answer already"):
        validate_prompt([USER, ANSWER])
