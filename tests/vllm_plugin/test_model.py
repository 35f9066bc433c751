"""Greedy tokens of vLLM and the `Engine` are equal: batched, chunked, with cached prefixes."""

import json
import subprocess
import sys

import pytest

from tests.vllm_plugin.conftest import (
    NEW,
    QUERIES,
    ask,
    conversations,
    engine_tokens,
    make_checkpoint,
    random_image,
    start_vllm,
    vllm_tokens,
)

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def expected(engine):
    return [engine_tokens(engine, messages) for messages in conversations()]


def test_single_requests(llm, expected):
    # The first test, so that the prefix cache is empty.
    assert [vllm_tokens(llm, [messages])[0] for messages in conversations()] == expected
    assert len({tuple(tokens) for tokens in expected}) == 16  # the images change the answers


def test_sixteen_requests_with_cached_prefixes(llm, expected):
    assert vllm_tokens(llm, conversations()) == expected


def test_sixteen_requests_with_an_empty_prefix_cache(llm, expected):
    assert llm.reset_prefix_cache()
    assert vllm_tokens(llm, conversations()) == expected


def test_prefix_cache_distinguishes_images(llm, engine):
    question = "what is this? is it red or blue?"
    for number in (1, 2, 1):
        messages = ask(question, random_image(number))
        assert vllm_tokens(llm, [messages]) == [engine_tokens(engine, messages)]


def test_another_question_about_a_cached_image(llm, engine):
    first, second = (
        ask(text, random_image(3), random_image(4)) for text in ("is it red?", "is it blue?")
    )
    vllm_tokens(llm, [first])
    assert vllm_tokens(llm, [second]) == [engine_tokens(engine, second)]


def test_integer_image_tensors_equal_images(llm, engine):
    import torch
    from vllm import SamplingParams

    image = random_image(5)
    messages = ask("what is this?", image)
    pixels = torch.tensor(list(image.tobytes()), dtype=torch.uint8).view(*image.size[::-1], 3)
    prompt = {
        "prompt": engine.processor.apply_chat_template(messages, add_generation_prompt=True),
        "multi_modal_data": {"image": [pixels.permute(2, 0, 1)]},
    }
    params = SamplingParams(temperature=0, max_tokens=NEW)
    [output] = llm.generate(prompt, params, use_tqdm=False)
    assert list(output.outputs[0].token_ids) == engine_tokens(engine, messages)


@pytest.mark.parametrize("extra", range(3))
def test_one_visual_token_in_a_step(llm, engine, extra):
    """A prompt that ends in an image, with all but its last tokens cached. Their step has the shape
    of a decode step."""
    import torch
    from vllm import SamplingParams

    processor = engine.processor
    start = processor(text="USER: ")["input_ids"][0]
    num_text = (64 + 1 + extra) - len(start) - (QUERIES + 1)
    text_ids = start + [70 + number for number in range(num_text)]
    prompt = {
        "prompt_token_ids": [*text_ids, processor.image_token_id],
        "multi_modal_data": {"image": random_image(5)},
    }
    ids = torch.tensor([text_ids + [processor.image_token_id] * (QUERIES + 1)])
    pixels = processor.image_processor([random_image(5)])["pixel_values"]
    expected = engine.model.generate(
        input_ids=ids, pixel_values=pixels, max_new_tokens=8, do_sample=False
    )
    sampling = SamplingParams(temperature=0, max_tokens=8)
    assert llm.reset_prefix_cache()
    for num_cached in (0, 64):
        [output] = llm.generate([prompt], sampling, use_tqdm=False)
        assert output.num_cached_tokens == num_cached
        assert list(output.outputs[0].token_ids) == expected[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize(
    ("text", "images"),
    [("<|image|> what?", 0), ("what? <|image|>", 1)],
)
def test_a_placeholder_without_an_image_is_rejected(llm, engine, text, images):
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match=r"out of vocabulary|placeholder"):
        vllm_tokens(llm, [ask(text, *map(random_image, range(images)))])
    good = ask("what is this?", random_image(0))
    assert vllm_tokens(llm, [good]) == [engine_tokens(engine, good)]


def test_without_mam(tmp_path):
    check_answers_equal_the_engine(make_checkpoint(tmp_path, use_mam=False))


def test_released_layout_and_options_of_llama(tmp_path):
    """Shards of ``.bin``, old buffers, no position codes, embeddings of another image size;
    tied embeddings, as many key-value heads as heads, scaled positions."""
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
    check_answers_equal_the_engine(directory)


def check_answers_equal_the_engine(directory):
    from owl2.engine.engine import Engine

    engine = Engine.from_pretrained(
        directory, device="cpu", dtype="float32", enable_prefix_caching=False
    )
    expected = [engine_tokens(engine, messages) for messages in conversations()]
    with start_vllm(directory) as llm:
        assert vllm_tokens(llm, conversations()) == expected


def test_tensor_parallelism(checkpoint, expected, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")  # one core for each process
    with start_vllm(checkpoint, tensor_parallel_size=2) as llm:
        assert vllm_tokens(llm, conversations()) == expected


def test_more_processes_than_key_value_heads_are_rejected(checkpoint):
    with (
        pytest.raises(Exception, match="does not divide the model's 2 key-value heads"),
        start_vllm(checkpoint, tensor_parallel_size=4),
    ):
        pass


def test_partial_mam_is_rejected(tmp_path):
    directory = make_checkpoint(tmp_path, mam_modules=["k_proj", "v_proj"])
    with pytest.raises(Exception, match="mam_modules"), start_vllm(directory):
        pass


def test_replace_visual_during_graph_capture():
    """During CUDA graph capture, both modalities are computed and one is selected."""
    import torch

    from owl2.vllm_plugin.decoder import VisualTokens

    inputs, states = torch.randn(7, 3), torch.randn(7, 3)
    mask = torch.tensor([0, 1, 1, 0, 0, 1, 0]).bool()[:, None]
    selected = VisualTokens(mask, mask[:, 0].nonzero()[:, 0]).replace_visual(
        states, torch.exp, inputs
    )
    assert torch.equal(selected, VisualTokens(mask, None).replace_visual(states, torch.exp, inputs))
    assert torch.equal(selected[mask[:, 0]], inputs[mask[:, 0]].exp())
    assert torch.equal(selected[~mask[:, 0]], states[~mask[:, 0]])


def test_importing_the_plugin_does_not_import_vllm():
    """vLLM imports all installed plug-ins, so the import must be cheap."""
    code = "import sys, owl2.vllm_plugin; assert 'vllm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
