"""The entry point of the model `owl2` in lmms-eval (group ``lmms_eval.models``)."""

from typing import Any


def manifest() -> Any:
    """The description of the model; lmms-eval imports the class when it is requested."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("owl2", simple_class_path="owl2.eval.adapters.lmms_eval.LmmsEvalModel")
