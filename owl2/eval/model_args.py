"""The model to evaluate, with the paper's ablations as switches: no MAM, another image size."""

from dataclasses import dataclass

import torch

from owl2.checkpoints.adapters import has_adapter
from owl2.engine.engine import Engine
from owl2.engine.load_model import load_model
from owl2.errors import InputError
from owl2.eval.sharding import Team
from owl2.model.variants import as_no_mam
from owl2.processing.image_processing import ImagePolicy, Owl2ImageProcessor
from owl2.processing.processor import Owl2Processor
from owl2.runtime import select_device


@dataclass(frozen=True)
class Subject:
    """Which model, and what about it is changed; the checkpoint stays as it is.

    Attributes:
        model: a directory or a hub id.
        device, dtype: as `owl2.engine.load_model` takes them; None: what suits.
        mam: False: the text weights for images, too.
        image_size: pixels, instead of the checkpoint's.
        image_policy: resize or pad, instead of the recipe's or the checkpoint's.
    """

    model: str
    device: str | None = None
    dtype: str | None = None
    mam: bool = True
    image_size: int | None = None
    image_policy: ImagePolicy | None = None

    def load(self, team: Team) -> Engine:
        """Its engine; where several processes have a GPU each, on this process's own.

        Raises:
            InputError: no such checkpoint, device, dtype or policy; an image size that is no
                multiple of the patch; no MAM to be switched off in a LoRA.
        """
        device = select_device(self.device)
        if device == torch.device("cuda") and team.size > 1:
            device = select_device(f"cuda:{team.local_rank}")
        model = load_model(self.model, device, self.dtype)
        processor = Owl2Processor.from_pretrained(self.model, image_policy=self.image_policy)
        if not self.mam:
            if has_adapter(model):
                raise InputError(
                    f"{self.model} is a LoRA, whose parts cannot be told by modality: merge it "
                    "first (`owl2 merge`), or leave out --no-mam."
                )
            model = as_no_mam(model)
        if self.image_size is not None:
            model.set_image_size(self.image_size)
            was = processor.image_processor
            processor.image_processor = Owl2ImageProcessor(
                self.image_size, was.policy, was.image_mean, was.image_std, was.max_pixels
            )
        return Engine(model, processor, enable_prefix_caching=True)
