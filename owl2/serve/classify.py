"""`POST /classify`: scores of images by a scoring model, in the form of vLLM's route.

A scoring model is a classifier over its levels, so the response of `/classify` has everything: the
best level, the probabilities of all levels, and with two more fields the score. vLLM's `/score`
compares pairs of a query and a document, and has no probabilities.
"""

import time
import uuid
from collections.abc import Container, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from fastapi import FastAPI, Request
from fastapi.responses import Response
from PIL import Image
from pydantic import Field, model_validator
from typing_extensions import TypedDict

from owl2.engine.engine import Engine
from owl2.errors import ErrorCode, InputError
from owl2.scoring.methods import ScoringMethod
from owl2.scoring.scorer import ImageScore, ImageScorer, recognize
from owl2.serve import errors
from owl2.serve.admission import AdmissionController, run_unless
from owl2.serve.generation import RESPONSES, disconnected, encode_json
from owl2.serve.message_protocol import (
    MAX_MESSAGES,
    ChatCompletionContentPartImageParam,
    ChatCompletionMessageParam,
    find_media,
)
from owl2.serve.protocol import UsageInfo
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


class ClassificationData(TypedDict):
    """The rating of an image; `probs` are those of `labels`, the best label first.

    Compare2Score has no levels: `probs` are the preferences to the anchors, which are independent
    of each other, and `label` and `std` are null.
    """

    index: int
    label: str | None
    probs: list[float]
    num_classes: int
    labels: list[str]
    score: float
    std: float | None


class ClassificationResponse(TypedDict):
    """The ratings of all images, in order."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[ClassificationData]
    usage: UsageInfo


def find_methods(
    models: Mapping[str, tuple[str, str | None]],
    anchors: Sequence[Path],
    score_only: Container[str],
) -> dict[str, tuple[str | None, ScoringMethod]]:
    """The published checkpoints and the methods of the scoring models, by the names of the models.

    A model that compares images with anchors is skipped if there are none.

    Args:
        models: By name, a checkpoint or an adapter, and the base of an adapter.
        anchors: Files with anchor images.
        score_only: Names of models that give only scores.

    Raises:
        InputError: A model cannot be read, gives only scores and lacks its anchors, or no model
            uses the anchors.
    """
    methods = {}
    for name, (path, base) in models.items():
        try:
            checkpoint, method = recognize(path, base=base)
        except InputError as error:
            if error.code != ErrorCode.UNSUPPORTED:  # no scoring model
                raise
            continue
        if anchors or method.comparison is None:
            methods[name] = checkpoint, method
        elif name in score_only:
            raise InputError(
                f"{name} ({checkpoint}) compares images with five anchor images. Download "
                "VQA-CityU/Anchor_images, and pass the folder with --anchors.",
                ErrorCode.MISSING_IMAGE,
            )
    if anchors and not any(method.comparison for _, method in methods.values()):
        raise InputError(
            "--anchors is for Compare2Score, and no model is one. Remove the option.",
            ErrorCode.CONFLICT,
        )
    return methods


def make_scorers(
    engine: Engine,
    methods: Mapping[str, tuple[str | None, ScoringMethod]],
    anchors: Sequence[Path] = (),
) -> dict[str, ImageScorer]:
    """The scorers of the methods from `find_methods`. Raises as `ImageScorer`."""
    return {
        name: ImageScorer(
            engine,
            method,
            checkpoint=checkpoint,
            adapter=name if name in engine.adapters else None,
            anchors=anchors if method.comparison else (),
        )
        for name, (checkpoint, method) in methods.items()
    }


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
        counts = {"messages": len(body.messages), "images": len(media)}
        check_limits(admission.limits, admission.engine.context_length, **counts)
        policy = scorer.image_processor.image_policy
        with admission.admit() as stream:
            work = stream.compute(
                partial(images.open_all, media, policy), partial(_rate, scorer, body)
            )
            scores, num_tokens = await run_unless(disconnected(request), work)
            stream.finish(num_tokens)
        content = ClassificationResponse(
            id=f"classify-{uuid.uuid4().hex}",
            object="list",
            created=int(time.time()),
            model=body.model,
            data=[_data(index, score) for index, score in enumerate(scores)],
            usage=UsageInfo(prompt_tokens=num_tokens, completion_tokens=0, total_tokens=num_tokens),
        )
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
    return scorer.score_prompts(prompts), sum(len(one.ids) for own in prompts for one in own)


def _data(index: int, score: ImageScore) -> ClassificationData:
    label, probabilities = None, score.probabilities
    if score.preferences:
        anchors = enumerate(score.preferences, 1)
        probabilities = {f"anchor {number}": value for number, value in anchors}
    else:
        label = max(probabilities, key=probabilities.__getitem__)
    return ClassificationData(
        index=index,
        label=label,
        probs=list(probabilities.values()),
        num_classes=len(probabilities),
        labels=list(probabilities),
        score=score.score,
        std=score.std,
    )
