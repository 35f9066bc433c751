"""Readers of label files with opinion scores: the published formats, in small files."""

import json

import numpy as np
import pytest
import torch
from openpyxl import Workbook
from scipy.io import savemat

from owl2.errors import ErrorCode
from owl2.eval.metrics.ratings import AGREEMENT
from owl2.eval.samples import EvalSample, Response
from owl2.eval.task_config import task_configs
from owl2.eval.tasks import find_tasks
from owl2.processing.messages import parse_messages
from tests.errors import raises_input_error
from tests.scoring.golden import read as golden_values

SCORING = [name for name, one in task_configs().items() if one.suite == "scoring"]
TURNS = [
    {"from": "human", "value": "Rate the quality of this image.\n<|image|>"},
    {"from": "gpt", "value": "The quality of the image is good."},
]


def workbook(path, sheets):
    book = Workbook()
    book.remove(book.active)
    for name, rows in sheets.items():
        sheet = book.create_sheet(name)
        for row in rows:
            sheet.append(row)
    book.save(path)


def clive(folder):
    (folder / "Data").mkdir(parents=True)
    names = np.array([["t1.bmp"], ["3.bmp"]], dtype=object)
    savemat(folder / "Data/AllImages_release.mat", {"AllImages_release": names})
    savemat(folder / "Data/AllMOS_release.mat", {"AllMOS_release": np.array([[63.9, 50.5]])})


