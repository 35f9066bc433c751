"""Writes the golden model in every layout of checkpoints."""

import json
import shutil

import torch
from safetensors.torch import save_file

from tests.model.golden import FOLDER

GOLDEN = FOLDER / "model_mha"
LAYOUTS = ["pytorch_model-*.bin", "pytorch_model*.bin", "model-*.safetensors", "model*.safetensors"]


def write(folder, tensors, layout, shards=3):
    """Write the golden model with these tensors in one of the layouts of checkpoints."""
    folder.mkdir(exist_ok=True)
    shutil.copy(GOLDEN / "config.json", folder)
    stem, kind = layout.split("*")
    if stem.endswith("-"):  # shards with an index
        stem = stem[:-1]
        names = sorted(tensors)
        files = {}
        for i in range(shards):
            file = f"{stem}-{i + 1:05}-of-{shards:05}{kind}"
            part = {name: tensors[name] for name in names[i::shards]}
            save(part, folder / file)
            files |= dict.fromkeys(part, file)
        size = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": files}
        (folder / f"{stem}{kind}.index.json").write_text(json.dumps(index), encoding="utf-8")
    else:
        save(tensors, folder / f"{stem}{kind}")
    return folder


def save(tensors, path):
    if path.suffix == ".bin":
        torch.save(tensors, path)
    else:
        save_file(tensors, path, metadata={"format": "pt"})
