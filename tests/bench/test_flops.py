"""The FLOP counts equal those of torch's FlopCounterMode, less the masked half of attention."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from owl2.bench.flops import (
    decode_bytes,
    decoder_flops,
    decoder_parameters,
    head_parameters,
    image_flops,
    training_flops,
)
from owl2.bench.workload import TrainingBatches


def counted(run):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


def rotary_flops(model, positions):
    """FLOPs of the rotary embedding: some versions of transformers use a matrix product."""
    return counted(lambda: model.model.rotary_emb(torch.zeros(1), positions[None]))


def test_flops_of_an_image(model, baseline, workload):
    pixels = workload.pixels(2)
    assert counted(lambda: baseline.encode(pixels)) == 2 * image_flops(model.config)


def test_flops_of_the_decoder(model, baseline, workload):
    config, length = model.config, 11
    ids = workload.text_ids(length)
    heads = config.num_attention_heads * config.head_dim
    masked = length * (length - 1) // 2 * 4 * heads * config.num_hidden_layers
    expected = decoder_flops(config, length, logits=length) + masked
    rotary = rotary_flops(model, torch.arange(length))
    assert counted(lambda: baseline.forward(ids)) == expected + rotary
    _, cache = baseline.forward(ids)
    step = counted(lambda: baseline.forward(ids[:, :1], cache=cache))
    assert step == decoder_flops(config, 1, cached=length) + rotary_flops(
        model, torch.tensor([length])
    )


def test_flops_of_a_training_step(model, workload):
    batches = TrainingBatches.create(workload)
    forward = sum(decoder_flops(model.config, length, logits=0) for length in batches.lengths)
    forward += 2 * batches.labels * head_parameters(model.config)
    forward += batches.images * image_flops(model.config)
    flops = training_flops(model.config, batches.lengths, batches.labels, batches.images)
    assert flops == 3 * forward


def test_bytes_of_a_decode_step(model):
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    matrices = {
        name: weight.numel()
        for name, weight in model.named_parameters()
        if any(part in name for part in names) and ".multiway.1." not in name
    }
    assert decoder_parameters(model.config) == sum(matrices.values())
    assert decode_bytes(model.config, 2) == 2 * (sum(matrices.values()) + 40 * 16)
