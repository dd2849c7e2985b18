"""Import the packages that draw charts and pages; if one is missing, the error says which extra installs it."""

from ...compat import require_extra

try:
    import altair as alt
    import jinja2
    import vl_convert
except ImportError:
    require_extra("report")
    raise

__all__ = ["alt", "jinja2", "vl_convert"]
