"""Fields that all generating routes share: how answers are sampled, and what is not supported.

Names and ranges are those of OpenAI's and vLLM's APIs. Types are strict ("5" is not a number), and
numbers have bounds. Unknown fields are ignored, because clients send fields that other servers
support. A known field that would change the answer but is not supported is rejected.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import Annotated, Any, Literal, Self

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
from pydantic_core import PydanticCustomError

from owl2.engine.sampling_params import MAX_SEED, StructuredOutputsParams
from owl2.errors import InputError
from owl2.serve.config import MAX_N, MAX_TOKENS

MAX_STOP_STRINGS = 16
MAX_TOOLS = 1024
MAX_TOKEN_IDS = 1024  # of a list in a request
MAX_OPENAI_SEED = 2**63 - 1
NO_LIMIT = -1  # of `max_tokens`, as in llama.cpp

NonEmptyStr = Annotated[str, StringConstraints(min_length=1, max_length=200)]


class OpenAIBaseModel(BaseModel):
    """Values are not converted, unknown fields are ignored, numbers are finite.

    4.0 is an integer, as in JSON schemas: some languages write all numbers in this form.
    """

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _convert_integers(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {
            key: int(value) if isinstance(value, float) and value.is_integer() else value
            for key, value in data.items()
        }


def field_error(field: str, message: str) -> PydanticCustomError:
    """The error of a validator of several fields; `field` becomes `param` of the response."""
    return PydanticCustomError("value_error", "{reason}", {"reason": message, "field": field})


def string_to_list(value: Any) -> Any:
    """`["text"]` for `"text"`."""
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
        raise ValueError("this field is not supported by the server; remove it")

    return check


def _schema(*neutral: Any) -> WithJsonSchema:
    return WithJsonSchema({"enum": [None, *neutral], "description": "Not supported."})


StopStrings = Annotated[list[NonEmptyStr], Field(max_length=MAX_STOP_STRINGS)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
# Only values without an effect are accepted.
Unsupported = Annotated[Any, AfterValidator(_only([], {})), _schema([], {})]
UnsupportedFlag = Annotated[Any, AfterValidator(_only(False)), _schema(False)]
UnsupportedFlagTrue = Annotated[Any, AfterValidator(_only(True)), _schema(True)]
UnsupportedFactor = Annotated[Any, AfterValidator(_only(1)), _schema(1)]


def _to_token_id(key: Any) -> Any:
    """JSON objects have strings as keys."""
    return int(key) if isinstance(key, str) and key.isdecimal() and len(key) < 12 else key


LogitBias = Annotated[
    dict[
        Annotated[TokenId, BeforeValidator(_to_token_id)], Annotated[float, Field(ge=-100, le=100)]
    ],
    Field(max_length=MAX_TOKEN_IDS),
    WithJsonSchema({"type": "object", "additionalProperties": {"type": "number"}}),
]


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


class StructuredOutputFields(OpenAIBaseModel):
    """What the answer must match: at most one of these fields."""

    response_format: (
        Annotated[PlainResponseFormat | JsonSchemaResponseFormat, Field(discriminator="type")]
        | None
    ) = None
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

    @model_validator(mode="after")
    def _check_constraints(self) -> "StructuredOutputFields":
        if len(fields := list(self.constraints)) > 1:
            raise field_error(fields[0], f"{' and '.join(fields)} exclude each other")
        return self

    @cached_property
    def constraints(self) -> dict[str, StructuredOutputsParams]:
        """What the answer must match, by the field that requests it."""
        found = {}
        if self.structured_outputs is not None:
            found["structured_outputs"] = self.structured_outputs
        for kind in ("json", "regex", "choice", "grammar"):
            if (value := getattr(self, f"guided_{kind}")) is not None:
                try:
                    found[f"guided_{kind}"] = StructuredOutputsParams(**{kind: value})
                except InputError as error:
                    raise field_error(f"guided_{kind}", str(error)) from error
        if isinstance(self.response_format, JsonSchemaResponseFormat):
            schema = self.response_format.json_schema.json_schema
            found["response_format"] = StructuredOutputsParams(json=schema)
        elif self.response_format is not None and self.response_format.type == "json_object":
            found["response_format"] = StructuredOutputsParams(json_object=True)
        return found


class SamplingFields(StructuredOutputFields):
    """How answers are sampled. An omitted field has the checkpoint's value."""

    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: LogitBias | None = Field(
        None, description="Added to the logits of these token ids; -100 excludes a token."
    )
    seed: int | None = Field(None, ge=-MAX_OPENAI_SEED - 1, le=MAX_OPENAI_SEED)
    stop: (
        Annotated[
            StopStrings,
            BeforeValidator(string_to_list, json_schema_input_type=NonEmptyStr | StopStrings),
        ]
        | None
    ) = None
    n: int | None = Field(None, ge=1, le=MAX_N)
    stream: bool | None = None
    user: str | None = Field(None, description="Has no effect.")
    # Of vLLM
    top_k: int | None = Field(None, ge=-1, description="0 and -1: all tokens.")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0)
    min_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS)
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_TOKEN_IDS)] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None

    bad_words: Unsupported = None
    allowed_token_ids: Unsupported = None
    logits_processors: Unsupported = None
    truncate_prompt_tokens: Unsupported = None
    prompt_logprobs: Unsupported = None
    logprob_token_ids: Unsupported = None
    repetition_detection: Unsupported = None
    thinking_token_budget: Unsupported = None
    mm_processor_kwargs: Unsupported = None
    media_io_kwargs: Unsupported = None
    vllm_xargs: Unsupported = None
    best_of: UnsupportedFactor = None
    length_penalty: UnsupportedFactor = None
    use_beam_search: UnsupportedFlag = None
    include_stop_str_in_output: UnsupportedFlag = None
    return_token_ids: UnsupportedFlag = None
    watermarking: UnsupportedFlag = None
    spaces_between_special_tokens: UnsupportedFlagTrue = None

    @property
    def num_answers(self) -> int:
        """`n`, which defaults to 1."""
        return 1 if self.n is None else self.n

    def sampling_options(self) -> dict[str, Any]:
        """Keyword arguments of `Engine.sampling_params`; None: the default of the checkpoint."""
        is_greedy = self.top_p == 0  # only the most probable token; the engine has no empty nucleus
        # The engine's range is smaller, and answer i uses the seed `seed` + i.
        seed = None if self.seed is None else self.seed % (MAX_SEED + 1 - MAX_N)
        return {
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "ignore_eos": self.ignore_eos,
            "skip_special_tokens": self.skip_special_tokens,
            "n": self.num_answers,
            "temperature": 0.0 if is_greedy else self.temperature,
            "top_p": None if is_greedy else self.top_p,
            "top_k": None if self.top_k is None else min(max(self.top_k, 0), MAX_TOKENS),
            "min_new_tokens": self.min_tokens,
            "seed": seed,
            "structured_outputs": next(iter(self.constraints.values()), None),
            "stop": list(self.stop or ()),
            "stop_token_ids": self.stop_token_ids or None,
            "logit_bias": self.logit_bias or None,
        }


class FunctionName(OpenAIBaseModel):
    """The function of a `tool_choice`."""

    name: NonEmptyStr


class StreamOptions(OpenAIBaseModel):
    """`include_usage`: the last chunk has the numbers of tokens.

    `continuous_usage_stats`, of vLLM: every chunk has the numbers so far.
    """

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationRequest(SamplingFields, ABC):
    """A request that `GenerationHandler` answers."""

    model: NonEmptyStr
    stream_options: StreamOptions | None = None
    return_tokens_as_token_ids: bool | None = Field(
        None, description="Of vLLM. The texts of tokens in log-probabilities are `token_id:ID`."
    )

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise field_error("stream_options", "it requires stream: true")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether the last chunk of a stream has the numbers of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def has_continuous_usage(self) -> bool:
        """Whether every chunk has them."""
        return self.include_usage and bool(
            self.stream_options and self.stream_options.continuous_usage_stats
        )

    @property
    @abstractmethod
    def max_answer_tokens(self) -> int | None:
        """See `token_limit`."""

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """Keyword arguments of `Engine.encode`."""
        return {}

    @abstractmethod
    def counts(self) -> dict[str, Any]:
        """Keyword arguments of `check_limits`."""
