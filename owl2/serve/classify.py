"""`POST /classify`: scores of images by a scoring model, in the form of vLLM's route.

A scoring model is a classifier over its levels, so the response of `/classify` has everything: the
best level, the probabilities of all levels, and with two more fields the score. vLLM's `/score`
compares pairs of a query and a document, and has no probabilities.
"""

import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.responses import Response
from PIL import Image
from pydantic import BaseModel, Field, model_validator

from owl2.engine.engine import Engine
from owl2.errors import InputError
from owl2.scoring.scorer import ImageScore, ImageScorer, recognize
from owl2.serve import errors
from owl2.serve.admission import AdmissionController, ClientStopped, run_unless
from owl2.serve.generation import RESPONSES, disconnected, encode_json
from owl2.serve.message_protocol import (
    MAX_MESSAGES,
    ChatCompletionContentPartImageParam,
    ChatCompletionMessageParam,
    find_media,
)
from owl2.serve.middleware import CLIENT_CLOSED_REQUEST
from owl2.serve.request_images import RequestImages
from owl2.serve.request_limits import check_limits
from owl2.serve.sampling_fields import NonEmptyStr, OpenAIBaseModel, field_error


class ClassificationRequest(OpenAIBaseModel):
    """`POST /classify`: every image of the messages is rated, or all are frames of one video.

    Messages have no text: the prompt is the scoring model's own.
    """

    model: NonEmptyStr
    messages: list[ChatCompletionMessageParam] = Field(min_length=1, max_length=MAX_MESSAGES)
    task: Literal["quality", "aesthetics"] = Field("quality", description="What is rated.")
    kind: Literal["image", "video"] = Field(
        "image", description="video: the images are frames of one video, one a second."
    )

    @model_validator(mode="after")
    def _check_messages(self) -> "ClassificationRequest":
        parts = [part for message in self.messages for part in message.parts]
        if not all(isinstance(part, ChatCompletionContentPartImageParam) for part in parts):
            raise field_error("messages", "they must have only image_url parts, without text")
        if any(message.role != "user" for message in self.messages):
            raise field_error("messages", "all must have the role user")
        return self


class ClassificationData(BaseModel):
    """The rating of an image; `probs` are those of `labels`, the best label first."""

    index: int
    label: str
    probs: list[float]
    num_classes: int
    labels: list[str]
    score: float
    std: float


class ClassificationUsage(BaseModel):
    """The number of tokens, including those of images."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: Literal[0]


class ClassificationResponse(BaseModel):
    """The ratings of all images, in order."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[ClassificationData]
    usage: ClassificationUsage


def find_scorers(
    engine: Engine,
    models: Mapping[str, tuple[str, str | None]],
) -> dict[str, ImageScorer]:
    """The scorers of the scoring models that need no anchor images, by the names of the models.

    Args:
        models: By name, a checkpoint or an adapter of the engine, and the base of an adapter.
    """
    scorers = {}
    for name, (path, base) in models.items():
        adapter = name if name in engine.adapters else None
        with suppress(InputError):  # no scoring model
            checkpoint, method = recognize(path, base=base)
            scorers[name] = ImageScorer(engine, method, checkpoint=checkpoint, adapter=adapter)
    return scorers


def add_classify(
    app: FastAPI,
    admission: AdmissionController,
    images: RequestImages,
    scorers: Mapping[str, ImageScorer],
) -> None:
    """Add the route to an application.

    Args:
        scorers: By the values of `model` in requests.
    """
    responses = {status: one for status, one in RESPONSES.items() if status != 200}

    @app.post("/classify", response_model=ClassificationResponse, responses=responses)
    async def classify(body: ClassificationRequest, request: Request) -> Response:
        """Rate the quality or the aesthetics of images, or of a video."""
        scorer = scorers.get(body.model)
        if scorer is None:
            raise errors.model_not_found(body.model, scorers)
        scorer.check_task(body.task, body.kind)
        media = find_media(body.messages)
        counts = {"messages": len(body.messages), "images": len(media), "characters": 0}
        check_limits(admission.limits, admission.engine.context_length, **counts)
        policy = scorer.image_processor.image_policy
        with admission.admit() as stream:
            work = stream.compute(
                partial(images.open_all, media, policy), partial(_rate, scorer, body)
            )
            try:
                scores, num_tokens = await run_unless(disconnected(request), work)
            except ClientStopped:
                return Response(status_code=CLIENT_CLOSED_REQUEST)
            stream.finish(num_tokens)
        usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens, "completion_tokens": 0}
        content = {
            "id": f"classify-{uuid.uuid4().hex}",
            "object": "list",
            "created": int(time.time()),
            "model": body.model,
            "data": [_data(index, score) for index, score in enumerate(scores)],
            "usage": usage,
        }
        return Response(encode_json(content), media_type="application/json")


def _rate(
    scorer: ImageScorer,
    body: ClassificationRequest,
    images: dict[tuple[int, int], Image.Image],
) -> tuple[list[ImageScore], int]:
    """The scores, and the number of tokens of all prompts. It runs in a thread."""
    opened = list(images.values())
    items = [opened] if body.kind == "video" else opened
    prompts = [scorer.encode(item, body.task, body.kind) for item in items]
    return scorer.score_prompts(prompts), sum(len(prompt.ids) for [prompt] in prompts)


def _data(index: int, score: ImageScore) -> dict[str, Any]:
    probabilities = score.probabilities
    return {
        "index": index,
        "label": max(probabilities, key=lambda label: probabilities[label]),
        "probs": list(probabilities.values()),
        "num_classes": len(probabilities),
        "labels": list(probabilities),
        "score": score.score,
        "std": score.std,
    }
