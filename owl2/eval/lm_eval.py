"""lm-eval's own command line, which knows the model `owl2`:

``python -m owl2.eval.lm_eval --model owl2 --model_args pretrained=DIR --tasks arc_easy``

lm-eval 0.4.13 looks for models in no entry points, so that one has to be registered in its process;
lmms-eval does look (``python -m lmms_eval --model owl2``).
"""

import sys
from importlib import import_module

from owl2.errors import InputError


def register() -> None:
    """Makes `owl2` one of lm-eval's models in this process; twice is once."""
    from lm_eval.api.registry import model_registry

    # What enters lm-eval's own models; it would not do so any more once ours is there.
    import_module("lm_eval.models")
    if "owl2" not in model_registry:
        model_registry.register("owl2", target="owl2.eval.adapters.lm_eval_model:Owl2Text")


def main() -> None:
    """Runs lm-eval on this process's arguments. What a user got wrong ends with exit code 2."""
    try:
        from lm_eval.__main__ import cli_evaluate

        register()
    except ModuleNotFoundError as error:
        sys.exit(_told(f"{error.name} is not installed: pip install 'owl2-vlm[eval]'"))
    try:
        cli_evaluate()
    except InputError as error:
        sys.exit(_told(str(error)))


def _told(line: str) -> int:
    print(f"error: {line}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
