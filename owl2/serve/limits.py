"""How much a request may ask for, and how many may ask at a time.

What goes beyond has a status and a code of its own:

| limit | status | code |
|---|---|---|
| `body_bytes` | 413 | body_too_large |
| `body_seconds` | 408 | body_too_slow |
| `messages` | 400 | too_many_messages |
| `images` | 400 | too_many_images |
| `image_bytes`, `pixels`, `image_memory`, `image_seconds` | 400 | see `images` |
| `answers` | 400 | too_many_answers |
| `answer_tokens` | 400 | too_many_tokens |
| `queue`, `held_bytes` | 429 | rate_limit_exceeded |
| `seconds` | 503 | timeout |
"""

from pydantic import BaseModel, ConfigDict, Field

from owl2.serve.errors import ApiError
from owl2.serve.protocol import MAX_ANSWERS, MAX_TOKENS, ChatRequest

MIB = 2**20
# Of the longest texts: no prompt has more, but for endless runs of the same character.
CHARACTERS_A_TOKEN = 64


class Limits(BaseModel):
    """What a server allows; all are for one request unless they say otherwise.

    Attributes:
        body_bytes: of the body, images in it as base64 (a third more than the file).
        body_seconds: until all of the body has come.
        messages: turns of the conversation.
        images: in all turns together.
        image_bytes: of one image's file.
        pixels: of one image; its longer edge may have at most the root of four times as many.
        image_seconds: to decode one image.
        image_memory: bytes, to decode one image.
        decoders: images decoded at a time, in the whole server.
        answers: `n`.
        answer_tokens: of each answer, that a request may ask for.
        running: requests answered at a time.
        queue: requests that wait beside those.
        held_bytes: of the bodies of all requests that are not finished.
        seconds: from a request's arrival to its last token.
        remote: whether images are fetched from URLs.
        remote_seconds: to fetch one image, redirects and look-ups among it.
        remote_redirects: that are followed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    body_bytes: int = Field(default=32 * MIB, ge=1)
    body_seconds: float = Field(default=60.0, gt=0)
    messages: int = Field(default=256, ge=1)
    images: int = Field(default=8, ge=0)
    image_bytes: int = Field(default=16 * MIB, ge=1)
    pixels: int = Field(default=2**25, ge=1)
    image_seconds: float = Field(default=20.0, gt=0)
    image_memory: int = Field(default=1024 * MIB, ge=64 * MIB)
    decoders: int = Field(default=2, ge=1)
    answers: int = Field(default=8, ge=1, le=MAX_ANSWERS)
    answer_tokens: int = Field(default=2048, ge=1, le=MAX_TOKENS)
    running: int = Field(default=64, ge=1)
    queue: int = Field(default=256, ge=0)
    held_bytes: int = Field(default=1024 * MIB, ge=1)
    seconds: float = Field(default=600.0, gt=0)
    remote: bool = False
    remote_seconds: float = Field(default=10.0, gt=0)
    remote_redirects: int = Field(default=3, ge=0)


def check(request: ChatRequest, limits: Limits) -> None:
    """Refuse what can be refused by its numbers alone.

    Raises:
        ApiError: 400, with the limit's code and the field.
    """
    images = sum(len(message.images) for message in request.messages)
    for what, given, limit, code, param in (
        ("messages", len(request.messages), limits.messages, "too_many_messages", "messages"),
        ("images", images, limits.images, "too_many_images", "messages"),
        ("answers", request.answers, limits.answers, "too_many_answers", "n"),
        (
            "tokens of an answer",
            request.answer_tokens or 0,
            limits.answer_tokens,
            "too_many_tokens",
            "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens",
        ),
    ):
        if given > limit:
            raise ApiError(
                400,
                f"The request asks for {given} {what}; this server's limit is {limit}.",
                code=code,
                param=param,
            )


def check_length(characters: int, context: int) -> None:
    """Refuse at a glance what cannot fit: to tokenise megabytes takes many seconds.

    Args:
        characters: of all messages.
        context: the model's, in tokens.

    Raises:
        ApiError: 400.
    """
    if characters > context * CHARACTERS_A_TOKEN:
        raise ApiError(
            400,
            f"The messages have {characters:,} characters, more than the model's context of "
            f"{context:,} tokens can hold. Use fewer words or turns.",
            code="context_length_exceeded",
            param="messages",
        )
