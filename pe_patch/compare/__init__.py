"""Compare several schemes on one model under equal conditions: quality beyond the window, and cost."""

from .compared_scheme import ComparedScheme
from .comparison import Comparison
from .presets import PRESETS
from .run import compare

__all__ = ["PRESETS", "ComparedScheme", "Comparison", "compare"]
