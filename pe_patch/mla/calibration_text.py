"""Tokenization of calibration texts with the model's own tokenizer."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from ..errors import OptionError
from . import calibration as latent


def tokens(calibration: latent.Calibration, model: Any, **options: Any) -> list[Tensor]:
    """Return rows of token ids from ids or texts; see `pe_patch.mla.calibration.tokens` for the options."""
    return latent.tokens(calibration, model, partial(tokenize, model), **options)


def tokenize(model: Any, texts: list[str]) -> list[list[int]]:
    """Tokenize texts with the tokenizer of `model.name_or_path`, including the special tokens that it adds.

    Raises:
        OptionError: the tokenizer cannot be loaded.
    """
    from transformers import AutoTokenizer

    name = getattr(model, "name_or_path", "")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name) if name else None
    except Exception as problem:  # the type of error depends on the hub, the folder and the tokenizer class
        raise _no_tokenizer(f"the tokenizer of {name!r} cannot be loaded ({type(problem).__name__})") from problem
    if tokenizer is None:
        raise _no_tokenizer("this model was not loaded from anywhere that has a tokenizer")
    return tokenizer(texts, verbose=False)["input_ids"]


def _no_tokenizer(why: str) -> OptionError:
    return OptionError(f'calibration: {why}; give token ids instead of texts: tokenizer(texts)["input_ids"].')
