"""llama.cpp through the C functions of `llama-cpp-python`: all sequences in one batch per step.

`write_gguf` converts the decoder to a GGUF file without a vocabulary. llama.cpp's own quantizer
makes the files with 8 bits (Q8_0) and 4 bits (Q4_0; llama.cpp stores the head in 6 bits then).
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engines import Answer, Prompts, Task

PACKAGES = ("llama_cpp_python",)
BITS = (16, 8, 4)
GGUF = "llama.gguf"


def write_gguf(folder: Path, dtype: str) -> None:
    """Write FOLDER/llama.gguf from FOLDER/llama, with matrices in bfloat16, float16 or float32.

    Needs the packages gguf, safetensors and torch.
    """
    import gguf
    import torch

    config = json.loads((folder / "llama" / "config.json").read_text())
    writer = gguf.GGUFWriter(folder / GGUF, "llama")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    kinds = {
        "bfloat16": gguf.GGMLQuantizationType.BF16,
        "float16": gguf.GGMLQuantizationType.F16,
        "float32": gguf.GGMLQuantizationType.F32,
    }
    for name, tensor in _gguf_tensors(folder / "llama", config):
        kind = dtype if tensor.dim() == 2 else "float32"
        values = tensor.to(getattr(torch, kind)).contiguous().view(torch.uint8).numpy()
        writer.add_tensor(name, values, raw_dtype=kinds[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_tensors(directory: Path, config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names in GGUF and tensors. llama.cpp rotates neighboring values, transformers two halves."""
    import gguf
    from safetensors import safe_open

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118  # not a dict: it has no __iter__
                tensor = weights.get_tensor(name)
                count = heads.get(name.split(".")[-2])
                if count is not None:
                    halves = tensor.unflatten(0, (count, 2, -1))  # (heads, 2, width / 2, K)
                    tensor = halves.transpose(1, 2).flatten(0, 2)
                yield names.get_name(name, try_suffixes=(".weight",)), tensor


def quantize(lib: Any, task: Task) -> Path:
    """The file with `task.bits`; written on first use."""
    source = task.folder / GGUF
    if task.bits == 16:
        return source
    path = source.with_name(f"llama-{task.bits}.gguf")
    if not path.exists():
        params = lib.llama_model_quantize_default_params()
        params.nthread = task.threads
        kinds = {8: lib.LLAMA_FTYPE_MOSTLY_Q8_0, 4: lib.LLAMA_FTYPE_MOSTLY_Q4_0}
        params.ftype = kinds[task.bits]
        if lib.llama_model_quantize(bytes(source), bytes(path), params):
            path.unlink(missing_ok=True)
            raise RuntimeError(f"{source} cannot be quantized to {task.bits} bits")
    return path


def prepare(task: Task) -> Answer:
    """See `engines`."""
    import llama_cpp as lib
    import numpy as np

    lib.llama_backend_init()
    path = quantize(lib, task)
    model = lib.llama_model_load_from_file(bytes(path), lib.llama_model_default_params())
    params = lib.llama_context_default_params()
    params.n_ctx = params.n_batch = task.requests * task.positions
    params.n_seq_max = task.requests
    params.n_threads = params.n_threads_batch = task.threads
    context = lib.llama_init_from_model(model, params)
    if not context:
        raise RuntimeError(f"{path} cannot be loaded")
    batch = lib.llama_batch_init(params.n_batch, 0, 1)
    vocabulary = task.config["vocab_size"]

    def step(rows: Prompts, position: int) -> list[int]:
        """Compute the tokens of each sequence from a position; returns the likeliest next ids."""
        last = []
        batch.n_tokens = 0
        for sequence, row in enumerate(rows):
            for offset, token in enumerate(row):
                index = batch.n_tokens
                batch.token[index], batch.pos[index] = token, position + offset
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
                batch.logits[index] = offset == len(row) - 1
                batch.n_tokens += 1
            last.append(batch.n_tokens - 1)
        if code := lib.llama_decode(context, batch):
            raise RuntimeError(f"llama_decode returned {code}")
        logits = (lib.llama_get_logits_ith(context, index) for index in last)
        return [int(np.ctypeslib.as_array(row, (vocabulary,)).argmax()) for row in logits]

    def answer(prompts: Prompts, new: int) -> list[list[int]]:
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        steps, position = [step(prompts, 0)], len(prompts[0])
        while len(steps) < new:
            steps.append(step([[token] for token in steps[-1]], position))
            position += 1
        return [list(ids) for ids in zip(*steps, strict=True)]

    return answer
