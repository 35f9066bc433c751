"""PEFT's default target modules for the model types of owl2: those of LLaMA or GPT-2.

PEFT has tables by model type and no function to extend them. They are extended when PEFT has been
imported, before or after owl2. Importing PEFT from here would take a second.
"""

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

from owl2.model.registry import MODEL_TYPES

TABLES = "peft.utils.constants"


def register_targets(constants: Any) -> None:
    """Add the model types to the tables of the module `TABLES`."""
    lora = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    for name, targets in vars(constants).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and "llama" in targets:
            for model_type, parts in MODEL_TYPES.items():
                # A method that PEFT does not have for GPT-2 gets the targets of LoRA.
                own = targets.get(parts.peft_names, lora[parts.peft_names])
                targets.setdefault(model_type, own)


class RegisterOnImport(MetaPathFinder):
    """Finds the module `TABLES` once, and calls `register_targets` after its code has run."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder`."""
        if name != TABLES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                register_targets(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]  # of this loader
        return spec


if TABLES in sys.modules:
    register_targets(sys.modules[TABLES])
else:
    sys.meta_path.insert(0, RegisterOnImport())
