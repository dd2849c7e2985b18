"""Tokenization of calibration texts with the model's own tokenizer."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from .. import compat
from ..errors import CheckpointError, OptionError
from . import calibration as latent


def tokens(calibration: latent.Calibration, model: Any, **options: Any) -> list[Tensor]:
    """Return rows of token ids from ids or texts; see `pe_patch.mla.calibration.tokens` for the options."""
    return latent.tokens(calibration, model, partial(tokenize, model), **options)


def tokenize(model: Any, texts: list[str]) -> list[list[int]]:
    """Tokenize texts with the tokenizer of `model.name_or_path`, including the special tokens that it adds.

    Raises:
        OptionError: the tokenizer cannot be loaded.
    """
    try:
        tokenizer = compat.source_tokenizer(model)
    except CheckpointError as error:
        raise OptionError(
            f'calibration: {error}; give token ids instead of texts: tokenizer(texts)["input_ids"].'
        ) from error
    return tokenizer(texts, verbose=False)["input_ids"]
