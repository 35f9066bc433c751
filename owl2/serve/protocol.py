"""Requests and responses of OpenAI's chat completions, as far as the model supports them.

Fields and ranges follow https://platform.openai.com/docs/api-reference/chat, names follow vLLM's
protocol. Types are strict ("5" is not a number), and every number has bounds. Unknown fields are
ignored, because clients send fields that other servers support. A known field that would change the
answer but is not supported is rejected.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    WithJsonSchema,
    model_validator,
)

from owl2.engine.sampling import MAX_SEED, MAX_TOP_LOGPROBS
from owl2.engine.structured_output import StructuredOutputsParams
from owl2.serve.config import MAX_N, MAX_TOKENS

MAX_MESSAGES = 4096
MAX_PARTS = 1024
MAX_STOP_STRINGS = 16
MAX_OPENAI_SEED = 2**63 - 1

NonEmptyStr = Annotated[str, StringConstraints(min_length=1, max_length=200)]


class OpenAIBaseModel(BaseModel):
    """Values are not converted, unknown fields are ignored, numbers are finite."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True)


# ------------------------------------------------------------------ messages


class ChatCompletionContentPartTextParam(OpenAIBaseModel):
    """Text in a message."""

    type: Literal["text"]
    text: str


class ImageURL(OpenAIBaseModel):
    """An image: `data:image/...;base64,...`, or an http(s) URL if the server allows it.

    `detail` has no effect: the model resizes every image to the same size.
    """

    url: str = Field(min_length=1)
    detail: Literal["auto", "low", "high"] = "auto"


class ChatCompletionContentPartImageParam(OpenAIBaseModel):
    """An image in a message."""

    type: Literal["image_url"]
    image_url: ImageURL


def _string_to_parts(content: Any) -> Any:
    if isinstance(content, str):
        return [ChatCompletionContentPartTextParam(type="text", text=content)]
    return content


def _string_to_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _only(*neutral: Any) -> Callable[[Any], Any]:
    """A validator that accepts None and the values without an effect."""

    def check(value: Any) -> Any:
        # In Python, True equals 1.
        same = (
            isinstance(value, bool) == isinstance(one, bool) and value == one for one in neutral
        )
        if value is None or any(same):
            return value
        raise ValueError("this field is not supported by the model; remove it")

    return check


def _schema(*neutral: Any) -> WithJsonSchema:
    return WithJsonSchema({"enum": [None, *neutral], "description": "Not supported."})


Parts = Annotated[
    list[
        Annotated[
            ChatCompletionContentPartTextParam | ChatCompletionContentPartImageParam,
            Field(discriminator="type"),
        ]
    ],
    Field(min_length=1, max_length=MAX_PARTS),
]
StopStrings = Annotated[list[NonEmptyStr], Field(max_length=MAX_STOP_STRINGS)]
# Only values without an effect are accepted.
Unsupported = Annotated[Any, AfterValidator(_only(0, [], {})), _schema(0, [], {})]
UnsupportedFlag = Annotated[Any, AfterValidator(_only(False)), _schema(False)]
UnsupportedFlagTrue = Annotated[Any, AfterValidator(_only(True)), _schema(True)]
UnsupportedFactor = Annotated[Any, AfterValidator(_only(1)), _schema(1)]


class ChatCompletionMessageParam(OpenAIBaseModel):
    """A message. A string as content is one text part; `developer` is a synonym of `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Parts, BeforeValidator(_string_to_parts, json_schema_input_type=str | Parts)]


# ------------------------------------------------------------------ the request


class JsonSchema(OpenAIBaseModel):
    """`schema`: a JSON schema. All schemas are enforced; `strict` has no effect."""

    name: NonEmptyStr
    description: str | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class JsonSchemaResponseFormat(OpenAIBaseModel):
    """The answer is JSON that follows a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


class PlainResponseFormat(OpenAIBaseModel):
    """The answer is any text, or any JSON object."""

    type: Literal["text", "json_object"]


class StreamOptions(OpenAIBaseModel):
    """`include_usage`: the last chunk has the numbers of tokens."""

    include_usage: bool = False


