"""The GPU, its driver and the versions of the packages."""

import platform
from importlib.metadata import PackageNotFoundError, version

import torch
from step import Step, main

PACKAGES = (
    *("torch", "transformers", "accelerate", "peft", "bitsandbytes", "flash-attn", "deepspeed"),
    *("vllm", "triton"),
)


def check(step: Step) -> None:
    """Fails without a GPU, except in a dry run."""
    step.values["python"] = platform.python_version()
    for package in PACKAGES:
        try:
            step.values[package] = version(package)
        except PackageNotFoundError:
            step.values[package] = None
    step.values["cuda"] = torch.version.cuda
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        step.values["gpu"] = properties.name
        step.values["memory_bytes"] = properties.total_memory
        step.values["capability"] = f"{properties.major}.{properties.minor}"
        step.values["bfloat16"] = torch.cuda.is_bf16_supported()
    if not step.dry:
        step.check("GPUs", torch.cuda.device_count(), least=1)


if __name__ == "__main__":
    main(check)
