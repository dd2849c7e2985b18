"""Run the self-test of the installed versions."""

from __future__ import annotations

import time
from pathlib import Path

from ...errors import silence_log_warnings
from ..examined import quiet
from .checks import check_built, check_case
from .models import built_in_cases, given_case
from .result import Check, SelfTest, installed_versions


def selftest(
    model: str | Path | None = None, *, dtype: str = "float32", device: str | None = None, built_in: bool = True
) -> SelfTest:
    """Run one scheme of each mechanism and compare logits with and without a patch, a cache and padding.

    The checks run on the demo model and on a small random BLOOM and GPT-NeoX. They take less than a minute and need no
    network. Run them after an upgrade of Transformers.

    Args:
        model: a folder or a hub name to check as well. Schemes that its family refuses are skipped and listed.
        dtype: the dtype of `model`. Half precision has a wider tolerance, because it rounds more.
        device: the device of `model`; None takes a GPU if there is one.
        built_in: False checks only `model`.

    Returns:
        The result of each check. A check that raises an exception counts as failed.

    Raises:
        OptionError: if `dtype` does not exist.
        CheckpointError: if `model` cannot be read.
    """
    started = time.perf_counter()
    checks: list[Check] = []
    with quiet(), silence_log_warnings():  # a scheme that needs training is compared here, not used
        user_case = given_case(model, dtype, device)
        for name, build in built_in_cases().items() if built_in else ():
            checks += check_built(name, build)
        for load in user_case:
            checks += check_case(load())
    return SelfTest(installed_versions(), checks, time.perf_counter() - started)
