"""Tutorials of transformers and PEFT with only the model's name changed."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

import owl2  # noqa: F401  # registers the model
from tests.peers.subjects import TITLES, checkpoint

pytestmark = pytest.mark.peers
SUBJECTS = pytest.mark.parametrize("subject", TITLES, ids=TITLES.values())
COLORS = ["red", "green", "blue", "white"] * 2


def load(subject):
    path = checkpoint(subject)
    return AutoModelForImageTextToText.from_pretrained(path), AutoProcessor.from_pretrained(path)


def conversation(color, answer=True):
    question = {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": "what is this?"}],
    }
    text = {"role": "assistant", "content": [{"type": "text", "text": f"a {color} circle"}]}
    return [question, text] if answer else [question]


def make_collator(processor):
    """As in the tutorial: texts by the chat template, labels are the ids without the padding."""

    def collate(colors):
        texts = [processor.apply_chat_template(conversation(color)) for color in colors]
        images = [[Image.new("RGB", (8, 8), color)] for color in colors]
        batch = processor(text=texts, images=images, return_tensors="pt", padding=True)
        labels = batch["input_ids"].clone()
        labels[labels == processor.tokenizer.pad_token_id] = -100
        labels[labels == processor.image_token_id] = -100
        batch["labels"] = labels
        return batch

    return collate


def train(model, processor, folder, epochs=15):
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        num_train_epochs=epochs,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        remove_unused_columns=False,
        report_to=[],
        use_cpu=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=COLORS,
        data_collator=make_collator(processor),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.97 * losses[0]


@SUBJECTS
def test_fine_tuning_of_vision_language_models(subject, tmp_path):
    """Train, save, load, and generate."""
    model, processor = load(subject)
    # Byte-level tokens, and images of several squares, are learned in more steps.
    train(model, processor, tmp_path / "run", 15 if subject in ("owl2", "llava") else 45)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    text = processor.apply_chat_template(conversation("red", False), add_generation_prompt=True)
    inputs = processor(text=text, images=Image.new("RGB", (8, 8), "red"), return_tensors="pt")
    options = {"max_new_tokens": 16, "do_sample": False}
    ids = loaded.generate(**inputs, **options)
    assert torch.equal(ids, model.generate(**inputs, **options))
    answer = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "circle" in answer


@SUBJECTS
def test_lora_quick_start(subject, tmp_path):
    """PEFT's quick start: train an adapter, save it, and load it into the base model."""
    model, processor = load(subject)
    targets = ["c_attn"] if subject == "owl2_1" else ["q_proj", "k_proj", "v_proj"]
    config = LoraConfig(r=8, lora_alpha=32, lora_dropout=0.0, target_modules=targets)
    model = get_peft_model(model, config)
    trainable, total = model.get_nb_trainable_parameters()
    assert 0 < trainable < 0.3 * total
    train(model, processor, tmp_path / "run")
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load(subject)[0], tmp_path / "adapter").eval()
    batch = make_collator(processor)(COLORS[:2])
    model.eval()
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(**batch).logits, model(**batch).logits, atol=1e-4, rtol=1e-4)
