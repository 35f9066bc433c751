"""Scores with vLLM equal those of the engine, for images, videos and comparisons."""

import pytest
import torch

from owl2.scoring.scorer import ImageScorer
from tests.vllm_plugin.conftest import STEP, random_image

pytestmark = pytest.mark.vllm

SETTINGS = {"dtype": "float32", "max_num_batched_tokens": STEP, "max_num_seqs": 16}


def test_scores_equal_the_engine(checkpoint, engine):
    from owl2.vllm_plugin.offline import VllmEngine

    vllm = VllmEngine(checkpoint, **SETTINGS)
    images = [random_image(index) for index in range(6)]
    for method, options in (
        ("q-align", {}),
        ("q-instruct", {"boost": True}),
        ("compare2score", {"anchors": images[:5]}),
    ):
        ours, theirs = (ImageScorer(one, method, **options) for one in (engine, vllm))
        expected, found = ours.score(images), theirs.score(images)
        tolerance = 1e-2 if options.get("anchors") else 1e-4  # of 100 points
        for one, other in zip(expected, found, strict=True):
            assert other.score == pytest.approx(one.score, abs=tolerance)
            assert other.probabilities == pytest.approx(one.probabilities, abs=1e-4)
    videos = [images[:3], images[3:4]]
    expected, found = (
        [one.score for one in ImageScorer(backend, "q-align").score_videos(videos)]
        for backend in (engine, vllm)
    )
    vllm.close()
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=0, atol=1e-4)
