"""Scores of images by the Q-Align of IQA-PyTorch (pyiqa), on a small checkpoint, as JSON.

    python pyiqa_scores.py CHECKPOINT IMAGE...

It is a process of its own, because pyiqa replaces the LLaMA of transformers. Only the files of
Q-Align are imported: all of pyiqa needs torchvision, which has no build for every torch. Three
things have stand-ins: two conversions of torchvision; icecream, which nothing calls; and
`invert_attention_mask`, which pyiqa calls and transformers removed after 5.16.
"""

import importlib
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import CLIPImageProcessor, LlamaTokenizer, PreTrainedModel
from transformers.models.llama import modeling_llama  # noqa: F401  # before the stand-ins

HUB_ID = "q-future/one-align"


def add_module(name, **content):
    module = ModuleType(name)
    vars(module).update(content)
    sys.modules[name] = module


def to_image(pixels):
    """`to_pil_image` of torchvision for floats (3, H, W)."""
    return Image.fromarray(pixels.mul(255).byte().permute(1, 2, 0).numpy())


def to_tensor(image):
    """`to_tensor` of torchvision for an RGB image, which pyiqa applies to files."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(255)


def invert_attention_mask(model, mask):
    """0 for positions that are used, and the lowest value for others: (B, 1, 1, S)."""
    return (1 - mask[:, None, None, :].to(model.dtype)) * torch.finfo(model.dtype).min


def use_checkpoint(cls, folder):
    """The class loads the folder instead of the hub id that pyiqa has in its code."""
    load = cls.from_pretrained.__func__

    def from_pretrained(own, name, *args, **options):
        return load(own, folder if name == HUB_ID else name, *args, **options)

    cls.from_pretrained = classmethod(from_pretrained)


def load_metric(folder):
    """pyiqa's `QAlign` with the weights of a folder, in float32."""
    root = Path(find_spec("pyiqa").origin).parent
    add_module("icecream", ic=None)
    functional = SimpleNamespace(to_pil_image=to_image)
    add_module("torchvision")
    add_module("torchvision.transforms", functional=functional)
    add_module("torchvision.transforms.functional", to_pil_image=to_image)
    for package in ("pyiqa", "pyiqa.archs", "pyiqa.utils"):
        add_module(package, __path__=[str(root.joinpath(*package.split(".")[1:]))])
    if not hasattr(PreTrainedModel, "invert_attention_mask"):
        PreTrainedModel.invert_attention_mask = invert_attention_mask
    arch = importlib.import_module("pyiqa.archs.qalign_arch")
    for cls in (CLIPImageProcessor, LlamaTokenizer, arch.MPLUGOwl2LlamaForCausalLM):
        use_checkpoint(cls, folder)
    arch.QAlign._get_model_dtype = staticmethod(lambda dtype: torch.float32)  # instead of float16
    metric = arch.QAlign()
    metric.model.weight_tensor = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])  # else float16
    return metric.eval()


def main(folder, *images):
    metric = load_metric(folder)
    pixels = [to_tensor(Image.open(image).convert("RGB"))[None] for image in images]
    scores = {
        task: [metric(one, task_=task).item() for one in pixels]
        for task in ("quality", "aesthetic")
    }
    print(json.dumps({"transformers": transformers.__version__, "scores": scores}))


if __name__ == "__main__":
    main(*sys.argv[1:])
