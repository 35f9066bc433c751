"""The name `owl2` in lmms-eval: what ``pyproject.toml`` enters into its group of models."""

from typing import Any


def manifest() -> Any:
    """lmms-eval's description of our model; the model itself is imported when it is asked for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("owl2", simple_class_path="owl2.eval.adapters.lmms_eval.Owl2Multimodal")
