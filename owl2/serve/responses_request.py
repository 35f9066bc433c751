"""The request of OpenAI's Responses API, and the chat request with the same meaning.

Fields follow https://platform.openai.com/docs/api-reference/responses/create, as far as the model
supports them.
"""

import re
from typing import Annotated, Any, Literal

from fastapi.exceptions import RequestValidationError
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from owl2.engine.sampling_params import MAX_TOP_LOGPROBS
from owl2.serve.message_protocol import MAX_MESSAGES, MAX_PARTS
from owl2.serve.protocol import ChatCompletionRequest
from owl2.serve.sampling_fields import (
    MAX_TOOLS,
    NO_LIMIT,
    FunctionName,
    JsonSchema,
    NonEmptyStr,
    OpenAIBaseModel,
    SamplingFields,
    Unsupported,
    UnsupportedFlag,
    field_error,
)

LOGPROBS = "message.output_text.logprobs"  # in `include`
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(max_length=16),
]


class ResponseText(OpenAIBaseModel):
    """Text of a user, or of an earlier answer."""

    type: Literal["input_text", "output_text"]
    text: str

    def chat_part(self) -> dict[str, Any]:
        """The part of a chat message."""
        return {"type": "text", "text": self.text}


class ResponseRefusal(OpenAIBaseModel):
    """An earlier answer of another model."""

    type: Literal["refusal"]
    refusal: str

    def chat_part(self) -> dict[str, Any]:
        """The part of a chat message."""
        return {"type": "text", "text": self.refusal}


class ResponseInputImage(OpenAIBaseModel):
    """An image: `data:image/...;base64,...`, or an http(s) URL if the server allows it."""

    type: Literal["input_image"]
    image_url: Annotated[str, Field(min_length=1)]
    detail: str | None = None
    file_id: Unsupported = None

    def chat_part(self) -> dict[str, Any]:
        """The part of a chat message."""
        return {"type": "image_url", "image_url": {"url": self.image_url, "detail": self.detail}}


def _text_to_parts(content: Any) -> Any:
    return [{"type": "input_text", "text": content}] if isinstance(content, str) else content


