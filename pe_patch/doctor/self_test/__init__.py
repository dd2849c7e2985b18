"""Check that patching works with the installed versions of PyTorch and Transformers."""

from .result import Check, SelfTest
from .run import selftest

__all__ = ["Check", "SelfTest", "selftest"]
