"""The datasets of `owl2 data convert`: the paper's (Specification §2), easy-VQA, opinion scores."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from owl2.data.datasets.captions import COCO_SPLITS, KARPATHY, coco_captions, textcaps
from owl2.data.datasets.conversations import llava_instruct, text_conversations
from owl2.data.datasets.easy_vqa import easy_vqa
from owl2.data.datasets.img2dataset import shards
from owl2.data.datasets.opinion_scores import opinion_scores
from owl2.data.datasets.questions import aokvqa, gqa, ocr_vqa, visual_questions
from owl2.data.datasets.regions import refcoco, visual_genome
from owl2.errors import ErrorCode, InputError
from owl2.json_records import refuse_test
from owl2.registry import Option, check_options, look_up, options_of

TRAIN_VAL = {"train": "train", "val": "val"}
CC_BY = "CC BY 4.0"


@dataclass(frozen=True)
class DatasetCard:
    """A public dataset.

    Attributes:
        convert: A function of the path of each file (of the directory without `files`), the split
            if there are splits, and options as keywords. For a package: without a path.
        files: Option → published names of a file, of which the first that exists is read; the
            option names another one. `{split}` is the value of the split in `splits`.
        url: Where the authors publish it.
        paper: How the paper uses it.
        license: Of the annotations, as far as known; images have their own.
        contents: Of the directory, if there are no `files`.
    """

    convert: Callable[..., Iterable[Any]]
    files: Mapping[str, tuple[str, ...]]
    url: str
    paper: str
    license: str = "see the URL"
    splits: Mapping[str, str] | None = None
    contents: str = ""

    @property
    def is_shards(self) -> bool:
        """Whether training reads it in place, so that only an entry for a recipe is written."""
        return self.convert is shards

    @property
    def is_package(self) -> bool:
        """Whether the dataset is in an installed package; its directory is called `package`."""
        return not self.files and not self.is_shards

    @property
    def options(self) -> dict[str, Option]:
        """The options of `read_published`."""
        split = {"split": Option(str, "train")} if self.splits else {}
        # File names may look like numbers in YAML.
        files = dict.fromkeys(self.files, Option(str | int | None, None))
        return split | options_of(self.convert) | files


def read_published(name: str, directory: Path, /, **options: Any) -> Iterator[Any]:
    """The `Sample`s (or `Shard`s) and `SkippedRows` of a dataset.

    Args:
        directory: Contains the published files.
        options: See `DatasetCard.options`.

    Raises:
        InputError: An unknown dataset, option or split, a test split, a missing file, or, while
            iterating, a file that differs from the published one.
    """
    card = look_up("dataset", name, DATASET_CARDS)
    check_options(f"option of the dataset {name}", card.options, options)
    split = options.pop("split", "train")
    refuse_test(split, f"split={split}")
    value = look_up(f"split of the dataset {name}", split, card.splits or {"train": ""})
    if card.is_package:
        if str(directory) != "package":
            raise InputError(
                f"{name} is read from its package: pass `package` as the directory, not "
                f"{directory}",
                ErrorCode.INVALID_VALUE,
            )
        return iter(card.convert(split, **options))
    if not directory.is_dir():
        raise InputError(
            f"{directory} is not a directory: pass the one with the published files",
            ErrorCode.FILE_NOT_FOUND,
        )
    paths = []
    for option, published in card.files.items():
        name_option = options.pop(option, None)
        names = published if name_option is None else (str(name_option),)
        paths.append(_first_file(directory, [n.replace("{split}", value) for n in names]))
    return iter(card.convert(*(paths or [directory]), *([split] if card.splits else []), **options))


def _first_file(directory: Path, names: Sequence[str]) -> Path:
    for name in names:
        if (directory / name).is_file():
            return directory / name
    raise InputError(
        f"{directory / ' or '.join(names)} does not exist. If the published file has another name, "
        "give it as an option; `owl2 data convert --list` shows the options.",
        ErrorCode.FILE_NOT_FOUND,
    )


def _web_data(url: str, license: str = "see the URL") -> DatasetCard:
    """Image-text pairs that img2dataset downloaded."""
    contents = "NNNNN.tar, NNNNN_stats.json"
    return DatasetCard(shards, {}, url, "stage 1", license, contents=contents)


DATASET_CARDS: dict[str, DatasetCard] = {
    "cc3m": _web_data("https://ai.google.com/research/ConceptualCaptions/download"),
    "cc12m": _web_data("https://github.com/google-research-datasets/conceptual-12m"),
    "laion": _web_data("https://laion.ai/blog/laion-5b/", CC_BY),
    "coyo": _web_data("https://github.com/kakaobrain/coyo-dataset", CC_BY),
    "datacomp": _web_data("https://github.com/mlfoundations/datacomp", CC_BY),
    "coco_captions": DatasetCard(
        coco_captions,
        {"file": ("captions_{split}.json", KARPATHY)},
        "https://cocodataset.org/#download",
        "stage 1; 82 K",
        CC_BY,
        COCO_SPLITS,
    ),
    "textcaps": DatasetCard(
        textcaps,
        {"file": ("TextCaps_0.1_{split}.json",)},
        "https://textvqa.org/textcaps/dataset/",
        "22 K",
        CC_BY,
        TRAIN_VAL,
    ),
    "vqav2": DatasetCard(
        visual_questions,
        {
            "questions": ("v2_OpenEnded_mscoco_{split}2014_questions.json",),
            "annotations": ("v2_mscoco_{split}2014_annotations.json",),
        },
        "https://visualqa.org/download.html",
        "83 K",
        CC_BY,
        TRAIN_VAL,
    ),
    "okvqa": DatasetCard(
        visual_questions,
        {
            "questions": ("OpenEnded_mscoco_{split}2014_questions.json",),
            "annotations": ("mscoco_{split}2014_annotations.json",),
        },
        "https://okvqa.allenai.org/download.html",
        "9 K",
        splits=TRAIN_VAL,
    ),
    "gqa": DatasetCard(
        gqa,
        {"file": ("{split}_balanced_questions.json",)},
        "https://cs.stanford.edu/people/dorarad/gqa/download.html",
        "72 K",
        splits=TRAIN_VAL,
    ),
    "ocr_vqa": DatasetCard(
        ocr_vqa,
        {"file": ("dataset.json",)},
        "https://ocr-vqa.github.io/",
        "80 K",
        splits=TRAIN_VAL,
    ),
    "aokvqa": DatasetCard(
        aokvqa,
        {"file": ("aokvqa_v1p0_{split}.json",)},
        "https://github.com/allenai/aokvqa",
        "50 K",
        splits=TRAIN_VAL,
    ),
    "refcoco": DatasetCard(
        refcoco,
        {"refs": ("refs(unc).p",), "instances": ("instances.json",)},
        "https://github.com/lichengunc/refer",
        "30 K",
        splits=TRAIN_VAL,
    ),
    "visual_genome": DatasetCard(
        visual_genome,
        {"regions": ("region_descriptions.json",), "images": ("image_data.json",)},
        "https://homes.cs.washington.edu/~ranjay/visualgenome/api.html",
        "86 K",
        CC_BY,
    ),
    "llava_instruct": DatasetCard(
        llava_instruct,
        {"file": ("llava_instruct_150k.json", "llava_v1_5_mix665k.json")},
        "https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K",
        "158 K",
        CC_BY,
    ),
    "sharegpt": DatasetCard(
        text_conversations,
        {"file": ("ShareGPT_V3_unfiltered_cleaned_split.json",)},
        "https://huggingface.co/datasets/anon8231489123/ShareGPT_Vicuna_unfiltered",
        "40 K",
    ),
    "slimorca": DatasetCard(
        text_conversations,
        {"file": ("oo-labeled_correct.gpt4.sharegpt.jsonl",)},
        "https://huggingface.co/datasets/Open-Orca/SlimOrca",
        "518 K",
        "MIT",
    ),
    "opinion_scores": DatasetCard(
        opinion_scores,
        {"file": ("mos.csv", "mos.json")},
        "https://huggingface.co/datasets/zhiyuanyou/Data-DeQA-Score",
        "not used",
    ),
    "easy_vqa": DatasetCard(
        partial(easy_vqa, style="joined"),
        {},
        "https://github.com/vzhou842/easy-VQA",
        "not used",
        "MIT",
        {"train": "train"},
        "none: `package` is the directory",
    ),
}
