"""`owl2 info`: the parts of a model and their sizes."""

from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from owl2.cli.options import Base, Device, Dtype
from owl2.errors import ErrorCode, InputError
from owl2.serve.config import ServerConfig

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from rich.table import Table

    from owl2.checkpoints.adapters import AdapterFiles
    from owl2.model.configuration import Owl2Config

PART_PREFIXES = {
    "vision encoder": ("model.vision_model.",),
    "visual abstractor": ("model.visual_abstractor.",),
    "decoder": ("model.layers.", "model.norm."),
    "embeddings and head": ("model.embed_tokens.", "lm_head."),
}
REPORT_TEMPLATE = "open an issue with the template 'Verification of released weights'."
VISUAL_WEIGHTS = "decoder, visual weights (MAM)"


def info(
    model: Annotated[
        str | None,
        typer.Argument(help="Checkpoint: a directory or a hub id. Default: the released sizes."),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Load the weights, compare scores with the published ones, and print what to "
            "report.",
        ),
    ] = False,
    image: Annotated[
        list[str] | None,
        typer.Option(help="With --verify: file of a published image, instead of its URL."),
    ] = None,
    lora_modules: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=ADAPTER: also show the memory of an adapter, as for `owl2 serve`. "
            "Repeatable."
        ),
    ] = None,
    base: Base = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Show the parts of a model and their sizes, without loading its weights."""
    adapters = ServerConfig(model=model or "model", lora_modules=lora_modules).adapters
    table = size_table(model, adapters, base)
    if model is not None:
        check_files(model, base)
    Console().print(table)
    if not verify:
        return
    from owl2.engine.load_model import ModelArgs
    from owl2.scoring.verify import verify as verify_model

    if model is None:
        raise InputError("--verify needs a checkpoint.", ErrorCode.MISSING_VALUE)
    report, agrees = verify_model(ModelArgs(model, device, dtype, base=base), image or ())
    print(f"\n{report}\n\nPlease report this output, also if all scores agree: {REPORT_TEMPLATE}")
    if not agrees:
        raise typer.Exit(1)


def size_table(
    name_or_path: str | None = None,
    adapters: "Mapping[str, str | Path] | None" = None,
    base: "str | Path | None" = None,
) -> "Table":
    """A table of the parts of a checkpoint and its image policy, without its weights.

    Args:
        name_or_path: A directory or a hub id. Default: the released model's configuration.
        adapters: Directories or hub ids by name, whose memory is shown.
        base: The base model of an adapter, instead of the one that it names.

    Raises:
        InputError: There is no configuration of an mPLUG-Owl2, or an adapter cannot be read.
    """
    from rich.table import Table

    from owl2.checkpoints.adapters import find_adapter
    from owl2.checkpoints.config_file import read_config
    from owl2.engine.backends.native.build import description as kernels_description
    from owl2.memory import available_memory, format_size
    from owl2.model.configuration import Owl2Config
    from owl2.model.registry import get_model_type
    from owl2.processing.pretrained_files import read_image_policy, select_image_policy
    from owl2.runtime import cpu_supports_bf16

    if name_or_path is None:
        config = Owl2Config()
        policy, reason = select_image_policy({}, config, is_padded=False)
    else:
        config = read_config(name_or_path)
        policy, reason = read_image_policy(name_or_path, config)
    parts, vision = get_model_type(config.registry_key), config.visual_config.visual_model
    if anchors := parts.image_options.get("anchors"):
        policy, reason = f"crops ({anchors})", f"default of {config.registry_key}"
    shapes = {
        "vision encoder": f"{vision.num_hidden_layers} layers, width {vision.hidden_size}, "
        f"{vision.image_size} px, patch {vision.patch_size}",
        "visual abstractor": f"{config.visual_config.connector_shape}, "
        f"{config.num_image_tokens} embeddings per image",
        "decoder": f"{config.num_hidden_layers} layers, width {config.hidden_size}, "
        f"{config.num_attention_heads} heads ({config.num_key_value_heads} for keys and values), "
        f"context {config.max_position_embeddings}",
        VISUAL_WEIGHTS: f"{', '.join(config.separate_modules)} for images",
        "embeddings and head": f"vocabulary {config.vocab_size}"
        + (", tied" if config.tie_word_embeddings else ""),
    }
    counts = parameter_counts(config)
    title = f"{name_or_path or 'released sizes'}: {parts.title}"
    table = Table(title=title, title_justify="left")
    table.add_column("part")
    table.add_column("parameters", justify="right")
    table.add_column("shape")
    for part, shape in shapes.items():
        if part in counts:
            table.add_row(part, f"{counts[part]:,}", shape)
    table.add_row("images that are not square", policy, reason)
    table.add_row("authors' code", *authors_support(config))
    if name_or_path is not None:
        table.add_row("use with", *command_of(name_or_path, base))
    table.add_section()
    total = sum(counts.values())
    size = total * 2  # bytes
    shown = f"{size / 1e9:,.2f} GB" if size >= 1e8 else f"{size / 1e6:,.2f} MB"
    table.add_row("total", f"{total:,}", f"{shown} in 16 bits")
    table.add_section()
    for purpose, needed in memory_of_commands(config).items():
        note = ", and the largest weight file" if purpose.startswith("quantize") else ""
        table.add_row(purpose, format_size(needed), f"of memory{note}")
    own = find_adapter(name_or_path, {}) if name_or_path else None
    for label, needed, description in adapter_rows(own, adapters or {}):
        table.add_row(label, format_size(needed), description)
    table.add_row("available here", format_size(available_memory()), "of memory")
    table.add_row("CPU kernels", "", kernels_description())
    products = "by the CPU" if cpu_supports_bf16() else "in float32: this CPU has no instructions"
    table.add_row("bfloat16 products", "", products)
    return table


def check_files(name_or_path: str, base: "str | Path | None" = None) -> None:
    """Check that the tokenizer and the image settings of a checkpoint fit its ``config.json``.

    Args:
        base: The base model of an adapter, instead of the one that it names.

    Raises:
        InputError: They do not fit, or a file is invalid. Without a tokenizer nothing is checked.
    """
    from owl2.checkpoints.config_file import read_config
    from owl2.engine.load_model import ModelArgs, check_processor

    try:
        processor = ModelArgs(name_or_path, base=base).load_processor()
    except InputError as error:
        if error.code is ErrorCode.FILE_NOT_FOUND:
            return
        raise
    check_processor(read_config(name_or_path), processor)


def adapter_rows(
    own: "AdapterFiles | None", adapters: "Mapping[str, str | Path]"
) -> "Iterator[tuple[str, int, str]]":
    """What adapters add to the memory of the base model: label, bytes, and description.

    Args:
        own: The adapter in the model's directory.
        adapters: Beside the model, by name.
    """
    import torch

    from owl2.checkpoints.adapters import stored_tensors
    from owl2.engine.lora import find_adapters
    from owl2.runtime import select_dtype

    size = select_dtype(torch.device("cpu")).itemsize
    found = {"": own} if own else {}
    for name, files in (found | find_adapters(adapters)).items():
        _, tensors = stored_tensors(files.folder)
        parts = [f"LoRA of rank {files.config.r}", *(files.config.modules_to_save or ())]
        needed = sum(tensor.numel() for tensor in tensors.values()) * size
        yield f"adapter {name}".rstrip(), needed, f"of memory: {', '.join(parts)}"


def command_of(name_or_path: str, base: "str | Path | None" = None) -> tuple[str, str]:
    """The command for a checkpoint, and the published scoring model that it is or descends from."""
    from owl2.scoring.methods import CHECKPOINTS
    from owl2.scoring.scorer import recognize

    try:
        checkpoint, method = recognize(name_or_path, base=base)
    except InputError as error:
        if error.code is not ErrorCode.UNSUPPORTED:
            raise
        return "owl2 chat", ""
    known = CHECKPOINTS[str(checkpoint)]
    tasks = " and ".join(f"{task} of {kind}s" for task in known.tasks for kind in known.kinds)
    command = "owl2 rate, owl2 chat" if known.answers else "owl2 rate"
    return command, f"{checkpoint} ({method.name}): {tasks}"


def authors_support(config: "Owl2Config") -> tuple[str, str]:
    """Whether the authors' code loads a checkpoint, and the reason."""
    from owl2.checkpoints.export import shared_weights, unsupported_reason
    from owl2.checkpoints.hf_quantizer import stored_quantization

    if reason := unsupported_reason(config):
        return "no", reason.split(". ")[0]
    if stored_quantization(config) is not None:
        return "no", "quantized weights"
    if shared := shared_weights(config):
        return "owl2 export", f"shared: {', '.join(shared)}"
    return "loads as it is", ""


