"""What a request may hold: OpenAI's chat completions, as far as this model can do it.

The fields and their ranges are those of https://platform.openai.com/docs/api-reference/chat. Types
are strict where OpenAI's are ("5" is no number), every number has bounds, and unknown fields are
ignored, as servers of this kind do: clients send what other servers know. What is known, would
change the answer and cannot be done is refused instead, so that nobody believes that it was done.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    field_validator,
    model_validator,
)

MAX_TOKENS = 1_000_000  # beyond any context; the server's own limit is far below
MAX_ANSWERS = 128
MAX_MESSAGES = 4096
MAX_PARTS = 1024
MAX_STOPS = 16
MAX_SCORES = 20
LARGEST_SEED = 2**63 - 1  # OpenAI's
ENGINE_SEEDS = 2**32  # the engine's are from 0 to below this
UNSUPPORTED = (
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "tools",
    "functions",
)

Name = Annotated[str, StringConstraints(min_length=1, max_length=200)]


class Strict(BaseModel):
    """Types are not converted; unknown fields are ignored; no number is infinite."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True)


# ------------------------------------------------------------------ messages


class TextPart(Strict):
    """A piece of a message's text."""

    type: Literal["text"]
    text: str


class ImageUrl(Strict):
    """An image: `data:image/...;base64,...`, or where it is fetched from if the server may.

    `detail` is taken and has no effect: the model sees all images in one size.
    """

    url: str = Field(min_length=1)
    detail: Literal["auto", "low", "high"] = "auto"


class ImagePart(Strict):
    """An image in a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


def _as_parts(content: Any) -> Any:
    return [TextPart(type="text", text=content)] if isinstance(content, str) else content


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Parts = Annotated[list[Part], Field(min_length=1, max_length=MAX_PARTS)]
Content = Annotated[Parts, BeforeValidator(_as_parts, json_schema_input_type=str | Parts)]
Stop = Annotated[
    list[Name],
    Field(max_length=MAX_STOPS),
    BeforeValidator(
        _as_list, json_schema_input_type=Name | Annotated[list[Name], Field(max_length=MAX_STOPS)]
    ),
]


class ChatMessage(Strict):
    """A turn; a content that is a string is one part. `developer` is OpenAI's newer name of
    `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content

    @property
    def images(self) -> list[ImageUrl]:
        """In order of appearance."""
        return [part.image_url for part in self.content if isinstance(part, ImagePart)]


# ------------------------------------------------------------------ the request


class StreamOptions(Strict):
    """`include_usage`: counts of tokens in a last chunk."""

    include_usage: bool = False


class ResponseFormat(Strict):
    """Only text: the model's words are not forced into a form."""

    type: Literal["text"]


class ChatRequest(Strict):
    """`POST /v1/chat/completions`."""

    model: Name
    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=MAX_TOKENS, description="not OpenAI's; 0 or -1: all")
    seed: int | None = Field(None, ge=-LARGEST_SEED - 1, le=LARGEST_SEED)
    stop: Stop | None = None
    n: int | None = Field(None, ge=1, le=MAX_ANSWERS)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_SCORES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="taken, and without effect")

    # What would change the answer and cannot be done: only what asks for nothing is taken.
    presence_penalty: float | None = Field(None, ge=0, le=0)
    frequency_penalty: float | None = Field(None, ge=0, le=0)
    logit_bias: dict[str, float] | None = Field(None, max_length=0)
    tools: list[dict[str, Any]] | None = Field(None, max_length=0)
    functions: list[dict[str, Any]] | None = Field(None, max_length=0)
    modalities: list[Literal["text"]] | None = None
    response_format: ResponseFormat | None = None

    @field_validator(*UNSUPPORTED, mode="before")
    @classmethod
    def _asks_for_nothing(cls, value: Any) -> Any:
        if value is None or value == [] or value == {}:
            return value
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value == 0:
            return value
        raise ValueError("this model cannot do that: leave it out")

    @model_validator(mode="after")
    def _fields_that_need_another(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self

    @property
    def answers(self) -> int:
        """How many are wanted (`n`)."""
        return 1 if self.n is None else self.n

    @property
    def answer_tokens(self) -> int | None:
        """The limit by its newer name, else by its older one."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def scores(self) -> int | None:
        """How many tokens' log-probabilities beside the chosen one's; None: none at all."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def options(self) -> dict[str, Any]:
        """What `Engine.complete` takes, but `n`; what was not asked for is None or empty."""
        greedy = self.top_p == 0  # the likeliest token alone; the engine has no nucleus of nothing
        seed = None if self.seed is None else self.seed % (ENGINE_SEEDS - MAX_ANSWERS)
        return {
            "max_new_tokens": self.answer_tokens,
            "temperature": 0.0 if greedy else self.temperature,
            "top_p": None if greedy else self.top_p,
            "top_k": None if self.top_k is None else max(self.top_k, 0),
            "seed": seed,
            "stop": list(self.stop or ()),
            "top_logprobs": self.scores,
        }


# ------------------------------------------------------------------ replies, for the API's document


class Score(BaseModel):
    """A token's log-probability; `bytes`: of its UTF-8."""

    token: str
    logprob: float
    bytes: list[int] | None


class ScoredToken(Score):
    """A token of the answer, and the likeliest in its place, best first."""

    top_logprobs: list[Score]


class Scores(BaseModel):
    """Of all tokens of an answer, or of a chunk."""

    content: list[ScoredToken]
    refusal: None = None


class AnswerMessage(BaseModel):
    """The answer's text."""

    role: Literal["assistant"]
    content: str
    refusal: None = None


class Choice(BaseModel):
    """One of `n` answers."""

    index: int
    message: AnswerMessage
    logprobs: Scores | None
    finish_reason: Literal["stop", "length"]


class Usage(BaseModel):
    """Tokens: of the prompt, images' among them, and of all answers, end tokens among them."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatReply(BaseModel):
    """The reply to a request without `stream`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class Model(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(BaseModel):
    """`GET /v1/models`."""

    object: Literal["list"]
    data: list[Model]
