"""mPLUG-Owl2 in vLLM: the plug-in that `vllm serve DIR` finds once this package is installed."""


def register() -> None:
    """Make the model known to vLLM; called by its entry point `vllm.general_plugins`."""
    raise NotImplementedError  # being written
