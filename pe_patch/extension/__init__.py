"""Extend a model in one call: choose a scheme by measurement, train if asked, write the checkpoint and check it."""

from .plan import ExtensionPlan
from .run import Extension, extend

__all__ = ["Extension", "ExtensionPlan", "extend"]
