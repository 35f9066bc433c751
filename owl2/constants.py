"""Constants that several packages share."""

MAX_NUM_FRAMES = 4096  # of a video
IGNORE_INDEX = -100  # label of a position without a loss, as in `torch.nn.CrossEntropyLoss`
LEVELS = ("excellent", "good", "fair", "poor", "bad")  # words of a rating, the best first
