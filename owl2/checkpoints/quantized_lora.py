"""LoRA on a quantized Linear. Imported only with peft, which takes a second."""

from typing import Any

from peft.tuners.lora import Linear

from owl2.errors import ErrorCode, InputError


class QuantizedLoraLinear(Linear):
    """LoRA on a `QuantizedLinear`; peft calls its forward pass like that of a Linear."""

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    def merge(self, *_: Any, **__: Any) -> None:
        """Not possible: the scales of the quantized weight do not fit the sum.

        Raises:
            InputError: Always.
        """
        raise InputError(
            "an adapter cannot be merged into quantized weights; give the unquantized base model "
            "with base=... (--base)",
            ErrorCode.UNSUPPORTED,
        )