CSIQ_COLUMNS = (None, None, None, "image", "dst_idx", "dst_type", "dst_lev", "dmos_std", "dmos")
LSVQ = "name,p1,p2,p3,height,width,mos_p1,mos_p2,mos_p3,mos,frame_number,is_test\n"
# Task: [label files, media files, expected scores by the name of the media file].
FORMATS = {
    "koniq Q-Align": (
        {
            "test_jsons/test_koniq.json": [
                {
                    "id": "1.jpg->68.7",
                    "image": "koniq/1.jpg",
                    "conversations": TURNS,
                    "gt_score": 68.7,
                }
            ]
        },
        ["koniq/1.jpg"],
        {"1.jpg": 68.7},
    ),
    "koniq DeQA-Score": (
        {
            "KONIQ/metas/test_koniq_2k.json": [
                {
                    "id": "1.jpg->68.7",
                    "image": "KONIQ/images/1.jpg",
                    "gt_score": 68.7,
                    "gt_score_norm": 4.2,
                    "std": 9.1,
                    "std_norm": 0.5,
                }
            ]
        },
        ["KONIQ/images/1.jpg"],
        {"1.jpg": 68.7},
    ),
    "koniq csv": (
        {
            "koniq10k_distributions_sets.csv": "image_name,c1,c2,c3,c4,c5,c_total,MOS,SD,set\n"
            "1.jpg,0,0,25,73,7,105,61.5,0.5,training\n2.jpg,0,2,45,5,1,105,43.2,0.6,test\n"
        },
        ["1024x768/1.jpg", "1024x768/2.jpg"],
        {"2.jpg": 43.2},
    ),
    "spaq xlsx": (
        {
            "Annotations/MOS and Image attribute scores.xlsx": {
                "Sheet1": [("Image name", "MOS", "Brightness"), ("00001.jpg", 62.17, 61.0)]
            }
        },
        ["TestImage/00001.jpg"],
        {"00001.jpg": 62.17},
    ),
    "kadid Q-Align": (
        {"test_kadid.json": [{"id": "I66_01_01.png->4.63", "image": "kadid10k/I66_01_01.png"}]},
        ["images/I66_01_01.png"],
        {"I66_01_01.png": 4.63},
    ),
    "kadid csv": (
        {
            "dmos.csv": "dist_img,ref_img,dmos,var\nI01_01_01.png,I01.png,4.57,0.496\n"
            "I02_01_01.png,I02.png,4.50,0.3\n",
            "split.json": {"train": ["I01_01_01.png"], "test": ["I02_01_01.png"]},
        },
        ["images/I01_01_01.png", "images/I02_01_01.png"],
        {"I02_01_01.png": 4.5},
    ),
    "livec mat": (
        clive,
        ["Images/trainingImages/t1.bmp", "Images/3.bmp"],
        {"t1.bmp": 63.9, "3.bmp": 50.5},
    ),
    "livec Q-Align": (
        {"livec.json": [{"img_path": "livec/3.bmp", "gt_score": 50.5}]},
        ["Images/3.bmp"],
        {"3.bmp": 50.5},
    ),
    "live Q-Align": (
        {"live.json": [{"image": "live/jp2k/img2.bmp", "gt_score": 28.0}]},
        ["jp2k/img2.bmp"],
        {"img2.bmp": -28.0},
    ),
    "csiq xlsx": (
        {
            "csiq.DMOS.xlsx": {
                "all_by_distortion": [("other",)],
                "all_by_image": [
                    ("CSIQ",),
                    CSIQ_COLUMNS,
                    (None, None, None, 1600, 1, "noise", 1, 0.06, 0.062),
                    (None, None, None, "woman", 4, "jpeg 2000", 5, 0.09, 0.84),
                ],
            }
        },
        ["dst_imgs/awgn/1600.AWGN.1.png", "dst_imgs/jpeg2000/woman.jpeg2000.5.png"],
        {"1600.AWGN.1.png": -0.062, "woman.jpeg2000.5.png": -0.84},
    ),
    "csiq with MOS": (
        {
            "test_jsons/csiq.json": [
                {"image": "csiq/dst_imgs/awgn/1600.AWGN.1.png", "gt_score": 0.94},
                {"image": "csiq/dst_imgs/awgn/1600.AWGN.5.png", "gt_score": 0.52},
            ]
        },
        ["dst_imgs/awgn/1600.AWGN.1.png", "dst_imgs/awgn/1600.AWGN.5.png"],
        {"1600.AWGN.1.png": 0.94, "1600.AWGN.5.png": 0.52},
    ),
    "tid2013 txt": (
        {"mos_with_names.txt": "5.51429 I01_01_1.bmp\n5.56757 i01_01_2.bmp\n"},
        ["distorted_images/i01_01_1.bmp", "distorted_images/i01_01_2.bmp"],
        {"i01_01_1.bmp": 5.51429, "i01_01_2.bmp": 5.56757},
    ),
    "agiqa_3k csv": (
        {
            "data.csv": "name,prompt,adj1,adj2,style,mos_quality,std_quality,mos_align,std_align\n"
            'AttnGAN_normal_000.jpg,"a cat, sitting",,,,0.9656,0.4,1.2,0.5\n'
        },
        ["AttnGAN_normal_000.jpg"],
        {"AttnGAN_normal_000.jpg": 0.9656},
    ),
    "agiqa_3k Q-Align": (
        {"agi.json": [{"img_path": "agi-cgi/AttnGAN_normal_000.jpg", "gt_score": "0.9656"}]},
        ["agi-cgi/AttnGAN_normal_000.jpg"],
        {"AttnGAN_normal_000.jpg": 0.9656},
    ),
    "ava txt": (
        {
            "AVA.txt": "1 953619 0 1 5 17 38 36 15 6 5 1 1 22 1396\n"
            "2 953958 10 7 15 26 26 21 10 8 1 2 1 21 1396\n",
            "aesthetics_image_lists/generic_test.jpgl": "953958\n",
        },
        ["images/953619.jpg", "images/953958.jpg"],
        {"953958.jpg": 592 / 126},
    ),
    "lsvq csv": (
        {
            "labels_train_test.csv": LSVQ
            + "yfcc-batch1/1,0,0,0,540,960,60,61,62,63.5,240,False\n"
            + "yfcc-batch1/747,0,0,0,540,960,60,61,62,67.75,240,True\n"
        },
        ["yfcc-batch1/1.mp4", "yfcc-batch1/747.mp4"],
        {"747.mp4": 67.75},
    ),
    "lsvq Q-Align": (
        {"test_lsvq.json": [{"image": "lsvq/yfcc-batch1/747.mp4", "gt_score": 67.75}]},
        ["yfcc-batch1/747.mp4"],
        {"747.mp4": 67.75},
    ),
    "lsvq_1080p csv": (
        {
            "labels_test_1080p.csv": "name,height,width,mos,frame_number\n"
            "ia-batch1/a.b,1080,1920,50,9\n"
        },
        ["ia-batch1/a.b.mp4"],
        {"a.b.mp4": 50.0},
    ),
    "konvid csv": (
        {"KoNViD_1k_mos.csv": '"flickr_id","mos"\n3339962845,4.64\n'},
        ["KoNViD_1k_videos/3339962845.mp4"],
        {"3339962845.mp4": 4.64},
    ),
    "maxwell txt": (
        {"test_labels.txt": "0000.mp4, -1, -1, 1.187\n"},
        ["videos/0000.mp4"],
        {"0000.mp4": 1.187},
    ),
}


