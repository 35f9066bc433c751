"""Scores of images and videos: quality and aesthetics. Start with `scorer.ImageScorer`."""
