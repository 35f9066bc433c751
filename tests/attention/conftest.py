"""Fixtures of the engine tests that the attention tests share."""

from tests.engine.conftest import conversations

__all__ = ["conversations"]