def _text_to_items(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


Parts = Annotated[
    list[
        Annotated[ResponseText | ResponseRefusal | ResponseInputImage, Field(discriminator="type")]
    ],
    Field(max_length=MAX_PARTS),
]


Content = Annotated[Parts, BeforeValidator(_text_to_parts, json_schema_input_type=str | Parts)]


class ResponseInputItem(OpenAIBaseModel):
    """A message with `role` and `content`; a call in an earlier answer with `name` and `arguments`;
    or the `output` of a call. Its `id`, `call_id`, `status`, ... have no effect.
    """

    type: Literal["message", "function_call", "function_call_output"] = "message"
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: Content | None = None
    name: NonEmptyStr | None = None
    arguments: str | None = None
    output: Content | None = None

    @model_validator(mode="after")
    def _check_fields(self) -> "ResponseInputItem":
        for field in _ITEM_FIELDS[self.type]:
            if getattr(self, field) is None:
                raise field_error(field, f"an item of the type {self.type!r} needs it")
        return self

    def chat_message(self) -> dict[str, Any]:
        """The chat message."""
        if self.type == "function_call":
            call = {"function": {"name": self.name, "arguments": self.arguments}}
            return {"role": "assistant", "tool_calls": [call]}
        is_message = self.type == "message"
        parts = (self.content if is_message else self.output) or []
        role = self.role if is_message else "tool"
        return {"role": role, "content": [part.chat_part() for part in parts]}


_ITEM_FIELDS = {
    "message": ("role", "content"),
    "function_call": ("name", "arguments"),
    "function_call_output": ("output",),
}
Items = Annotated[list[ResponseInputItem], Field(min_length=1, max_length=MAX_MESSAGES)]


class ResponseToolChoice(FunctionName):
    """The function that the model calls."""

    type: Literal["function"]


class PlainTextFormat(OpenAIBaseModel):
    """Any text, or any JSON object."""

    type: Literal["text", "json_object"]


class JsonSchemaTextFormat(JsonSchema):
    """JSON that follows a schema."""

    type: Literal["json_schema"]


class ResponseTextConfig(OpenAIBaseModel):
    """The form of the answer."""

    format: (
        Annotated[PlainTextFormat | JsonSchemaTextFormat, Field(discriminator="type")] | None
    ) = None
    verbosity: Literal["medium"] | None = None


class ResponsesRequest(SamplingFields):
    """`POST /v1/responses`."""

    model: NonEmptyStr
    input: Annotated[Items, BeforeValidator(_text_to_items, json_schema_input_type=str | Items)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=NO_LIMIT)
    text: ResponseTextConfig | None = None
    include: list[str] | None = Field(
        None, max_length=16, description=f"'{LOGPROBS}'; other values have no effect."
    )
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    metadata: Metadata | None = None
    store: bool | None = Field(None, description="Responses are never stored.")
    truncation: Literal["disabled"] | None = None
    tools: list[dict[str, Any]] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = Field(None, description="Has no effect.")
    previous_response_id: str | None = None
    conversation: Unsupported = None
    prompt: Unsupported = None
    context_management: Unsupported = None
    moderation: Unsupported = None
    background: UnsupportedFlag = None
    return_tokens_as_token_ids: UnsupportedFlag = None

    @model_validator(mode="after")
    def _check_fields(self) -> "ResponsesRequest":
        if self.num_answers != 1:
            raise field_error("n", "a response has one answer")
        return self

    @property
    def has_logprobs(self) -> bool:
        """Whether the response has log-probabilities."""
        return LOGPROBS in (self.include or ()) or bool(self.top_logprobs)

    def to_chat(self) -> ChatCompletionRequest:
        """The chat request with the same answer.

        Raises:
            RequestValidationError: The messages are invalid.
        """
        messages: list[dict[str, Any]] = []
        if self.instructions:
            messages.append({"role": "system", "content": self.instructions})
        messages += [item.chat_message() for item in self.input]
        fields: dict[str, Any] = {
            **self.model_dump(include=set(SamplingFields.model_fields), exclude_unset=True),
            "model": self.model,
            "messages": messages,
            "max_completion_tokens": self.max_output_tokens,
            "logprobs": self.has_logprobs,
            "top_logprobs": self.top_logprobs if self.has_logprobs else None,
            "tools": self.tools and [_chat_tool(tool) for tool in self.tools],
            "tool_choice": self.tool_choice,
        }
        if isinstance(self.tool_choice, ResponseToolChoice):
            function = {"name": self.tool_choice.name}
            fields["tool_choice"] = {"type": "function", "function": function}
        if self.text is not None and self.text.format is not None:
            chosen = self.text.format
            if isinstance(chosen, JsonSchemaTextFormat):
                schema = chosen.model_dump(by_alias=True, exclude={"type"})
                fields["response_format"] = {"type": "json_schema", "json_schema": schema}
            else:
                fields["response_format"] = {"type": chosen.type}
        try:
            return ChatCompletionRequest.model_validate(fields)
        except ValidationError as error:
            problems = [{**problem, "loc": ("body", *problem["loc"])} for problem in error.errors()]
            raise RequestValidationError(problems) from error

    def param(self, chat_param: str | None) -> str | None:
        """The path of a field of `to_chat` in this request."""
        first_item = int(bool(self.instructions))

        def item(match: re.Match[str]) -> str:
            return f"input.{int(match[1]) - first_item}" if int(match[1]) >= first_item else ""

        path = re.sub(r"^messages\.(\d+)", item, chat_param or "")
        path = re.sub(r"^messages$", "input", path).replace(".image_url.url", ".image_url")
        renamed = {"max_completion_tokens": "max_output_tokens", "response_format": "text.format"}
        return renamed.get(path, path) or None


def _chat_tool(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool as in a chat request, where the fields of a function are nested."""
    if tool.get("type") != "function":
        return tool
    return {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}}
