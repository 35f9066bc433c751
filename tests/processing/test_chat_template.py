"""Validation of messages and rendering with chat templates (Specification §1.5)."""

from pathlib import Path

import pytest

from owl2.errors import ErrorCode
from owl2.processing.chat_template import render
from owl2.processing.default_templates import CHAT_TEMPLATES, DEFAULT_CHAT_TEMPLATE
from owl2.processing.messages import order_images, parse_messages, user_message, validate_prompt
from tests.errors import raises_input_error
from tests.processing.samples import CHATML, ask

EOS = {"eos_token": "</s>"}
ANSWERS = {"return_assistant_tokens_mask": True}
USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello."}

PARTS_ONLY = """\
{%- for m in messages -%}{{ m.role + ': ' }}{%- for part in m.content -%}
{%- if part.type == 'image' -%}[<|image|>]{%- else -%}{{ part.text }}{%- endif -%}
{%- endfor -%}{%- endfor -%}
"""

# As the templates of other models: other orders of the roles are errors.
ALTERNATING = """\
{%- for m in messages if m.role != 'system' -%}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('order') }}{%- endif -%}
{{ m.role + m.content }}
{%- endfor -%}
"""


def write(messages, template=DEFAULT_CHAT_TEMPLATE, **options) -> str:
    return render(parse_messages(messages), template, EOS, **options)[0]


def test_golden_prompts(golden_text):
    roles = {"human": "user", "gpt": "assistant"}
    for case in golden_text["cases"]:
        messages = [
            {"role": roles[turn["from"]], "content": turn["value"]} for turn in case["conversation"]
        ]
        assert write(messages) == case["full_prompt"]
        assert write(messages[:-1], add_generation_prompt=True) == case["open_prompt"]


def test_answer_span_includes_leading_space_and_end_token():
    conversation = parse_messages([USER, ANSWER, USER, {"role": "assistant", "content": " x\n"}])
    text, spans = render(conversation, DEFAULT_CHAT_TEMPLATE, EOS, **ANSWERS)
    assert text == "USER: Hi ASSISTANT: Hello.</s>USER: Hi ASSISTANT:  x\n</s>"
    assert [text[begin:end] for begin, end in spans] == [" Hello.</s>", "  x\n</s>"]


def test_contents_are_concatenated_without_changes():
    messages = ask("  a \n", object(), "\n b ", "c")
    assert write(messages, add_generation_prompt=True) == ("USER:   a \n<|image|>\n b c ASSISTANT:")


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ((object(), "Hi"), "<|image|>\nHi"),
        ((object(), "\nHi"), "<|image|>\nHi"),
        (("<|image|>Hi",), "<|image|>\nHi"),
        ((object(), object(), "H", "i"), "<|image|><|image|>\nHi"),
        ((object(), "\n", object(), "\nHi"), "<|image|><|image|>\nHi"),
        (("<|image|>\n<|image|> Hi ",), "<|image|><|image|>\nHi "),
        ((object(), "\n", object(), "\n"), "<|image|><|image|>"),
        ((object(),), "<|image|>"),
        (("Hi",), "Hi"),
        (("Hi", object()), "Hi<|image|>"),
        ((object(), "Hi", object()), "<|image|>Hi<|image|>"),
    ],
)
def test_line_break_after_leading_images(parts, text):
    written = write(ask(*parts, answer="<b>"), image_newline=True)
    assert written == f"USER: {text} ASSISTANT: <b></s>"


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        (("What?", object()), "<|image|>What?"),
        (("What?\n", object()), "<|image|>What?"),
        ((object(), "Hi", object()), "<|image|><|image|>Hi"),
        (("a", object(), "b ", object(), "c", "d"), "<|image|><|image|>a\nb cd"),
        (("\n", object(), object()), "<|image|><|image|>"),
        (("no image", " here"), "no image here"),
        (("a <|image|> b", object(), object()), "a <|image|> b<|image|><|image|>"),
        ((object(), object(), "a <|image|> b <|image|>"), "a <|image|> b <|image|>"),
    ],
)
def test_images_precede_the_text(parts, text):
    conversation = parse_messages(ask(*parts, answer="x"))
    turns = order_images(conversation, interleave_images=False)
    assert render(turns, DEFAULT_CHAT_TEMPLATE, EOS)[0] == f"USER: {text} ASSISTANT: x</s>"
    assert turns.images == conversation.images


def test_interleaved_images_keep_their_places():
    parts = [{"type": "text", "text": "a"}, {"type": "image", "image": 1}]
    kept = {"role": "user", "content": parts, "interleave_images": True}
    placed = user_message("b <|image|> c", [2])
    turns = order_images(parse_messages([kept, ANSWER, placed]), False)
    assert render(turns, DEFAULT_CHAT_TEMPLATE, EOS)[0] == (
        "USER: a<|image|> ASSISTANT: Hello.</s>USER: b <|image|> c"
    )
    turns = order_images(parse_messages(ask("a", object())), True)
    assert render(turns, DEFAULT_CHAT_TEMPLATE, EOS)[0] == "USER: a<|image|>"


