"""Raises a clear error if the packages that draw charts are not installed."""

from ...compat import require_extra

require_extra("report")
