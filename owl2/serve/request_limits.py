"""Limits on the counts of a request, which are checked before it is admitted."""

from owl2.serve import errors
from owl2.serve.config import ServerLimits

# Of the longest token strings; only runs of one character have more characters per token.
MAX_CHARACTERS_PER_TOKEN = 64


def check_limits(
    limits: ServerLimits,
    context: int,
    *,
    messages: int = 0,
    images: int = 0,
    videos: int = 0,
    characters: int = 0,
    answers: int = 1,
    image_tokens: int = 0,
) -> None:
    """Reject a request whose counts exceed a limit.

    Args:
        context: Of the model, in tokens.
        characters: Of all messages. A text that cannot fit is rejected here, because it takes
            seconds to tokenize megabytes.
        image_tokens: Of an image or a frame, at least. Those that cannot fit are rejected before
            they are decoded.

    Raises:
        ApiError: 400, with the code of the limit and the field.
    """
    for what, count, limit, code, param in (
        ("messages", messages, limits.max_messages, "too_many_messages", "messages"),
        ("images", images, limits.max_images, "too_many_images", "messages"),
        ("videos", videos, limits.max_videos, "too_many_videos", "messages"),
        ("answers", answers, limits.max_n, "too_many_answers", "n"),
    ):
        if count > limit:
            message = f"There are {count} {what}; the limit of this server is {limit}."
            raise errors.ApiError(400, message, code=code, param=param)
    num_frames = images + videos * (limits.num_frames or 0)
    excess = ""
    if num_frames * image_tokens >= context:
        excess = (
            f"{images} images and {videos} videos, which are {num_frames} images of {image_tokens} "
            f"tokens each; {(context - 1) // image_tokens} fit"
        )
    elif characters > context * MAX_CHARACTERS_PER_TOKEN:
        excess = f"{characters} characters"
    if excess:
        raise errors.ApiError(
            400,
            f"This model's maximum context length is {context} tokens. However, the messages have "
            f"{excess}. Shorten them.",
            code="context_length_exceeded",
            param="messages",
        )
