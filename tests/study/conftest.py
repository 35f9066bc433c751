"""What tests of looking share with those of answering."""

from tests.inference.conftest import conversations

__all__ = ["conversations"]