SYSTEM = {"role": "system", "content": "Be kind."}
IMAGE = {"role": "user", "content": [{"type": "image", "image": 1}]}


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([USER, USER, ANSWER, ANSWER, USER], "USER: Hi\nHi ASSISTANT: Hello.\nHello.</s>USER: Hi"),
        ([USER, ANSWER, SYSTEM, USER], "USER: Hi ASSISTANT: Hello.</s>USER: Be kind.\nHi"),
        ([USER, SYSTEM], "USER: Hi\nBe kind."),
        ([USER, ANSWER, SYSTEM], "USER: Hi ASSISTANT: Hello.</s>USER: Be kind."),
        ([SYSTEM, USER, ANSWER, SYSTEM, SYSTEM, USER], None),
        ([ANSWER, USER], "USER:  ASSISTANT: Hello.</s>USER: Hi"),
        ([SYSTEM, ANSWER, USER], "USER: Be kind.\n ASSISTANT: Hello.</s>USER: Hi"),
        ([USER, {"role": "assistant", "content": ""}, USER], "USER: Hi\nHi"),
        ([USER, {"role": "assistant", "content": None}], "USER: Hi"),
        ([{"role": "system", "content": " "}, USER], "USER: Hi"),
        ([IMAGE, USER], "USER: <|image|>Hi"),
        ([USER, IMAGE], "USER: <|image|>Hi"),
        ([IMAGE, ANSWER, USER, IMAGE, USER], None),
        ([USER, IMAGE, USER], "USER: <|image|>Hi\nHi"),
    ],
)
@pytest.mark.parametrize("template", [DEFAULT_CHAT_TEMPLATE, ALTERNATING], ids=["owl", "strict"])
def test_roles_in_any_order_are_merged(messages, text, template):
    turns = order_images(validate_prompt(messages), False)
    rendered = render(turns, template, EOS, add_generation_prompt=True)[0]
    if template is DEFAULT_CHAT_TEMPLATE and text is not None:
        assert rendered == f"{text} ASSISTANT:"
    roles = [turn["role"] for turn in turns.turns if turn["role"] != "system"]
    assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]


@pytest.mark.parametrize(
    ("messages", "code"),
    [
        ([{"role": "assistant", "content": ""}], ErrorCode.EMPTY_MESSAGE),
        ([SYSTEM, {"role": "assistant", "content": None}], ErrorCode.INVALID_ROLE),
        ([USER, {"role": "user", "content": " "}], ErrorCode.EMPTY_MESSAGE),
        ([USER, {"role": "user", "content": None}], ErrorCode.INVALID_TYPE),
        ([USER, {"role": "tool", "content": "x"}], ErrorCode.INVALID_ROLE),
        ([USER, ANSWER], ErrorCode.INVALID_ROLE),
    ],
)
def test_prompts_without_a_question(messages, code):
    with raises_input_error(code):
        validate_prompt(messages)


def test_v1_format_has_the_system_text_of_the_authors_training():
    system = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions."
    )
    messages = [USER, ANSWER, USER, ANSWER]
    assert write(messages, CHAT_TEMPLATES["v1"]) == f"{system} {write(messages)}"
    assert write([USER], CHAT_TEMPLATES["v1"], add_generation_prompt=True) == (
        f"{system} USER: Hi ASSISTANT:"
    )


def test_generation_prompt_and_continued_message():
    assert write([USER]) == "USER: Hi"
    assert write([USER, ANSWER], continue_final_message=True) == "USER: Hi ASSISTANT: Hello."
    with raises_input_error(ErrorCode.INVALID_ROLE, "continue_final_message"):
        write([USER], continue_final_message=True)
    with raises_input_error(ErrorCode.INVALID_ROLE, "add_generation_prompt"):
        write([USER, ANSWER], add_generation_prompt=True)


def test_system_messages_are_lines_of_the_first_user_message_without_a_system_role():
    system = [{"role": "system", "content": "Be kind."}, {"role": "system", "content": "Be short."}]
    image = {"type": "image", "path": "a.png"}
    parts = [image, {"type": "text", "text": "What"}, image, {"type": "text", "text": "?"}]
    text = write([*system, {"role": "user", "content": parts}])
    assert text == "USER: <|image|>Be kind.\nBe short.\nWhat<|image|>?"
    parts = [image, {"type": "text", "text": "\nWhat?"}]
    text = write([system[0], {"role": "user", "content": parts}])
    assert text == "USER: <|image|>\nBe kind.\nWhat?"
    assert write([system[0], {"role": "user", "content": "<|image|>What?"}]) == (
        "USER: <|image|>Be kind.\nWhat?"
    )
    assert write([*system, {"role": "user", "content": [image]}]).endswith("Be short.\n")
    assert write([system[0], USER], CHATML).startswith("<|im_start|>system\nBe kind.<|im_end|>\n")


