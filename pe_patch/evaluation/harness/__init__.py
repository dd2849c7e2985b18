"""Tasks of lm-evaluation-harness on a model that is already loaded, patched or not, with no prompt cut."""

from .run import RETENTION, harness, retention

__all__ = ["RETENTION", "harness", "retention"]
