"""Compare what a checkpoint's config claims with what the built model does, and test the installation."""

from .examination import diagnose, examine
from .finding import SEVERITIES as SEVERITIES
from .finding import Diagnosis, Finding, Severity
from .self_test import selftest

__all__ = ["Diagnosis", "Finding", "Severity", "diagnose", "examine", "selftest"]
