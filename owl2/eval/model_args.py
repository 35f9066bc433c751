"""The model to evaluate, with the ablations of the paper: no MAM, another image size."""

from dataclasses import dataclass

from owl2.checkpoints.adapters import has_adapter
from owl2.engine.engine import Engine
from owl2.engine.load_model import load_model
from owl2.errors import ErrorCode, InputError
from owl2.model.variants import as_no_mam
from owl2.processing.image_processing import ImagePolicy, Owl2ImageProcessor
from owl2.processing.processor import Owl2Processor
from owl2.runtime import select_device
from owl2.workers import WorkerRank


@dataclass(frozen=True)
class EvalModelArgs:
    """A checkpoint and what to change after it is loaded; the files are not changed.

    Attributes:
        model: A directory or a hub id.
        device, dtype: As in `owl2.engine.load_model`.
        mam: False: use the text weights for images as well.
        image_size: Pixels; replaces that of the checkpoint.
        image_policy: resize or pad; replaces that of the task and of the checkpoint.
    """

    model: str
    device: str | None = None
    dtype: str | None = None
    mam: bool = True
    image_size: int | None = None
    image_policy: ImagePolicy | None = None

    def load(self, worker: WorkerRank) -> Engine:
        """The engine; each of several processes uses its own GPU.

        Raises:
            InputError: The checkpoint, device, dtype or policy does not exist; the image size is
                not a multiple of the patch size; the MAM of a LoRA cannot be disabled.
        """
        device = worker.device(str(select_device(self.device)))
        model = load_model(self.model, device, self.dtype)
        processor = Owl2Processor.from_pretrained(self.model, image_policy=self.image_policy)
        if not self.mam:
            if has_adapter(model):
                raise InputError(
                    f"--no-mam does not work with the LoRA {self.model}. Merge it first with "
                    "`owl2 merge`.",
                    ErrorCode.UNSUPPORTED,
                )
            model = as_no_mam(model)
        if self.image_size is not None:
            model.set_image_size(self.image_size)
            old = processor.image_processor
            processor.image_processor = Owl2ImageProcessor(
                self.image_size, old.policy, old.image_mean, old.image_std, old.max_pixels
            )
        return Engine(model, processor, enable_prefix_caching=True)
