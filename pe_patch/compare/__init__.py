"""Compare several schemes on one model under equal conditions: quality beyond the window, and cost."""

from ..evaluation.charts import requires as requires  # before what imports the packages of the extra
from .compared_scheme import ComparedScheme
from .comparison import Comparison
from .presets import PRESETS
from .run import compare

__all__ = ["PRESETS", "ComparedScheme", "Comparison", "compare"]
