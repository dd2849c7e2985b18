"""Everything that depends on the version of Transformers.

Transformers 5.24 renamed the cache argument of its models, their outputs and its mask functions from `past_key_values`
to `cache`. Nothing else in this library may spell either name: it asks here. A name that a later version invents is not
guessed: a cache that arrives under it is an error, since a cache that is not seen gives silently wrong positions.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from functools import cache as memoised
from importlib.util import find_spec
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import Cache, GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from .errors import MissingPackageError, NoEffectError, UnsupportedError

OLDEST_TESTED = "5.17.0"
NEWEST_TESTED = "5.24.0"
"""The whole test suite or its fast subset passes on these versions and on the pinned one between them."""

INSTALLED = Version(transformers.__version__)

CACHE_ARGUMENTS = ("cache", "past_key_values", "layer_past")
"""Names of the cache argument in the forwards of models, layers and attentions, newest first."""


EXTRAS: Mapping[str, tuple[str, ...]] = {
    "report": ("altair", "vl_convert", "jinja2"),
    "eval": ("wonderwords",),
    "train": ("omegaconf", "altair", "vl_convert"),
}
"""Optional packages of this library, by the extra that installs them."""


def require_extra(extra: str) -> None:
    """Raise `MissingPackageError` if a package of an extra is not installed."""
    missing = [name for name in EXTRAS[extra] if find_spec(name) is None]
    if missing:
        raise MissingPackageError(
            f"This needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed. "
            f"Type: pip install 'pe_patch[{extra}]'"
        )


class UntestedVersionWarning(UserWarning):
    """The installed Transformers is newer or older than every version that pe_patch was tested on."""


def warn_if_untested() -> None:
    """Warn if the installed Transformers is newer than the newest tested one; a patch release counts as tested."""
    newest, oldest = Version(NEWEST_TESTED), Version(OLDEST_TESTED)
    if INSTALLED.release[:2] <= newest.release[:2] and INSTALLED >= oldest:
        return
    side = "newer" if INSTALLED > newest else "older"
    warnings.warn(
        f"transformers {INSTALLED} is {side} than every version that pe_patch was tested on ({OLDEST_TESTED} to "
        f"{NEWEST_TESTED}). Run `pe-patch selftest` before you trust its results, or install a tested version: "
        f"pip install 'transformers=={NEWEST_TESTED}'.",
        UntestedVersionWarning,
        stacklevel=3,
    )


@memoised
def argument_names(function: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of a method's arguments without `self` and without `**kwargs`."""
    parameters = list(inspect.signature(function).parameters.values())[1:]
    return tuple(p.name for p in parameters if p.kind is not p.VAR_KEYWORD)


def cache_argument(function: Callable[..., Any]) -> str | None:
    """Return what a forward calls its cache argument; None if it has no argument of a known name."""
    names = argument_names(function)
    return next((name for name in CACHE_ARGUMENTS if name in names), None)


def check_decoder_forward(cls: type, needs_position_ids: bool) -> str:
    """Return the name of the cache argument of a decoder's base model.

    Raises:
        UnsupportedError: the forward lacks one of the arguments that a patch reads, so that the installed Transformers
            has renamed it and the patch would not see it.
    """
    names, found = argument_names(cls.forward), cache_argument(cls.forward)
    missing = [name for name in ("input_ids", "attention_mask", "inputs_embeds") if name not in names]
    missing += ["position_ids"] if needs_position_ids and "position_ids" not in names else []
    if found is None:
        missing.append("/".join(CACHE_ARGUMENTS))
    if found is None or missing:
        raise UnsupportedError(
            f"{cls.__name__}.forward of transformers {INSTALLED} takes no argument {missing[0]!r}; its arguments are "
            f"{', '.join(names)}. A patch would not see what it reads there. Install a tested version: "
            f"pip install 'transformers=={NEWEST_TESTED}'."
        )
    return found


def is_cache(value: Any) -> bool:
    """Return whether a value is a key-value cache, by its class or by what it can do."""
    return isinstance(value, Cache) or (hasattr(value, "get_seq_length") and hasattr(value, "update"))


def take_cache(kwargs: dict[str, Any], argument: str | None, owner: str) -> Any:
    """Return the cache among the keywords of one call, and leave it there under `argument` alone.

    Args:
        kwargs: keywords of a call of a forward; changed in place.
        argument: the name under which that forward takes its cache.
        owner: what to call the forward in an error.

    Raises:
        UnsupportedError: a cache came under a name that is not known, or two came.
    """
    found = {name: kwargs.pop(name) for name in CACHE_ARGUMENTS if kwargs.get(name) is not None}
    caches = list({id(value): value for value in found.values()}.values())
    if len(caches) > 1:
        raise UnsupportedError(f"{owner} was handed two caches, as {' and '.join(found)}; give one.")
    strange = [name for name, value in kwargs.items() if is_cache(value)]
    if strange:
        raise UnsupportedError(
            f"{owner} of transformers {INSTALLED} was handed a cache as {strange[0]!r}, a name that pe_patch does not "
            f"know (it knows {', '.join(CACHE_ARGUMENTS)}), so positions would be wrong. Install a tested version: "
            f"pip install 'transformers=={NEWEST_TESTED}'."
        )
    for name in CACHE_ARGUMENTS:
        kwargs.pop(name, None)
    if not caches:
        return None
    if argument is None:
        raise UnsupportedError(f"{owner} takes no cache, and was handed one as {next(iter(found))!r}.")
    kwargs[argument] = caches[0]
    return caches[0]


def cache_in(kwargs: Mapping[str, Any]) -> Any:
    """Return the cache among the keywords of a call, or None."""
    return next((kwargs[name] for name in CACHE_ARGUMENTS if kwargs.get(name) is not None), None)


def cache_keyword(model: Any, cache: Any) -> dict[str, Any]:
    """Return the keyword by which a model takes a cache; empty for None."""
    if cache is None:
        return {}
    name = cache_argument(type(model).forward)
    if name is None:
        raise NoEffectError(f"{type(model).__name__}.forward takes no cache.")
    return {name: cache}


def cache_of(output: Any) -> Any:
    """Return the cache in a model's output, or None."""
    return getattr(output, "cache", None) if hasattr(output, "cache") else getattr(output, "past_key_values", None)


def checkpoints_layers(base: Any) -> bool:
    """Return whether a pass over this base model recomputes its layers in backward, and so fills no cache."""
    if not (getattr(base, "gradient_checkpointing", False) and base.training):
        return False
    return INSTALLED.release[:2] < (5, 24) or torch.is_grad_enabled()


PREFILL = "_prefill"
"""The method of Transformers' `GenerationMixin` that reads a prompt, checked on 5.17, 5.23 and 5.24."""


def prefill_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int | None, int]:
    """Return `prefill_chunk_size` and the number of prompt tokens of one call of `GenerationMixin._prefill`."""
    given = dict(zip(argument_names(getattr(GenerationMixin, PREFILL)), args, strict=False)) | kwargs
    return given["generation_config"].prefill_chunk_size, given["input_ids"].shape[1]


MASK_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "full_attention": create_causal_mask,
    "sliding_attention": create_sliding_window_causal_mask,
}
"""Transformers' function for the mask of each layer type."""


def layer_mask(layer_type: str, cache: Any, **arguments: Any) -> Any:
    """Return the mask that Transformers makes for layers of one type: a tensor, a block mask, or None."""
    function = MASK_FUNCTIONS[layer_type]
    name = "cache" if "cache" in inspect.signature(function).parameters else "past_key_values"
    return function(**{name: cache}, **arguments)
