"""What tests of looking share with those of answering."""

from tests.engine.conftest import conversations

__all__ = ["conversations"]
