"""Which scheme a model wants for a longer window, why, and what that costs; read from its config alone."""

from .advise import Advice, advise

__all__ = ["Advice", "advise"]
