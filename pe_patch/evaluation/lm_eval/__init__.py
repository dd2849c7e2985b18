"""Run tasks of lm-evaluation-harness on a loaded model, patched or not, without cutting any prompt."""

from .run import RETENTION, harness, retention

__all__ = ["RETENTION", "harness", "retention"]
