"""Attention backends (eager, SDPA, FlexAttention, flash), and the schemes that each of them supports."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.masking_utils import eager_mask, flash_attention_mask, flex_attention_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.import_utils import is_flash_attn_2_available, is_torch_npu_available

from .. import compat
from ..core.scheme import Scheme, overrides
from ..errors import OptionValueError, UnsupportedError, quoted, unknown


class NativeView:
    """A view of an attention module whose config names Transformers' own implementation.

    Transformers' flash function looks up the kernel by the name in the config, and does not know ours.
    """

    def __init__(self, module: nn.Module, native_name: str) -> None:
        self._module, self.config = module, compat.ConfigView(getattr(module, "config", None), native_name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


Output = tuple[Tensor, Tensor | None]
"""Attention output `[batch, query, heads, head]` and, from eager, the weights `[batch, heads, query, key]`."""


@dataclass(frozen=True)
class Backend:
    """An attention backend: its name, Transformers' name for it, and its mask function."""

    name: str
    """The name in `backend=`."""
    native_name: str
    """The name of Transformers' attention implementation."""
    mask: Callable
    """Transformers' function that builds the mask for this implementation."""
    dense: bool = False
    """It materializes the scores, and therefore adds any bias."""
    supports_bias_as_head_dims: bool = False
    """It accepts any head width, so extra head dimensions can express a bias."""

    @property
    def implementation(self) -> str:
        """Return the name under which our attention function is registered with Transformers."""
        return f"pe_{self.native_name}"

    def function(self, module: nn.Module) -> Callable[..., Output] | None:
        """Return Transformers' own attention function for a module.

        Each family defines its eager function (soft cap, sinks) in its modeling file. None if the family does not use
        the attention interface.
        """
        if self.dense:
            return getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        return ALL_ATTENTION_FUNCTIONS[self.native_name]


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("eager", "eager", eager_mask, dense=True),
        Backend("sdpa", "sdpa", sdpa_mask, supports_bias_as_head_dims=True),
        Backend("flex", "flex_attention", flex_attention_mask),
        Backend("flash", "flash_attention_2", flash_attention_mask, supports_bias_as_head_dims=True),
    )
}
NO_PAGING = (
    "generate_batch uses paged attention, which would drop the positional scheme; use generate() instead, or "
    "unpatch_model(model) first."
)
BY_IMPLEMENTATION = {backend.implementation: backend for backend in BACKENDS.values()}
BY_NATIVE_NAME = {backend.native_name: backend for backend in BACKENDS.values()}


def backend_for(implementation: str | None) -> Backend:
    """Return the backend with this name: ours, Transformers', or the name under which ours is registered.

    Args:
        implementation: the name; None or an empty string for SDPA.

    Raises:
        OptionValueError: the name is not a string, or unknown.
        UnsupportedError: the name is that of a paged implementation.
    """
    name = implementation or "sdpa"
    if not isinstance(name, str):
        raise OptionValueError(f"backend={quoted(name)} must be a string; use one of {', '.join(BACKENDS)}.")
    for table in (BACKENDS, BY_NATIVE_NAME, BY_IMPLEMENTATION):
        if name in table:
            return table[name]
    if name.startswith("paged|"):
        raise UnsupportedError(NO_PAGING)
    raise unknown("attention backend", name, BACKENDS)


def check_backend(backend: Backend, scheme: Scheme) -> None:
    """Raise `UnsupportedError` if the backend cannot apply what the scheme does to the scores."""
    biased, pointwise = overrides(scheme, "bias"), hasattr(scheme, "score_bias")
    ranged = scheme.own_scores == "ranges"
    if scheme.own_scores and (backend.name == "flash" or (backend.name == "flex" and not ranged)):
        others = "'sdpa', 'flex' or 'eager'" if ranged else "'sdpa' or 'eager'"
        raise UnsupportedError(
            f"{scheme.name!r} computes its own scores, which backend={backend.name!r} does not support; use {others}."
        )
    if backend.name == "flash" and biased and not getattr(scheme, "supports_bias_as_head_dims", False):
        others = "'sdpa', 'flex' or 'eager'" if pointwise else "'sdpa' or 'eager'"
        raise UnsupportedError(f"Flash attention would drop the bias of {scheme.name!r}; use {others}.")
    if backend.name == "flex" and biased and not pointwise:
        raise UnsupportedError(f"{scheme.name!r} has no pointwise form for FlexAttention; use 'sdpa' or 'eager'.")
    if scheme.scorer is not None:
        check_backend(backend, scheme.scorer)
    if backend.name == "flash":
        _check_flash()


def _check_flash() -> None:
    """Raise `UnsupportedError` if no flash attention is installed for this machine."""
    if not (is_flash_attn_2_available(kernels_fallback_ok=True) or is_torch_npu_available()):
        raise UnsupportedError(
            "backend='flash' requires the package flash-attn and a GPU that it supports: pip install flash-attn "
            "--no-build-isolation. backend='sdpa' needs no package and uses PyTorch's flash kernels where possible."
        )
