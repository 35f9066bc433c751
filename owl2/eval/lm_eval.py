"""The command line of lm-eval with the model `owl2`.

``python -m owl2.eval.lm_eval --model owl2 --model_args pretrained=DIR --tasks arc_easy``

lm-eval 0.4.13 has no entry points for models, so that the model is registered in its process.
"""

import sys
from importlib import import_module

from owl2.errors import InputError


def register() -> None:
    """Register the model `owl2` in this process; repeated calls have no effect."""
    from lm_eval.api.registry import model_registry

    # This registers the models of lm-eval, which it does not do any more once ours exists.
    import_module("lm_eval.models")
    if "owl2" not in model_registry:
        model_registry.register("owl2", target="owl2.eval.adapters.lm_eval_model:LmEvalModel")


def main() -> None:
    """Run lm-eval with the arguments of this process; errors of the user exit with code 2."""
    try:
        from lm_eval.__main__ import cli_evaluate

        register()
        cli_evaluate()
    except (InputError, ModuleNotFoundError) as error:
        is_missing = isinstance(error, ModuleNotFoundError)
        hint = ": pip install 'owl2-vlm[eval]'" if is_missing else ""
        print(f"error: {error}{hint}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
