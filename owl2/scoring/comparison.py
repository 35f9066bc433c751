"""Compare2Score: scores from preferences over anchor images (Model family §5).

preferences over n anchors (B, n) ──► matrices (B, n+1, n+1) ──maximum likelihood──► scores (B,)
"""

from collections.abc import Callable
from pathlib import Path

import torch

from owl2.processing.media_file import image_files
from owl2.scoring.methods import Comparison

START_SEED, LEARNING_RATE = 0, 0.1
MIN_PROBABILITY = 1e-6
BEST_SCORE = 100.0


CDFS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "normal": torch.special.ndtr,
    "logistic": torch.sigmoid,
}


def preference_matrix(comparison: Comparison, preferences: torch.Tensor) -> torch.Tensor:
    """(B, n) preferences of images over n anchors to (B, n+1, n+1), the images last, in float32."""
    anchors = torch.tensor(comparison.anchor_matrix)
    count = len(anchors)
    matrix = torch.full((len(preferences), count + 1, count + 1), 0.5)
    matrix[:, :count, :count] = anchors
    matrix[:, count, :count] = preferences
    matrix[:, :count, count] = 1 - preferences
    return matrix


def comparison_scores(comparison: Comparison, form: str, preferences: torch.Tensor) -> torch.Tensor:
    """The scores (B,) of images between 0 and 100, the worst and the best of image and anchors.

    Args:
        form: Of the prompt; selects the function and the number of steps of the fit.
        preferences: (B, n) over the anchors.
    """
    matrix = preference_matrix(comparison, preferences)
    cdf, size = CDFS[comparison.cdfs[form]], matrix.shape[1]
    start = torch.rand(size, generator=torch.Generator().manual_seed(START_SEED))
    with torch.inference_mode(False), torch.enable_grad():
        matrix = matrix.clone()
        # The images are independent: Adam adapts each value on its own.
        scores = start.repeat(len(matrix), 1).requires_grad_()
        optimizer = torch.optim.Adam([scores], lr=LEARNING_RATE)
        for _ in range(comparison.steps[form]):
            optimizer.zero_grad()
            probabilities = cdf(scores[:, :, None] - scores[:, None, :])
            likelihood = (matrix * probabilities.clamp(min=MIN_PROBABILITY).log()).sum()
            loss = -(likelihood - (scores**2).sum() / 2)
            loss.backward()
            optimizer.step()
    result = scores.detach()
    low, high = result.min(1).values, result.max(1).values
    return BEST_SCORE * (result[:, -1] - low) / (high - low)


def anchor_images(folder: Path | None) -> list[Path]:
    """The anchor images of a folder, in the order of their names.

    Raises:
        InputError: The folder does not exist or cannot be read.
    """
    return [] if folder is None else image_files(folder)
