"""Recommend a scheme for a longer window, with reasons and costs, from a model's config alone."""

from .advise import Advice, advise

__all__ = ["Advice", "advise"]
