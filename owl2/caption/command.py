"""`owl2 caption`: a caption, or any answer, for each image of a folder.

::

    folder ──sorted names──► shard of this process, without finished ones
    ──Engine in batches, or vLLM──► captions ──ShardedJsonl──► captions.jsonl
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console

from owl2.data.datasets.prompts import CAPTION_PROMPT
from owl2.data.image_folder import find_images
from owl2.data.image_records import Computed, ImageRecords
from owl2.engine.engine import Engine
from owl2.engine.load_model import ModelArgs
from owl2.engine.offline import output_all
from owl2.engine.output import CompletionChunk
from owl2.errors import ErrorCode, InputError
from owl2.processing.messages import user_message
from owl2.workers import WorkerRank


@dataclass(frozen=True)
class CaptionConfig:
    """The options of `owl2 caption`.

    Attributes:
        output: The JSONL file to write.
        prompt: The question about each image.
        engine: See `ModelArgs.check_engine`.
        batch_size: Images per batch of the engine "owl2".
        structured_outputs: As `Engine.chat` takes it. With a JSON schema, captions are JSON values.
    """

    folder: Path
    model_args: ModelArgs
    output: Path
    prompt: str = CAPTION_PROMPT
    recursive: bool = False
    engine: str = "owl2"
    max_new_tokens: int = 64
    batch_size: int = 32
    structured_outputs: Mapping[str, Any] | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that the captions depend on, except for rounding errors."""
        structured = self.structured_outputs
        return {
            **self.model_args.settings,
            "prompt": self.prompt,
            "max_new_tokens": self.max_new_tokens,
        } | ({"structured_outputs": structured} if structured else {})

    @property
    def records(self) -> ImageRecords:
        """The run."""
        return ImageRecords(self.output, self.settings, "owl2 caption", "captions")


def caption(config: CaptionConfig, console: Console) -> None:
    """Caption the images of a folder; a later run captions the images that have none or changed.

    Raises:
        InputError: The folder does not exist or has no images; see `ImageRecords.run`,
            `Engine.from_pretrained` and `Engine.chat`.
    """
    config.model_args.check_engine(config.engine)
    if config.engine == "vllm" and config.structured_outputs:
        raise InputError("--engine vllm has no --json-schema and --choice.", ErrorCode.CONFLICT)

    def compute(names: Sequence[str], worker: WorkerRank) -> Iterator[Computed]:
        for answer in _captions(config, names, worker):
            yield answer if isinstance(answer, InputError) else {"caption": answer}

    records = config.records  # before the folder is read: the settings read the weights
    records.run(find_images(config.folder, config.recursive), compute, console)


def _captions(config: CaptionConfig, names: Sequence[str], worker: WorkerRank) -> Iterator[Any]:
    """The caption of each image, in order, or the error that prevents it."""
    paths = (config.folder / name for name in names)
    conversations = ([user_message(config.prompt, [path])] for path in paths)
    # Greedy, so that an image has the same caption in every run.
    sampling: dict[str, Any] = {"do_sample": False, "max_new_tokens": config.max_new_tokens}
    if config.engine == "vllm":
        from owl2.vllm_plugin.offline import answer_all

        args = config.model_args
        return answer_all(args.model, conversations, sampling, dtype=args.dtype or "auto")
    engine = load_engine(config, worker)
    if config.structured_outputs:
        sampling["structured_outputs"] = config.structured_outputs
        engine.sampling_params(**sampling)  # an error would occur for every image
    outputs = output_all(engine, conversations, config.batch_size, **sampling)
    return (_value(output, config.structured_outputs or {}) for output in outputs)


def _value(output: CompletionChunk | InputError, structured_outputs: Mapping[str, Any]) -> Any:
    """The answer, or the JSON value that it contains; an error if it is not complete."""
    if isinstance(output, InputError):
        return output
    if not structured_outputs:
        return output.text
    if output.finish_reason == "length":
        return InputError(
            f"The answer is not complete after {output.num_tokens} tokens. Increase "
            "--max-new-tokens.",
            ErrorCode.TOO_LONG,
        )
    if "json" not in structured_outputs:
        return output.text
    try:
        value = json.loads(output.text)
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError) as error:  # for example a number above 1e308
        return InputError(f"The answer cannot be stored: {error}.", ErrorCode.INVALID_FORMAT)
    return value


def load_engine(config: CaptionConfig, worker: WorkerRank) -> Engine:
    """The engine; each of several processes uses its own GPU.

    Raises:
        InputError: The checkpoint cannot be loaded, or the prompt is invalid.
    """
    args = config.model_args.for_worker(worker)
    engine = Engine(args.load_model(), args.load_processor())  # no prefix cache: all images differ
    # An error in the prompt would occur for every image: find it first.
    size = engine.processor.image_processor.edge
    engine.encode([user_message(config.prompt, [Image.new("RGB", (size, size))])])
    return engine