class ChatCompletionRequest(OpenAIBaseModel):
    """`POST /v1/chat/completions`."""

    model: NonEmptyStr
    messages: list[ChatCompletionMessageParam] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(
        None, ge=-1, le=MAX_TOKENS, description="Not in OpenAI's API. 0 and -1: all tokens."
    )
    # These three are fields of vLLM.
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0)
    min_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS)
    seed: int | None = Field(None, ge=-MAX_OPENAI_SEED - 1, le=MAX_OPENAI_SEED)
    stop: (
        Annotated[
            StopStrings,
            BeforeValidator(_string_to_list, json_schema_input_type=NonEmptyStr | StopStrings),
        ]
        | None
    ) = None
    n: int | None = Field(None, ge=1, le=MAX_N)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="Has no effect.")

    presence_penalty: Unsupported = None
    frequency_penalty: Unsupported = None
    logit_bias: Unsupported = None
    tools: Unsupported = None
    functions: Unsupported = None
    modalities: list[Literal["text"]] | None = None
    response_format: (
        Annotated[PlainResponseFormat | JsonSchemaResponseFormat, Field(discriminator="type")]
        | None
    ) = None
    tool_choice: Literal["none", "auto"] | None = None
    # Of vLLM
    structured_outputs: (
        Annotated[
            StructuredOutputsParams,
            BeforeValidator(StructuredOutputsParams.from_value, json_schema_input_type=Any),
        ]
        | None
    ) = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    bad_words: Unsupported = None
    allowed_token_ids: Unsupported = None
    stop_token_ids: Unsupported = None
    logits_processors: Unsupported = None
    truncate_prompt_tokens: Unsupported = None
    documents: Unsupported = None
    chat_template: Unsupported = None
    chat_template_kwargs: Unsupported = None
    mm_processor_kwargs: Unsupported = None
    best_of: UnsupportedFactor = None
    length_penalty: UnsupportedFactor = None
    use_beam_search: UnsupportedFlag = None
    ignore_eos: UnsupportedFlag = None
    include_stop_str_in_output: UnsupportedFlag = None
    echo: UnsupportedFlag = None
    continue_final_message: UnsupportedFlag = None
    add_special_tokens: UnsupportedFlag = None
    add_generation_prompt: UnsupportedFlagTrue = None
    skip_special_tokens: UnsupportedFlagTrue = None

    @model_validator(mode="after")
    def _check_dependent_fields(self) -> "ChatCompletionRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs requires logprobs: true")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options requires stream: true")
        if len(self._constraints()) > 1:
            raise ValueError(f"{' and '.join(self._constraints())} exclude each other")
        return self

    def _constraints(self) -> dict[str, StructuredOutputsParams]:
        """What the answer must match, by the field that requests it."""
        found = {}
        if self.structured_outputs is not None:
            found["structured_outputs"] = self.structured_outputs
        for kind in ("json", "regex", "choice", "grammar"):
            if (value := getattr(self, f"guided_{kind}")) is not None:
                found[f"guided_{kind}"] = StructuredOutputsParams(**{kind: value})
        if isinstance(self.response_format, JsonSchemaResponseFormat):
            schema = self.response_format.json_schema.json_schema
            found["response_format"] = StructuredOutputsParams(json=schema)
        elif self.response_format is not None and self.response_format.type == "json_object":
            found["response_format"] = StructuredOutputsParams(json_object=True)
        return found

    @property
    def num_answers(self) -> int:
        """`n`, which defaults to 1."""
        return 1 if self.n is None else self.n

    @property
    def max_answer_tokens(self) -> int | None:
        """`max_completion_tokens`, or its older name `max_tokens`."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def images(self) -> dict[tuple[int, int], ImageURL]:
        """The images by the indices of their message and their content part."""
        return {
            (row, column): part.image_url
            for row, message in enumerate(self.messages)
            for column, part in enumerate(message.content)
            if isinstance(part, ChatCompletionContentPartImageParam)
        }

    def counts(self) -> dict[str, Any]:
        """Keyword arguments of `check_limits`."""
        is_older = self.max_completion_tokens is None
        parts = [part for message in self.messages for part in message.content]
        return {
            "messages": len(self.messages),
            "images": len(self.images),
            "characters": sum(len(getattr(part, "text", "")) for part in parts),
            "answers": self.num_answers,
            "tokens": self.max_answer_tokens or 0,
            "tokens_field": "max_tokens" if is_older else "max_completion_tokens",
        }

    def sampling_options(self) -> dict[str, Any]:
        """Keyword arguments of `Engine.complete`; None: the default of the checkpoint."""
        is_greedy = self.top_p == 0  # only the most probable token; the engine has no empty nucleus
        # The engine's range is smaller, and answer i uses the seed `seed` + i.
        seed = None if self.seed is None else self.seed % (MAX_SEED + 1 - MAX_N)
        return {
            "n": self.num_answers,
            "max_new_tokens": self.max_answer_tokens,
            "temperature": 0.0 if is_greedy else self.temperature,
            "top_p": None if is_greedy else self.top_p,
            "top_k": None if self.top_k is None else max(self.top_k, 0),
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "min_new_tokens": self.min_tokens,
            "seed": seed,
            "stop": list(self.stop or ()),
            "top_logprobs": (self.top_logprobs or 0) if self.logprobs else None,
            "structured_outputs": next(iter(self._constraints().values()), None),
        }


# ------------------------------------------------------------------ responses, for /docs


class ChatCompletionLogProb(BaseModel):
    """The log-probability of a token; `bytes` is its UTF-8 encoding."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatCompletionLogProbsContent(ChatCompletionLogProb):
    """A token of the answer and the most probable tokens at its position, in descending order."""

    top_logprobs: list[ChatCompletionLogProb]


class ChatCompletionLogProbs(BaseModel):
    """Log-probabilities of all tokens of an answer or of a chunk."""

    content: list[ChatCompletionLogProbsContent]
    refusal: None = None


class ChatMessage(BaseModel):
    """The text of an answer."""

    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatCompletionResponseChoice(BaseModel):
    """One of `n` answers."""

    index: int
    message: ChatMessage
    logprobs: ChatCompletionLogProbs | None
    finish_reason: Literal["stop", "length"]


class UsageInfo(BaseModel):
    """Tokens of the prompt with its images, and of all answers with their end tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatCompletionResponse(BaseModel):
    """The response to a request without `stream`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatCompletionResponseChoice]
    usage: UsageInfo


class ModelCard(BaseModel):
    """A served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(BaseModel):
    """`GET /v1/models`."""

    object: Literal["list"]
    data: list[ModelCard]