def write(folder, labels, media=()):
    if callable(labels):
        labels(folder)
        labels = {}
    for name, content in labels.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".xlsx") and content != "text":
            workbook(path, content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
    for name in media:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def read(name, data):
    [task] = find_tasks(name)
    files = task.data(data)
    return *task.read(files), files


@pytest.mark.parametrize("case", FORMATS)
def test_formats(case, tmp_path):
    labels, media, expected = FORMATS[case]
    name = case.split()[0]
    write(tmp_path / name, labels, media)
    samples, invalid, _ = read(name, tmp_path)
    assert not invalid
    found = {}
    for sample in samples:
        [path] = parse_messages(sample.messages).images
        found[path.name] = sample.metadata["mos"]
    assert found == pytest.approx(expected)


def test_every_task_has_a_format_and_published_scores():
    assert {case.split()[0] for case in FORMATS} == {*SCORING}
    for name in SCORING:
        config = task_configs()[name]
        assert "q-future/one-align" in config.published
        metrics = {metric for values in config.published.values() for metric in values}
        assert metrics <= {"SRCC", "PLCC", "PLCC_fit"}


@pytest.mark.parametrize(("split", "remarks"), [(True, 0), (False, 1)])
def test_data_sets_without_a_test_split_have_a_remark(split, remarks, tmp_path):
    labels, media, _ = FORMATS["kadid csv"]
    write(
        tmp_path, {name: one for name, one in labels.items() if split or "split" not in name}, media
    )
    samples, _, files = read("kadid", tmp_path)
    assert (len(samples), len(files.remarks)) == (1 if split else 2, remarks)


def test_invalid_rows(tmp_path):
    rows = ["name,mos_quality", "a.jpg,1.5", "b.jpg,nan", "c.jpg,", "missing.jpg,2"]
    write(tmp_path, {"data.csv": "\n".join(rows)}, ["a.jpg", "b.jpg", "c.jpg"])
    samples, invalid, _ = read("agiqa_3k", tmp_path)
    assert [sample.id for sample in samples] == ["a.jpg"]
    assert len(invalid) == 3
    assert "missing.jpg" in invalid[-1].reason


@pytest.mark.parametrize(
    ("name", "file", "content"),
    [
        ("tid2013", "mos_with_names.txt", "a b c\n"),
        ("agiqa_3k", "data.csv", "file,value\na.jpg,1\n"),
        ("livec", "AllMOS_release.mat", "text"),
        ("spaq", "MOS and Image attribute scores.xlsx", {"Sheet1": [("a", "b")]}),
        ("spaq", "MOS and Image attribute scores.xlsx", "text"),
        ("csiq", "csiq.DMOS.xlsx", {"other": [("image", "dmos")]}),
        ("ava", "AVA.txt", " ".join("x" * 15)),
    ],
)
def test_other_files_are_refused(name, file, content, tmp_path):
    write(tmp_path, {file: content, "AllImages_release.mat": "text"})
    with raises_input_error(ErrorCode.INVALID_FORMAT, tmp_path):
        read(name, tmp_path)


def test_files_of_different_lengths_are_refused(tmp_path):
    clive(tmp_path)
    one = {"AllMOS_release": np.array([[63.9]])}
    savemat(tmp_path / "Data/AllMOS_release.mat", one)
    with raises_input_error(ErrorCode.INVALID_FORMAT, tmp_path):
        read("livec", tmp_path)


def test_split_without_a_test_list(tmp_path):
    labels, media, _ = FORMATS["kadid csv"]
    [split] = [name for name in labels if "split" in name]
    write(tmp_path, labels | {split: "{}"}, media)
    with raises_input_error(ErrorCode.MISSING_VALUE, "test"):
        read("kadid", tmp_path)


def rating(mos, score, probabilities=(), normal=None):
    scores = {"score": score, "probabilities": dict(enumerate(probabilities))}
    metadata = {"mos": mos, "normal": normal, "scores": scores}
    return Response(EvalSample(str(mos), "?", [], (), metadata=metadata), "", "")


def test_agreement_equals_the_golden_values_of_deqa_score():
    golden = golden_values("deqa_score", "metrics.json")
    logits = torch.tensor([list(one.values()) for one in golden["logits"]], dtype=torch.float64)
    normal = zip(golden["gt_score_norm"], golden["std_norm"], strict=True)
    columns = (golden["gt_score"], golden["predicted"], logits.softmax(-1).tolist(), normal)
    scores = AGREEMENT.score([rating(*row) for row in zip(*columns, strict=True)])
    expected = {
        "SRCC": golden["srcc"],
        "PLCC": golden["plcc_without_fit"],
        "PLCC_fit": golden["plcc"],
        "KL": golden["kl"],
        "JS": golden["js"],
        "W": golden["wasserstein"],
    }
    assert scores.metrics == pytest.approx(expected, abs=1e-5)


def test_agreement_of_few_and_of_equal_scores():
    scores = AGREEMENT.score([rating(mos, score) for mos, score in ((1, 0.2), (2, 0.9), (3, 0.5))])
    assert scores.metrics == {"SRCC": pytest.approx(0.5), "PLCC": pytest.approx(0.427, abs=1e-3)}
    assert scores.per_sample == [1.0, 0.5, 0.5]
    with raises_input_error(ErrorCode.EMPTY_DATASET):
        AGREEMENT.score([rating(mos, 0.5) for mos in range(5)])
