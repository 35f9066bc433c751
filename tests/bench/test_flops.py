"""Work is counted as torch counts the textbook's, less what causality spares."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from owl2.bench.flops import (
    decode_bytes,
    decoder_flops,
    decoder_matrix,
    head_matrix,
    image_flops,
    training_flops,
)
from owl2.bench.workload import Batches


def counted(run):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


def turning(model, positions):
    """What transformers' positions cost; some of its versions multiply matrices for them."""
    return counted(lambda: model.model.rotary_emb(torch.zeros(1), positions[None]))


def test_a_image(model, textbook, workload):
    pixels = workload.pixels(2)
    assert counted(lambda: textbook.encode(pixels)) == 2 * image_flops(model.config)


def test_the_decoder(model, textbook, workload):
    config, length = model.config, 11
    ids = workload.words(length)
    heads = config.num_attention_heads * config.head_dim
    unseen = length * (length - 1) // 2 * 4 * heads * config.num_hidden_layers
    expected = decoder_flops(config, length, logits=length) + unseen
    turned = turning(model, torch.arange(length))
    assert counted(lambda: textbook.forward(ids)) == expected + turned
    _, cache = textbook.forward(ids)
    step = counted(lambda: textbook.forward(ids[:, :1], cache=cache))
    assert step == decoder_flops(config, 1, before=length) + turning(model, torch.tensor([length]))


def test_a_training_step_is_three_times_the_labelled_forward(model, workload):
    batches = Batches.of(workload)
    forward = sum(decoder_flops(model.config, length, logits=0) for length in batches.lengths)
    forward += 2 * batches.labels * head_matrix(model.config)
    forward += batches.images * image_flops(model.config)
    flops = training_flops(model.config, batches.lengths, batches.labels, batches.images)
    assert flops == 3 * forward


def test_bytes_of_a_step_are_those_of_the_text_matrices(model):
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    matrices = {
        name: weight.numel()
        for name, weight in model.named_parameters()
        if any(part in name for part in names) and ".multiway.1." not in name
    }
    assert decoder_matrix(model.config) == sum(matrices.values())
    assert decode_bytes(model.config, 2) == 2 * (sum(matrices.values()) + 40 * 16)