def test_templates_for_strings_and_for_parts():
    messages = ask(object(), "Hi")
    assert write(messages, CHATML) == "<|im_start|>user\n<|image|>Hi<|im_end|>\n"
    assert write(messages, PARTS_ONLY) == "user: [<|image|>]Hi"
    assert write([USER], PARTS_ONLY) == "user: Hi"


def test_template_without_generation_blocks_is_rejected_for_training_only():
    template = DEFAULT_CHAT_TEMPLATE.replace("{%- generation -%}", "")
    template = template.replace("{%- endgeneration -%}", "")
    assert write([USER, ANSWER], template).endswith("Hello.</s>")
    with raises_input_error(ErrorCode.NO_LABELS, "{% generation %}"):
        write([USER, ANSWER], template, **ANSWERS)


def test_template_errors_are_input_errors():
    with raises_input_error(ErrorCode.UNSUPPORTED):
        write([USER], "{{ raise_exception('no!') }}")
    with raises_input_error(ErrorCode.UNSUPPORTED, "division by zero"):
        write([USER], "{{ 1/0 }}")
    with raises_input_error(ErrorCode.UNSUPPORTED):
        write([USER], "{% for %}")


def test_variables_of_a_template():
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
    ("messages", "code", "needle"),
    [
        ([], ErrorCode.EMPTY_MESSAGE, "empty"),
        ("Hi", ErrorCode.INVALID_TYPE, "str"),
        (USER, ErrorCode.INVALID_TYPE, "dict"),
        (None, ErrorCode.INVALID_TYPE, "NoneType"),
        ([["user", "Hi"]], ErrorCode.INVALID_TYPE, "messages[0]"),
        ([{"role": "user"}], ErrorCode.INVALID_TYPE, "messages[0]"),
        ([{"role": "human", "content": "Hi"}], ErrorCode.INVALID_ROLE, "'human'"),
        ([ANSWER], ErrorCode.INVALID_ROLE, "'assistant'"),
        ([USER, USER], ErrorCode.INVALID_ROLE, "messages[1]"),
        ([USER, {"role": "system", "content": "x"}], ErrorCode.INVALID_ROLE, "'system'"),
        ([{"role": "system", "content": "x"}], ErrorCode.INVALID_ROLE, "system"),
        ([{"role": "user", "content": "  "}], ErrorCode.EMPTY_MESSAGE, "messages[0] (user)"),
        ([{"role": "user", "content": []}], ErrorCode.EMPTY_MESSAGE, "messages[0]"),
        (
            [USER, {"role": "assistant", "content": ""}],
            ErrorCode.EMPTY_MESSAGE,
            "messages[1] (assistant)",
        ),
        ([{"role": "user", "content": None}], ErrorCode.INVALID_TYPE, "NoneType"),
        ([{"role": "user", "content": 5}], ErrorCode.INVALID_TYPE, "int"),
        ([{"role": "user", "content": ["Hi"]}], ErrorCode.INVALID_TYPE, "part 0"),
        ([{"role": "user", "content": [{"type": "text"}]}], ErrorCode.INVALID_TYPE, "'text'"),
        (
            [{"role": "user", "content": [{"type": "text", "text": 3}]}],
            ErrorCode.INVALID_TYPE,
            "'text'",
        ),
        (
            [{"role": "user", "content": [{"type": "video", "path": "a", "url": "b"}]}],
            ErrorCode.CONFLICT,
            "video",
        ),
        ([{"role": "user", "content": [{"type": "audio"}]}], ErrorCode.UNKNOWN_NAME, "'audio'"),
        (
            [{"role": "user", "content": [{"type": "image", "url": 7}]}],
            ErrorCode.INVALID_TYPE,
            "'url'",
        ),
        (
            [{"role": "user", "content": [{"type": "image", "url": "a", "path": "b"}]}],
            ErrorCode.CONFLICT,
            "url and path",
        ),
        (
            [USER, {"role": "assistant", "content": "<|image|>"}],
            ErrorCode.IMAGE_COUNT_MISMATCH,
            "assistant",
        ),
        (
            [USER, {"role": "assistant", "content": [{"type": "image"}]}],
            ErrorCode.IMAGE_COUNT_MISMATCH,
            "assistant",
        ),
    ],
)
def test_invalid_messages_are_named(messages, code, needle):
    with raises_input_error(code, needle):
        parse_messages(messages)


@pytest.mark.parametrize("text", ["", " \n"])
def test_empty_question(text):
    with raises_input_error(ErrorCode.EMPTY_MESSAGE):
        validate_prompt([{"role": "user", "content": text}])
    assert validate_prompt(ask(object(), text)).is_open


def test_last_message_must_be_a_question():
    validate_prompt([USER])
    validate_prompt(ask(object(), "What is it?"))
    with raises_input_error(ErrorCode.INVALID_ROLE):
        validate_prompt([USER, ANSWER])
