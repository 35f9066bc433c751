"""TRL's trainers with images, unmodified: supervised fine-tuning, DPO, KTO, and GRPO."""

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import owl2  # noqa: F401  # registers the model
from tests.peers.subjects import MEMBERS, TITLES, checkpoint

pytestmark = pytest.mark.peers

COLORS = ["red", "green", "blue", "white"]


def messages(role, text, images=0):
    content = [{"type": "image"}] * images + [{"type": "text", "text": text}]
    return [{"role": role, "content": content}]


def row(color, columns):
    prompt = messages("user", "what is this?", images=1)
    answer = messages("assistant", f"a {color} circle")
    cells = {
        "images": [Image.new("RGB", (8, 8), color)],
        "messages": prompt + answer,
        "prompt": prompt,
        "completion": answer,
        "chosen": answer,
        "rejected": messages("assistant", "lower newer"),
        "label": color == "red",
    }
    return {name: cells[name] for name in ("images", *columns)}


def dataset(*columns):
    return Dataset.from_list([row(color, columns) for color in COLORS])


def length(prompts, completions, **_):
    return [float(len(completion[0]["content"])) for completion in completions]


CASES = {
    "sft_messages": ("SFT", ["messages"], {}),
    "sft_completion": ("SFT", ["prompt", "completion"], {}),
    "sft_neftune": ("SFT", ["messages"], {"neftune_noise_alpha": 5.0}),
    "dpo": ("DPO", ["prompt", "chosen", "rejected"], {}),
    "kto": ("KTO", ["prompt", "completion", "label"], {}),
    "grpo": ("GRPO", ["prompt"], {"num_generations": 2, "max_completion_length": 4}),
}
# The other trainers pass only the inputs that TRL knows, and not those of DocOwl.
RUNS = [
    pytest.param(subject, case, id=f"{title}-{case}")
    for subject, title in TITLES.items()
    for case in CASES
    if subject in ("owl2", "llava")
    or case in ("sft_messages", "sft_completion")
    or (subject, case) == ("owl2_1", "dpo")
]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(("subject", "case"), RUNS)
def test_trainer_changes_the_weights(subject, case, lora, tmp_path):
    trainer, columns, options = CASES[case]
    targets = ["c_attn"] if subject == "owl2_1" else ["q_proj", "k_proj", "v_proj"]
    path = checkpoint(subject)
    model = AutoModelForImageTextToText.from_pretrained(path)
    processor = AutoProcessor.from_pretrained(path)
    rewards = {"reward_funcs": length} if trainer == "GRPO" else {}
    config = getattr(trl, f"{trainer}Config")(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        max_steps=2,
        learning_rate=0.1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        **({"max_length": None} if trainer != "GRPO" else {}),
        **options,
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run = getattr(trl, f"{trainer}Trainer")(
        model=model,
        args=config,
        train_dataset=dataset(*columns),
        processing_class=processor,
        peft_config=LoraConfig(target_modules=targets) if lora else None,
        **rewards,
    )
    run.train()
    if lora:
        changed = [n for n, p in run.model.named_parameters() if "lora_B" in n and p.abs().sum()]
    else:
        after = run.model.state_dict()
        changed = [name for name, old in before.items() if not torch.equal(old, after[name])]
    assert any(targets[0] in name for name in changed)
    if subject in MEMBERS and trainer != "GRPO":  # images are used
        assert any("multiway.1" in name for name in changed)
