"""A model large enough to measure, its training data, and the peak memory of a run."""

import gc
import io

from rich.console import Console
from torch.profiler import ProfilerActivity, profile

from owl2.train.recipe import Recipe
from owl2.train.run import train
from owl2.train.trainer import Owl2Trainer
from tests.train.tiny import SMALL_RUN, make_world

LENGTH = 96
# Wide for its depth, so that weights and activations exceed the memory inside kernels.
WIDE = {
    "vocab_size": 1200,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 256,
    "vision": {
        "hidden_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 384,
        "image_size": 40,
        "patch_size": 5,
    },
    "abstractor": {
        "hidden_size": 96,
        "encoder_hidden_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 256,
        "num_learnable_queries": 8,
    },
}
# One layer per part, for traces whose asserted values do not need more.
SHALLOW = WIDE | {
    "num_hidden_layers": 1,
    "vision": WIDE["vision"] | {"num_hidden_layers": 1},
    "abstractor": WIDE["abstractor"] | {"num_hidden_layers": 1},
}


def make_wide_world(folder):
    """Write a wide model, and images with long or short answers."""
    answers = [" ".join(["red"] * (20 if n % 4 == 3 else 3 * LENGTH)) for n in range(16)]
    make_world(folder, answers, image_size=40, num_image_tokens=9, **WIDE)


def make_recipe(folder, output, **settings):
    """A run of two steps over that data."""
    own = {
        "model": str(folder / "start"),
        "output": str(output),
        "data": [{"file": str(folder / "data.json")}],
        "max_length": LENGTH,
        "max_steps": 2,
        "batch_size": 8,
        "warmup_steps": 0,
    }
    return Recipe(**SMALL_RUN | own | settings)


def measured_peak(recipe, monkeypatch):
    """The peak of the bytes that torch's allocator has allocated while a recipe is trained."""
    training, peaks = Owl2Trainer.train, []

    def measured(self, *args, **kwargs):
        gc.collect()  # memory of an earlier run would be freed in this one
        tensors = (*self.model.parameters(), *self.model.buffers())
        storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors}
        live = peak = sum(tensor.untyped_storage().nbytes() for tensor in storages.values())
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            result = training(self, *args, **kwargs)
        for event in profiler.profiler.kineto_results.events():
            if event.name() == "[memory]":
                live += event.nbytes()
                peak = max(peak, live)
        peaks.append(peak)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(Owl2Trainer, "train", measured)
        train(recipe, Console(file=io.StringIO()))
    return peaks[0]
