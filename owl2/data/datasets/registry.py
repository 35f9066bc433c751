"""The datasets of `owl2 data convert`: those of the paper (Specification §2), and easy-VQA."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from owl2.data.datasets.aokvqa import aokvqa
from owl2.data.datasets.coco import coco_captions
from owl2.data.datasets.easy_vqa import easy_vqa
from owl2.data.datasets.gqa import gqa
from owl2.data.datasets.img2dataset import Shard, shards
from owl2.data.datasets.llava import llava_instruct
from owl2.data.datasets.ocr_vqa import ocr_vqa
from owl2.data.datasets.prompts import VQA_PROMPT
from owl2.data.datasets.refcoco import refcoco
from owl2.data.datasets.text_chat import sharegpt, slimorca
from owl2.data.datasets.textcaps import textcaps
from owl2.data.datasets.visual_genome import visual_genome
from owl2.data.datasets.vqa import okvqa, vqav2
from owl2.data.sample import Sample
from owl2.errors import ErrorCode, InputError
from owl2.json_records import SkippedRows, known_split

Converter = Callable[..., Iterator[Sample | SkippedRows] | Iterator[Shard | SkippedRows]]


@dataclass(frozen=True)
class DatasetCard:
    """A public dataset.

    Attributes:
        files: The required files; `{split}` is train or val.
        url: Where the authors publish it.
        paper: How the paper uses it.
        license: Of the annotations, as far as known; images have their own.
    """

    convert: Converter
    files: str
    url: str
    paper: str
    license: str = "see the URL"

    @property
    def is_shards(self) -> bool:
        """Whether training reads it in place, so that only an entry for a recipe is written."""
        return self.convert is shards


def from_package(
    source: Path,
    *,
    split: str = "train",
    style: str = "joined",
    prompt: str = VQA_PROMPT,
    max_rounds: int | None = None,
    seed: int = 0,
) -> Iterator[Sample | SkippedRows]:
    """easy-VQA from its PyPI package; the directory is called `package`. Options: see `easy_vqa`.

    Raises:
        InputError: Another directory, the test split, or see `easy_vqa`.
    """
    if str(source) != "package":
        raise InputError(
            f"easy_vqa is read from its package: give `package` as the directory, not {source}",
            ErrorCode.INVALID_VALUE,
        )
    known_split("easy_vqa", split, {"train": "train"})
    yield from easy_vqa(split, style=style, prompt=prompt, max_rounds=max_rounds, seed=seed)


IMG2DATASET = "NNNNN.tar, NNNNN_stats.json"
CC_BY = "CC BY 4.0"

DATASET_CARDS: dict[str, DatasetCard] = {
    "cc3m": DatasetCard(
        shards,
        IMG2DATASET,
        "https://ai.google.com/research/ConceptualCaptions/download",
        "stage 1",
    ),
    "cc12m": DatasetCard(
        shards,
        IMG2DATASET,
        "https://github.com/google-research-datasets/conceptual-12m",
        "stage 1",
    ),
    "laion": DatasetCard(shards, IMG2DATASET, "https://laion.ai/blog/laion-5b/", "stage 1", CC_BY),
    "coyo": DatasetCard(
        shards, IMG2DATASET, "https://github.com/kakaobrain/coyo-dataset", "stage 1", CC_BY
    ),
    "datacomp": DatasetCard(
        shards, IMG2DATASET, "https://github.com/mlfoundations/datacomp", "stage 1", CC_BY
    ),
    "coco_captions": DatasetCard(
        coco_captions,
        "captions_{split}2014.json or dataset_coco.json (Karpathy)",
        "https://cocodataset.org/#download",
        "stage 1; 82 K",
        CC_BY,
    ),
    "textcaps": DatasetCard(
        textcaps,
        "TextCaps_0.1_{split}.json",
        "https://textvqa.org/textcaps/dataset/",
        "22 K",
        CC_BY,
    ),
    "vqav2": DatasetCard(
        vqav2,
        "v2_OpenEnded_mscoco_{split}2014_questions.json, v2_mscoco_{split}2014_annotations.json",
        "https://visualqa.org/download.html",
        "83 K",
        CC_BY,
    ),
    "okvqa": DatasetCard(
        okvqa,
        "OpenEnded_mscoco_{split}2014_questions.json, mscoco_{split}2014_annotations.json",
        "https://okvqa.allenai.org/download.html",
        "9 K",
    ),
    "gqa": DatasetCard(
        gqa,
        "{split}_balanced_questions.json",
        "https://cs.stanford.edu/people/dorarad/gqa/download.html",
        "72 K",
    ),
    "ocr_vqa": DatasetCard(ocr_vqa, "dataset.json", "https://ocr-vqa.github.io/", "80 K"),
    "aokvqa": DatasetCard(
        aokvqa, "aokvqa_v1p0_{split}.json", "https://github.com/allenai/aokvqa", "50 K"
    ),
    "refcoco": DatasetCard(
        refcoco,
        "refs(unc).p, instances.json",
        "https://github.com/lichengunc/refer",
        "30 K",
    ),
    "visual_genome": DatasetCard(
        visual_genome,
        "region_descriptions.json, image_data.json",
        "https://homes.cs.washington.edu/~ranjay/visualgenome/api.html",
        "86 K",
        CC_BY,
    ),
    "llava_instruct": DatasetCard(
        llava_instruct,
        "llava_instruct_150k.json",
        "https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K",
        "158 K",
        CC_BY,
    ),
    "sharegpt": DatasetCard(
        sharegpt,
        "ShareGPT_V3_unfiltered_cleaned_split.json",
        "https://huggingface.co/datasets/anon8231489123/ShareGPT_Vicuna_unfiltered",
        "40 K",
    ),
    "slimorca": DatasetCard(
        slimorca,
        "oo-labeled_correct.gpt4.sharegpt.jsonl",
        "https://huggingface.co/datasets/Open-Orca/SlimOrca",
        "518 K",
        "MIT",
    ),
    "easy_vqa": DatasetCard(
        from_package,
        "none: `package` is the directory",
        "https://github.com/vzhou842/easy-VQA",
        "not used",
        "MIT",
    ),
}