def memory_of_commands(config: "Owl2Config") -> dict[str, int]:
    """The bytes of memory that commands need for a model on this machine's CPU, by the command.

    `owl2 chat` needs its weights and a key-value cache. `owl2 quantize` has its default options.
    `owl2 plan` estimates training.
    """
    import torch

    from owl2.checkpoints.hf_quantizer import Owl2QuantizationConfig, stored_quantization
    from owl2.checkpoints.load_memory import loaded_size
    from owl2.engine.backends.weight_only_quantization import BITS
    from owl2.model.modeling import Owl2ForConditionalGeneration
    from owl2.quantization.calibrated_weights import calibration_memory
    from owl2.quantization.command import Calibration
    from owl2.quantization.quantize_checkpoint import quantization_memory
    from owl2.runtime import select_dtype

    with torch.device("meta"):
        model = Owl2ForConditionalGeneration(config)
    weights = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    dtype = select_dtype(torch.device("cpu"))
    stored = stored_quantization(config)
    if stored is not None:
        needed = {"chat": loaded_size(weights, dtype, stored)}
    else:
        needed = {f"chat, {str(dtype).removeprefix('torch.')}": loaded_size(weights, dtype)}
        for name, bits in BITS.items():
            size = loaded_size(weights, dtype, Owl2QuantizationConfig(bits))
            needed[f"chat --quantize {name}"] = size
        quantized = Owl2QuantizationConfig()
        needed["quantize"] = quantization_memory(weights, quantized)
        needed["quantize --method gptq"] = calibration_memory(
            config, weights, quantized, Calibration().num_tokens
        )
    sizes: Any = config  # the types of LLaMA's configuration include None
    width = sizes.num_key_value_heads * sizes.head_dim * sizes.num_hidden_layers
    return {**needed, "cache of 1,000 tokens": 1000 * 2 * width * dtype.itemsize}


def parameter_counts(config: "Owl2Config") -> dict[str, int]:
    """The number of parameters in each part; their sum is the total of the model.

    The model is created on the meta device and uses no memory. Tied weights count once.
    """
    import torch

    from owl2.model.modeling import Owl2ForConditionalGeneration

    with torch.device("meta"):
        model = Owl2ForConditionalGeneration(config)
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        part = next(part for part, start in PART_PREFIXES.items() if name.startswith(start))
        if part == "decoder" and ".multiway.1." in name:
            part = VISUAL_WEIGHTS
        counts[part] += parameter.numel()
    return dict(counts)
