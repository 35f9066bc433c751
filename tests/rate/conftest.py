"""Engines of the golden checkpoints, one per session."""

from tests.scoring.conftest import family_engine

__all__ = ["family_engine"]
