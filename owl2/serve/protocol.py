"""Requests and responses of OpenAI's chat and text completions, as far as the model supports them.

Fields and ranges follow https://platform.openai.com/docs/api-reference, names follow vLLM's
protocol. `sampling_fields` has the fields that other routes have as well.
"""

from functools import cached_property
from typing import Annotated, Any, Literal, NotRequired, Self

from pydantic import BeforeValidator, ConfigDict, Field, model_validator
from typing_extensions import TypedDict

from owl2.engine.output import FinishReason
from owl2.engine.sampling_params import MAX_TOP_LOGPROBS, StructuredOutputsParams
from owl2.serve.config import MAX_N
from owl2.serve.message_protocol import (
    MAX_MESSAGES,
    ChatCompletionMessageParam,
    VideoURL,
    find_media,
)
from owl2.serve.sampling_fields import (
    NO_LIMIT,
    GenerationRequest,
    OpenAIBaseModel,
    TokenId,
    Unsupported,
    UnsupportedFlag,
    field_error,
)
from owl2.serve.tools import ToolFields

# ------------------------------------------------------------------ the request


class ChatTemplateKwargs(OpenAIBaseModel):
    """Variables of the chat template; others are ignored.

    `interleave_images`: The images of a message keep their places between its texts.
    """

    model_config = ConfigDict(extra="allow")

    interleave_images: bool | None = None


class ChatCompletionRequest(ToolFields, GenerationRequest):
    """`POST /v1/chat/completions`."""

    messages: list[ChatCompletionMessageParam] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: int | None = Field(None, ge=NO_LIMIT)
    max_completion_tokens: int | None = Field(None, ge=NO_LIMIT)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    chat_template_kwargs: ChatTemplateKwargs | None = None
    modalities: list[Literal["text"]] | None = None
    documents: Unsupported = None
    chat_template: Unsupported = None
    echo: UnsupportedFlag = None
    continue_final_message: bool | None = Field(
        None, description="Of vLLM. The answer continues the last message, an answer's beginning."
    )
    add_special_tokens: UnsupportedFlag = None
    add_generation_prompt: bool | None = Field(
        None, description="False requires continue_final_message: true, and the other way round."
    )

    @model_validator(mode="after")
    def _check_dependent_fields(self) -> "ChatCompletionRequest":
        if self.top_logprobs and not self.logprobs:
            raise field_error("top_logprobs", "it requires logprobs: true")
        for field in ("max_tokens", "max_completion_tokens"):
            if getattr(self, field) == 0:
                raise field_error(field, "it must be 1 or more, or -1 for no limit")
        if self.add_generation_prompt is (self.continue_final_message or False):
            needed = str(not self.add_generation_prompt).lower()
            raise field_error("add_generation_prompt", f"it must be {needed} in this request")
        return self

    @property
    def max_answer_tokens(self) -> int | None:
        """`max_completion_tokens`, or its older name `max_tokens`; -1: no limit."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """Keyword arguments of `Engine.encode`."""
        own = self.chat_template_kwargs.model_dump() if self.chat_template_kwargs else {}
        return own | {"continue_final_message": bool(self.continue_final_message)}

    def counts(self) -> dict[str, Any]:
        """Keyword arguments of `check_limits`."""
        parts = [part for message in self.messages for part in message.parts]
        media = find_media(self.messages)
        videos = sum(isinstance(one, VideoURL) for one in media.values())
        return {
            "messages": len(self.messages),
            "images": len(media) - videos,
            "videos": videos,
            "characters": sum(len(getattr(part, "text", "")) for part in parts),
            "answers": self.num_answers,
        }

    @cached_property
    def constraints(self) -> dict[str, StructuredOutputsParams]:
        """What the answer must match, by the field that requests it."""
        return super().constraints | self.tool_constraint()

    def sampling_options(self) -> dict[str, Any]:
        """Keyword arguments of `Engine.sampling_params` without the number of tokens."""
        top_logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return super().sampling_options() | {"top_logprobs": top_logprobs}


# A string with a constraint has no lone surrogates.
TextPrompt = Annotated[str, Field(min_length=0)] | Annotated[list[TokenId], Field(min_length=1)]


def _to_prompts(value: Any) -> Any:
    """A list of prompts; one prompt is a string or a list of ids."""
    is_ids = isinstance(value, list) and value and all(type(id_) is int for id_ in value)
    return [value] if isinstance(value, str) or is_ids else value


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`."""

    prompt: Annotated[
        list[TextPrompt],
        Field(min_length=1, max_length=MAX_N),
        BeforeValidator(_to_prompts, json_schema_input_type=TextPrompt | list[TextPrompt]),
    ]
    max_tokens: int | None = Field(16, ge=NO_LIMIT, description="0 requires echo: true.")
    echo: bool | None = Field(None, description="The text begins with the prompt.")
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    add_special_tokens: bool | None = Field(
        None,
        description="Of vLLM. Prompts that are texts begin with the start token; default: true.",
    )
    suffix: Unsupported = None

    @model_validator(mode="after")
    def _check_echo(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise field_error("max_tokens", "0 requires echo: true")
        return self

    @property
    def num_answers(self) -> int:
        """`n` answers to each prompt."""
        return super().num_answers * len(self.prompt)

    @property
    def max_answer_tokens(self) -> int | None:
        """See `token_limit`; one token is generated for 0 and discarded."""
        return 1 if self.max_tokens == 0 else self.max_tokens

    def counts(self) -> dict[str, Any]:
        """Keyword arguments of `check_limits`."""
        texts = [prompt for prompt in self.prompt if isinstance(prompt, str)]
        return {"characters": max(map(len, texts), default=0), "answers": self.num_answers}

    def sampling_options(self) -> dict[str, Any]:
        """Keyword arguments of `Engine.sampling_params` without the number of tokens."""
        answers_per_prompt = {"n": super().num_answers, "top_logprobs": self.logprobs}
        return super().sampling_options() | answers_per_prompt


# ------------------------------------------------------------------ responses: JSON objects


class ChatCompletionLogProb(TypedDict):
    """The log-probability of a token; `bytes` is its UTF-8 encoding."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatCompletionLogProbsContent(ChatCompletionLogProb):
    """A token of the answer and the most probable tokens at its position, in descending order."""

    top_logprobs: list[ChatCompletionLogProb]


class ChatCompletionLogProbs(TypedDict):
    """Log-probabilities of all tokens of an answer or of a chunk."""

    content: list[ChatCompletionLogProbsContent]
    refusal: None


class ChatMessage(TypedDict):
    """The text of an answer, or the call of the function that the request chose."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: NotRequired[list[dict[str, Any]]]


class ChatCompletionResponseChoice(TypedDict):
    """One of `n` answers."""

    index: int
    message: ChatMessage
    logprobs: ChatCompletionLogProbs | None
    finish_reason: FinishReason | None


class UsageInfo(TypedDict):
    """Tokens of the prompt with its images, and of all answers with their end tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatCompletionResponse(TypedDict):
    """The response to a request without `stream`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatCompletionResponseChoice]
    usage: UsageInfo


class CompletionLogProbs(TypedDict):
    """Log-probabilities of all tokens; null for the first token of a prompt."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionResponseChoice(TypedDict):
    """One of `n` answers to one of the prompts, or a chunk of it."""

    index: int
    text: str
    logprobs: CompletionLogProbs | None
    finish_reason: FinishReason | None


class CompletionResponse(TypedDict):
    """The response to a request without `stream`, or a chunk."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionResponseChoice]
    usage: NotRequired[UsageInfo | None]
