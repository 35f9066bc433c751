"""Messages of requests, with images and videos.

Fields follow https://platform.openai.com/docs/api-reference, names follow vLLM's protocol.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from owl2.serve.sampling_fields import (
    MAX_TOOLS,
    FunctionName,
    OpenAIBaseModel,
    field_error,
)

MAX_MESSAGES = 4096
MAX_PARTS = 1024


class ChatCompletionContentPartTextParam(OpenAIBaseModel):
    """Text in a message."""

    type: Literal["text"]
    text: str


class ImageURL(OpenAIBaseModel):
    """An image: `data:image/...;base64,...`, or an http(s) URL if the server allows it.

    `detail` has no effect: the model resizes every image to the same size.
    """

    url: str = Field(min_length=1)
    detail: str | None = None


class VideoURL(OpenAIBaseModel):
    """A video: `data:video/...;base64,...`, or an http(s) URL if the server allows it."""

    url: str = Field(min_length=1)


def _string_to_url(value: Any) -> Any:
    return {"url": value} if isinstance(value, str) and value else value


class ChatCompletionContentPartImageParam(OpenAIBaseModel):
    """An image in a message."""

    type: Literal["image_url"]
    image_url: Annotated[
        ImageURL, BeforeValidator(_string_to_url, json_schema_input_type=str | ImageURL)
    ]


class ChatCompletionContentPartVideoParam(OpenAIBaseModel):
    """A video in a message, as in vLLM. The model sees frames of it."""

    type: Literal["video_url"]
    video_url: Annotated[
        VideoURL, BeforeValidator(_string_to_url, json_schema_input_type=str | VideoURL)
    ]


class ChatCompletionContentPartRefusalParam(OpenAIBaseModel):
    """A refusal in a message of the assistant; the model reads it as text."""

    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        """The refusal."""
        return self.refusal


# Names of text and image parts in other APIs of OpenAI and in clients that also use those.
_OTHER_TYPES = {"input_text": "text", "output_text": "text", "input_image": "image_url"}


def _to_parts(content: Any) -> Any:
    """A list of parts. As in vLLM, a part may be a string, or have no type."""
    if isinstance(content, str):
        return [_text_part(content)]
    return [_to_part(part) for part in content] if isinstance(content, list) else content


def _text_part(text: str) -> ChatCompletionContentPartTextParam:
    return ChatCompletionContentPartTextParam(type="text", text=text)


def _to_part(part: Any) -> Any:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, dict):
        return part
    type_ = part.get("type")
    if type_ is None:
        type_ = next((one for one in ("text", "image_url", "video_url") if one in part), None)
    elif isinstance(type_, str):
        type_ = _OTHER_TYPES.get(type_, type_)
    return part if type_ is None else {**part, "type": type_}


ContentPart = (
    ChatCompletionContentPartTextParam
    | ChatCompletionContentPartImageParam
    | ChatCompletionContentPartVideoParam
    | ChatCompletionContentPartRefusalParam
)
Parts = Annotated[
    list[Annotated[ContentPart, Field(discriminator="type")]], Field(max_length=MAX_PARTS)
]


class FunctionCall(FunctionName):
    """A function that an earlier answer has called, with JSON as its arguments."""

    arguments: str


class ToolCall(OpenAIBaseModel):
    """A call in an earlier answer."""

    function: FunctionCall


class ChatCompletionMessageParam(OpenAIBaseModel):
    """A message. A string as content is one text part; `developer` is a synonym of `system`.

    The content of an assistant's message may be null or missing. The arguments of its calls are
    text, as the model has written them. Without them, such a message is skipped. The result of a
    call, a message of the role `tool` or `function`, is a message of the user for the model.
    """

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: (
        Annotated[Parts, BeforeValidator(_to_parts, json_schema_input_type=str | Parts)] | None
    ) = None
    tool_calls: list[ToolCall] | None = Field(None, max_length=MAX_TOOLS)
    function_call: FunctionCall | None = Field(None, description="Older form of `tool_calls`.")

    @model_validator(mode="after")
    def _check_content(self) -> "ChatCompletionMessageParam":
        if not self.content and self.role != "assistant":
            raise field_error("content", f"a message of the role {self.role!r} needs content")
        return self

    @property
    def parts(self) -> Sequence[ContentPart]:
        """The content and the arguments of calls; empty if there are none."""
        calls = [call.function for call in self.tool_calls or ()]
        calls += [self.function_call] if self.function_call else []
        return [*(self.content or ()), *(_text_part(call.arguments) for call in calls)]


# By the indices of their message and their content part.
Media = dict[tuple[int, int], ImageURL | VideoURL]


def find_media(messages: Sequence[ChatCompletionMessageParam]) -> Media:
    """The images and videos of messages, in order."""
    found: Media = {}
    for row, message in enumerate(messages):
        for column, part in enumerate(message.parts):
            if isinstance(part, ChatCompletionContentPartImageParam):
                found[row, column] = part.image_url
            elif isinstance(part, ChatCompletionContentPartVideoParam):
                found[row, column] = part.video_url
    return found
