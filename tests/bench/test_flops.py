"""The FLOP counts equal those of torch's FlopCounterMode, less the masked half of attention."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from owl2.bench.flops import decode_bytes, decoder_flops, image_flops


def counted(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def rotary_flops(model, positions):
    """FLOPs of the rotary embedding: some versions of transformers use a matrix product."""
    return counted(lambda: model.model.rotary_emb(torch.zeros(1), positions[None]))


def test_flops_of_an_image(baseline, workload):
    pixels = workload.pixels(2)
    assert counted(lambda: baseline.get_image_features(pixels)) == 2 * image_flops(baseline)


def test_flops_of_the_decoder(model, baseline, workload):
    config, length = model.config, 11
    ids = workload.text_ids(length)
    heads = config.num_attention_heads * config.head_dim
    masked = length * (length - 1) // 2 * 4 * heads * config.num_hidden_layers
    expected = decoder_flops(model, length, logits=length) + masked
    rotary = rotary_flops(model, torch.arange(length))
    assert counted(lambda: baseline(ids)) == expected + rotary
    cache = baseline(ids, use_cache=True).past_key_values
    step = counted(lambda: baseline(ids[:, :1], past_key_values=cache))
    assert step == decoder_flops(model, 1, cached=length) + rotary_flops(
        model, torch.tensor([length])
    )


def test_bytes_of_a_decode_step(model):
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    weights = sum(
        weight.numel()
        for name, weight in model.named_parameters()
        if any(part in name for part in names) and ".multiway.1." not in name
    )
    assert decode_bytes(model, 2) == 2 * (weights + 40 * 16)
