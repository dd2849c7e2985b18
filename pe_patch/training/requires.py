"""Raises a clear error if the packages that training needs are not installed."""

from ..compat import require_extra

require_extra("train")
