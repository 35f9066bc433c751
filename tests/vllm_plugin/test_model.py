"""vLLM's greedy tokens are the Engine's, in float32: alone, together, cut up and remembered."""

import json
import subprocess
import sys

import pytest

from tests.vllm_plugin.conftest import (
    QUERIES,
    ask,
    conversations,
    engine_tokens,
    image,
    make_checkpoint,
    running,
    vllm_tokens,
)

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def expected(engine):
    return [engine_tokens(engine, messages) for messages in conversations()]


def test_each_alone(llm, expected):
    # First of all tests, so that nothing is remembered yet.
    assert [vllm_tokens(llm, [messages])[0] for messages in conversations()] == expected
    assert len({tuple(tokens) for tokens in expected}) == 16  # so the images are seen


def test_sixteen_together_with_their_prefixes_remembered(llm, expected):
    assert vllm_tokens(llm, conversations()) == expected


def test_sixteen_together_with_nothing_remembered(llm, expected):
    assert llm.reset_prefix_cache()
    assert vllm_tokens(llm, conversations()) == expected


def test_a_remembered_prompt_with_another_image_is_another_prompt(llm, engine):
    question = "what is this? is it red or blue?"
    for number in (1, 2, 1):
        messages = ask(question, image(number))
        assert vllm_tokens(llm, [messages]) == [engine_tokens(engine, messages)]


def test_another_question_about_a_remembered_image(llm, engine):
    first, second = (ask(text, image(3), image(4)) for text in ("is it red?", "is it blue?"))
    vllm_tokens(llm, [first])
    assert vllm_tokens(llm, [second]) == [engine_tokens(engine, second)]


@pytest.mark.parametrize("extra", range(3))
def test_one_visual_token_alone_in_a_step(llm, engine, extra):
    """A prompt that ends in an image, all but its last tokens remembered: they look like decoding
    to vLLM, but are visual."""
    import torch
    from vllm import SamplingParams

    processor = engine.processor
    start = processor(text="USER: ")["input_ids"][0]
    words = (64 + 1 + extra) - len(start) - (QUERIES + 1)
    text_ids = start + [70 + number for number in range(words)]
    prompt = {
        "prompt_token_ids": [*text_ids, processor.image_token_id],
        "multi_modal_data": {"image": image(5)},
    }
    ids = torch.tensor([text_ids + [processor.image_token_id] * (QUERIES + 1)])
    pixels = processor.image_processor([image(5)])["pixel_values"]
    made = engine.model.generate(
        input_ids=ids, pixel_values=pixels, max_new_tokens=8, do_sample=False
    )
    sampling = SamplingParams(temperature=0, max_tokens=8)
    assert llm.reset_prefix_cache()
    for remembered in (0, 64):
        [output] = llm.generate([prompt], sampling, use_tqdm=False)
        assert output.num_cached_tokens == remembered
        assert list(output.outputs[0].token_ids) == made[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize(
    ("text", "images"),
    [("<|image|> what?", 0), ("what? <|image|>", 1)],
)
def test_a_placeholder_without_a_image_is_refused_and_the_next_is_answered(
    llm, engine, text, images
):
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match=r"out of vocabulary|placeholder"):
        vllm_tokens(llm, [ask(text, *map(image, range(images)))])
    good = ask("what is this?", image(0))
    assert vllm_tokens(llm, [good]) == [engine_tokens(engine, good)]


def test_without_mam(tmp_path):
    answers_as_the_engine(make_checkpoint(tmp_path, use_mam=False))


def test_as_released_and_all_that_llamas_have(tmp_path):
    """Shards of ``.bin``, old buffers, no position codes, another image size than it has; tied
    embeddings, as many key-value heads as heads, scaled positions."""
    import torch
    from safetensors.torch import load_file

    directory = make_checkpoint(
        tmp_path,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        rope_scaling={"rope_type": "linear", "factor": 2.0},
    )
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    weights = {name: weight for name, weight in weights.items() if "pos_embed" not in name}
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    names = sorted(weights)
    index = {}
    for number in (0, 1):
        shard = f"pytorch_model-{number + 1:05}-of-00002.bin"
        part = {name: weights[name] for name in names[number::2]}
        torch.save(part, directory / shard)
        index |= dict.fromkeys(part, shard)
    text = json.dumps({"metadata": {}, "weight_map": index})
    (directory / "pytorch_model.bin.index.json").write_text(text)
    config = json.loads((directory / "config.json").read_text())
    config["visual_config"]["visual_model"]["image_size"] = 12
    (directory / "config.json").write_text(json.dumps(config))
    pixels = json.loads((directory / "preprocessor_config.json").read_text())
    pixels |= {"size": 12, "crop_size": 12}
    (directory / "preprocessor_config.json").write_text(json.dumps(pixels))
    answers_as_the_engine(directory)


def answers_as_the_engine(directory):
    from owl2.engine.engine import Engine

    engine = Engine.from_pretrained(
        directory, device="cpu", dtype="float32", enable_prefix_caching=False
    )
    expected = [engine_tokens(engine, messages) for messages in conversations()]
    with running(directory) as llm:
        assert vllm_tokens(llm, conversations()) == expected


def test_two_processes_share_the_decoder(checkpoint, expected, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")  # a core each; vLLM wants memories each
    with running(checkpoint, tensor_parallel_size=2) as llm:
        assert vllm_tokens(llm, conversations()) == expected


def test_more_processes_than_key_value_heads_are_refused(checkpoint):
    with (
        pytest.raises(Exception, match="does not divide the model's 2 key-value heads"),
        running(checkpoint, tensor_parallel_size=4),
    ):
        pass


def test_a_recorded_step_and_a_counted_one_are_the_same():
    """Where a CUDA graph is recorded, both modalities are computed and one is chosen."""
    import torch

    from owl2.vllm_plugin.decoder import VisualTokens

    inputs, states = torch.randn(7, 3), torch.randn(7, 3)
    mask = torch.tensor([0, 1, 1, 0, 0, 1, 0]).bool()[:, None]
    counted = VisualTokens(mask, mask[:, 0].nonzero()[:, 0]).put(states, torch.exp, inputs)
    assert torch.equal(counted, VisualTokens(mask, None).put(states, torch.exp, inputs))
    assert torch.equal(counted[mask[:, 0]], inputs[mask[:, 0]].exp())
    assert torch.equal(counted[~mask[:, 0]], states[~mask[:, 0]])


def test_importing_the_plug_in_does_not_import_vllm():
    """vLLM asks all that are installed for theirs; ours must not cost those who do not use it."""
    code = "import sys, owl2.vllm_plugin; assert 'vllm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
