"""`owl2 init`: the checkpoint that stage 1 starts from, from backbones or fresh."""

import json
import shutil

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from owl2.checkpoints.from_backbones import load_llm
from owl2.data.datasets import DATASETS
from owl2.data.sample import Sample
from owl2.errors import ErrorCode, InputError
from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.processing.processor import Owl2Processor
from owl2.processing.tokenizer import Owl2Tokenizer, train_tokenizer
from owl2.train import init_model
from owl2.train.init_model import init_checkpoint, load_tokenizer
from recipes.study.study import smollm2_file
from tests.errors import raises_input_error
from tests.tiny import CLIP_TOWER

SIZES = {
    "llm": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_theta": 500.0,
    },
    "vision": CLIP_TOWER,
    "abstractor": {"num_hidden_layers": 1, "intermediate_size": 12, "num_learnable_queries": 2},
    "tokenizer": {"dataset": "shapes", "vocab_size": 290},
}
VISUAL = {"llm": None, "tokenizer": None}  # for a language model that is not fresh
TEXTS = ["what shape is it", "a circle", "a square and a triangle", "is it blue or red"]


def read_shapes(split):
    assert split == "train"  # a tokenizer must not be trained on the test split
    for text in TEXTS * 5:
        question = [{"type": "image", "image": None}, {"type": "text", "text": text}]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
        yield Sample(messages, "shapes")


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Writes a config file with changes (None removes a section); its dataset exists."""
    monkeypatch.setitem(DATASETS, "shapes", read_shapes)

    def write(**changes):
        path = tmp_path / "config.yaml"
        sections = {name: part for name, part in (SIZES | changes).items() if part is not None}
        path.write_text(yaml.safe_dump(sections), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    """A small LLaMA with a SentencePiece tokenizer, as on the hub."""
    folder = tmp_path_factory.mktemp("llama")
    train_tokenizer(TEXTS * 10, folder / "tokenizer.model", 290)
    settings = SIZES["llm"] | {"vocab_size": len(Owl2Tokenizer(folder / "tokenizer.model"))}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**settings)).save_pretrained(folder)
    return folder


def test_tokenizer_of_a_file_of_rows(config, tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]}
        for text in TEXTS
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tokenizers = []
    for number, origin in enumerate(({"file": str(file)}, {"dataset": "shapes"})):
        settings = origin | {"vocab_size": 290}
        init_checkpoint("fresh", "fresh", tmp_path / str(number), config=config(tokenizer=settings))
        tokenizers.append((tmp_path / str(number) / "tokenizer.model").read_bytes())
    assert tokenizers[0] == tokenizers[1]


def load(path):
    return Owl2ForConditionalGeneration.from_pretrained(path), Owl2Processor.from_pretrained(path)


def test_fresh_model(config, tmp_path):
    init_checkpoint("fresh", "fresh", tmp_path / "out", config=config())
    model, processor = load(tmp_path / "out")
    assert model.config.hidden_size == 16 and model.config.image_size == 8
    assert model.config.rope_parameters["rope_theta"] == 500.0
    assert model.config.vocab_size == len(processor.tokenizer) - 1 <= 290
    assert processor.image_token_id == model.config.image_token_id
    assert processor.num_image_tokens == model.config.num_image_tokens == 3
    assert "<unk>" not in processor.tokenizer.decode(processor.tokenizer(TEXTS[0]).input_ids)
    message = {"role": "user", "content": [{"type": "image", "image": torch.zeros(3, 9, 9)}]}
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    inputs = processor.apply_chat_template([message], **options, return_tensors="pt")
    answer = model.generate(**inputs, max_new_tokens=2)
    assert answer.shape[1] > inputs["input_ids"].shape[1]


def test_seed_determines_the_weights(config, tmp_path):
    seeds = {"a": 1, "b": 1, "c": 2}
    for name, seed in seeds.items():
        init_checkpoint("fresh", "fresh", tmp_path / name, config=config(), seed=seed)
    files = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in seeds}
    assert files["a"] == files["b"] != files["c"]


def test_language_model_of_a_directory_keeps_its_logits(llama_folder, config, tmp_path):
    out, ids = tmp_path / "out", torch.tensor([[1, 5, 9, 80]])
    options = {"image_size": 16, "use_mam": False}
    init_checkpoint(str(llama_folder), "fresh", out, config=config(**VISUAL), **options)
    model, processor = load(out)
    assert (model.config.image_size, model.config.use_mam) == (16, False)
    with torch.no_grad():
        expected = load_llm(llama_folder).eval()(ids).logits
        assert torch.equal(model(ids).logits, expected)
    assert (out / "tokenizer.model").read_bytes() == (llama_folder / "tokenizer.model").read_bytes()
    assert isinstance(processor.tokenizer, Owl2Tokenizer)


def test_dtype_and_chat_template(llama_folder, config, tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}{% endfor %}", encoding="utf-8")
    init_checkpoint(
        str(llama_folder),
        "fresh",
        tmp_path / "out",
        config=config(**VISUAL),
        dtype="bfloat16",
        chat_template=template,
    )
    model, processor = load(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert processor.chat_template == template.read_text(encoding="utf-8")
    # Also for fresh parts.
    init_checkpoint("fresh", "fresh", tmp_path / "2", config=config(), dtype="bfloat16")
    assert load(tmp_path / "2")[0].dtype == torch.bfloat16


@pytest.mark.slow
def test_smollm2_keeps_its_logits(config, tmp_path, monkeypatch):
    """Grouped queries, tied embeddings and another tokenizer, also after saving."""
    ids = torch.randint(0, 49152, (1, 40), generator=torch.Generator().manual_seed(0))
    expected = {}

    def load_and_record(source, dtype):  # once, because reading the file takes many seconds
        llm = load_llm(source, dtype).eval()
        assert (llm.config.num_attention_heads, llm.config.num_key_value_heads) == (9, 3)
        with torch.no_grad():
            expected["logits"] = llm(ids).logits
        expected["answer"] = llm.generate(ids, **options)
        return llm

    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    monkeypatch.setattr(init_model, "load_llm", load_and_record)
    written = init_checkpoint(
        str(smollm2_file()), "fresh", tmp_path / "out", config=config(**VISUAL)
    )
    model, processor = load(tmp_path / "out")
    assert model.config.tie_word_embeddings and model.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(written.eval()(ids).logits, expected["logits"])
        assert torch.equal(model(ids).logits, expected["logits"])
    assert torch.equal(model.generate(ids, **options), expected["answer"])
    text = "Is an image  worth\na thousand words?"
    ids = processor(text=text, return_tensors="pt")["input_ids"][0]
    assert processor.decode(ids, skip_special_tokens=True) == text


def init_fresh(output, config):
    return init_checkpoint("fresh", "fresh", output, config=config)


def test_existing_output_is_not_changed(config, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with raises_input_error(ErrorCode.FILE_EXISTS, out):
        init_fresh(out, config())
    assert not list(out.iterdir())


@pytest.mark.parametrize(
    ("changes", "needles"),
    [
        ({"lm": {}}, ("'lm'", "llm")),
        ({"llm": SIZES["llm"] | {"hiden_size": 3}}, ("hiden_size", "hidden_size")),
        ({"vision": {"image_sise": 3}}, ("image_sise", "image_size")),
        ({"abstractor": {"num_queries": 3}}, ("num_queries", "num_learnable_queries")),
        ({"tokenizer": {"dataset": "shapes"}}, ("tokenizer", "vocab_size")),
        ({"tokenizer": {"dataset": "shapes", "file": "a", "vocab_size": 290}}, ("`file`",)),
        ({"tokenizer": {"dataset": "shapes", "vocab_size": "many"}}, ("tokenizer", "vocab_size")),
        ({"tokenizer": {"dataset": "shaeps", "vocab_size": 290}}, ("shaeps", "shapes")),
        ({"tokenizer": {"dataset": "shapes", "vocab_size": 10}}, ("10",)),
        ({"vision": 3}, ("`vision`",)),
        ({"llm": SIZES["llm"] | {"hidden_size": "many"}}, ("hidden_size", "'many'")),
        ({"llm": SIZES["llm"] | {"num_hidden_layers": 0}}, ("num_hidden_layers", "0")),
        ({"llm": SIZES["llm"] | {"num_attention_heads": 3}}, ("16", "3")),
        ({"llm": SIZES["llm"] | {"num_key_value_heads": 3}}, ("num_key_value_heads", "3")),
        ({"llm": SIZES["llm"] | {"rms_norm_eps": "small"}}, ("rms_norm_eps",)),
        ({"llm": SIZES["llm"] | {"hidden_act": "nope"}}, ("nope",)),
        ({"vision": SIZES["vision"] | {"patch_size": 0}}, ("patch_size", "0")),
        ({"vision": SIZES["vision"] | {"hidden_size": "8"}}, ("hidden_size", "'8'")),
        ({"vision": SIZES["vision"] | {"hidden_act": "nope"}}, ("hidden_act", "nope")),
        ({"abstractor": {"num_learnable_queries": -1}}, ("num_learnable_queries", "-1")),
        ({"abstractor": {"intermediate_size": 1.5}}, ("intermediate_size", "1.5")),
        ({"vision": SIZES["vision"] | {"image_size": 9}}, ("patch_size",)),
    ],
)
def test_invalid_config_is_refused_without_output(config, tmp_path, changes, needles):
    with pytest.raises(InputError) as error:
        init_fresh(tmp_path / "out", config(**changes))
    assert all(needle in str(error.value) for needle in needles), str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_fresh_language_model_needs_a_tokenizer(tmp_path):
    with raises_input_error(ErrorCode.MISSING_VALUE, "tokenizer", "--config"):
        init_fresh(tmp_path / "out", None)


@pytest.mark.parametrize(
    ("code", "needle", "options"),
    [
        (ErrorCode.FILE_NOT_FOUND, "no-file.yaml", {"config": "no-file.yaml"}),
        (ErrorCode.UNKNOWN_NAME, "bfloat61", {"dtype": "bfloat61"}),
        (ErrorCode.UNREADABLE_FILE, "no.jinja", {"chat_template": "no.jinja"}),
        (ErrorCode.CONFLICT, "`vision`", {"vision": "directory"}),
        (None, "no-such-llm", {"llm": "no-such-llm"}),
        (None, "patch_size", {"image_size": 9}),
    ],
)
def test_invalid_argument_is_refused(llama_folder, config, tmp_path, code, needle, options):
    arguments = {"llm": str(llama_folder), "vision": "fresh", "config": config(**VISUAL)} | options
    with pytest.raises(InputError) as error:
        init_checkpoint(output=tmp_path / "out", **arguments)
    assert needle in str(error.value) and (code is None or error.value.code is code)
    assert not (tmp_path / "out").exists()


def test_llama_is_refused_as_vision_tower(llama_folder, config, tmp_path):
    llama = str(llama_folder)
    with pytest.raises(InputError) as error:
        init_checkpoint(llama, llama, tmp_path / "out", config=config(**VISUAL, vision=None))
    assert "CLIP" in str(error.value)


def test_sizes_of_a_given_language_model_are_refused(llama_folder, config, tmp_path):
    with raises_input_error(ErrorCode.CONFLICT, "`llm`"):
        init_checkpoint(str(llama_folder), "fresh", tmp_path / "out", config=config(tokenizer=None))


@pytest.mark.parametrize(
    ("template", "needle"),
    [
        (b"{{ '\xff' }}", "chat.jinja"),
        (b"{% for m in messages %}", "endfor"),
        (b"{{ messages[0].role.no.such }}", "chat template"),
    ],
)
def test_invalid_chat_template_is_refused(llama_folder, config, tmp_path, template, needle):
    (tmp_path / "chat.jinja").write_bytes(template)
    options = {"config": config(**VISUAL), "chat_template": tmp_path / "chat.jinja"}
    with pytest.raises(InputError) as error:
        init_checkpoint(str(llama_folder), "fresh", tmp_path / "out", **options)
    assert needle in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} == {"chat.jinja", "config.yaml"}


def test_unwritable_output_is_refused_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(init_model, "load_llm", lambda *_: pytest.fail("loaded"))
    with raises_input_error(ErrorCode.WRITE_FAILED, "/proc/no/out"):
        init_checkpoint("some-llm", "fresh", "/proc/no/out")


def test_tokenizer_of_another_model_is_refused(llama_folder, config, tmp_path):
    llm, out, options = tmp_path / "llm", tmp_path / "out", {"config": config(**VISUAL)}
    LlamaForCausalLM(LlamaConfig(**SIZES["llm"] | {"vocab_size": 100})).save_pretrained(llm)
    (llm / "tokenizer.model").write_bytes((llama_folder / "tokenizer.model").read_bytes())
    with raises_input_error(ErrorCode.SHAPE_MISMATCH, "100"):
        init_checkpoint(str(llm), "fresh", out, **options)
    (llm / "tokenizer.model").unlink()
    with raises_input_error(ErrorCode.UNREADABLE_FILE, "tokenizer"):
        init_checkpoint(str(llm), "fresh", out, **options)
    assert not out.exists()


@pytest.mark.parametrize("kind", ["tokenizer.model", "tokenizer.json"])
@pytest.mark.parametrize("name", ["<pad>", "[PAD]", "<|im_start|>"])
def test_padding_token_without_a_row_is_dropped(llama_folder, config, tmp_path, kind, name):
    """Many copies of LLaMA-2 have 32,000 rows and a `<pad>` with the id 32000."""
    shutil.copytree(llama_folder, tmp_path / "llm")
    size = len(load_tokenizer(llama_folder))
    if kind == "tokenizer.model":
        (tmp_path / "llm" / "added_tokens.json").write_text(json.dumps({name: size}))
    else:
        (tmp_path / "llm" / "tokenizer.model").unlink()
        backend = Tokenizer(models.BPE({chr(33 + i): i for i in range(size)}, []))
        fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="!", eos_token='"')
        fast.add_special_tokens({"pad_token": name})
        fast.save_pretrained(tmp_path / "llm")
    assert len(load_tokenizer(tmp_path / "llm")) == size + 1
    arguments = (str(tmp_path / "llm"), "fresh", tmp_path / "out")
    if "pad" not in name.lower():
        with raises_input_error(ErrorCode.SHAPE_MISMATCH, size + 1):
            init_checkpoint(*arguments, config=config(**VISUAL))
        return
    init_checkpoint(*arguments, config=config(**VISUAL))
    model, processor = load(tmp_path / "out")
    assert len(processor.tokenizer) - 1 == size == model.config.image_token_id
    assert name not in processor.tokenizer.get_vocab()
    assert processor.tokenizer.pad_token_id < size


def test_sentencepiece_tokenizer_is_an_owl2_tokenizer(llama_folder):
    assert isinstance(load_tokenizer(llama_folder), Owl2Tokenizer)
    assert isinstance(load_tokenizer(str(llama_folder)), Owl2Tokenizer)


def test_init_command(config, tmp_path, run_cli):
    out = tmp_path / "out"
    arguments = ["--llm", "fresh", "--vision", "fresh", "--output", out, "--config", config()]
    result = run_cli("init", *arguments, "--no-mam", "--image-size", "16")
    assert result.exit_code == 0 and f"untrained; the model is in {out}" in result.stdout
    written = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert written["use_mam"] is False
    assert written["visual_config"]["visual_model"]["image_size"] == 16
    result = run_cli("init", *arguments)
    assert result.exit_code == 2 and str(out) in result.stderr
    assert "Traceback" not in result.stderr
