"""How well the next token is predicted: a file for each way to measure it, each saying which tokens it scored."""

from .position import position_buckets
from .sliding import sliding_losses
from .task import Perplexity

__all__ = ["Perplexity", "position_buckets", "sliding_losses"]
