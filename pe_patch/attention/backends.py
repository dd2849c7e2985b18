"""The ways to compute attention, and which of them can carry a scheme."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.masking_utils import eager_mask, flash_attention_mask, flex_attention_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.import_utils import is_flash_attn_2_available, is_torch_npu_available

from ..core.scheme import Scheme, overrides
from ..errors import OptionValueError, UnsupportedError, quoted, unknown


class HostView:
    """An attention as Transformers' flash function sees it: with Transformers' name for the implementation.

    That function takes the kernel that the config names, and ours is none that it knows.
    """

    def __init__(self, module: nn.Module, host: str) -> None:
        self._module, self.config = module, _ConfigView(getattr(module, "config", None), host)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _ConfigView:
    def __init__(self, config: Any, host: str) -> None:
        self._config, self._attn_implementation = config, host

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


Output = tuple[Tensor, Tensor | None]
"""Attention output `[batch, query, heads, head]` and, from eager, the weights `[batch, heads, query, key]`."""


@dataclass(frozen=True)
class Backend:
    """A way to compute attention: Transformers' name for it, and the mask function that goes with it."""

    name: str
    host: str
    mask: Callable
    dense: bool = False
    """Builds the scores, and with them any bias, in full."""
    widens: bool = False
    """Takes heads of any width, so that a bias may ride on extra dimensions of them."""

    @property
    def implementation(self) -> str:
        """The name under which ours is registered beside Transformers' own."""
        return f"pe_{self.host}"

    def function(self, module: nn.Module) -> Callable[..., Output] | None:
        """Transformers' own attention function. Each family has an eager one of its own (soft cap, sinks), or none if
        it does not speak the attention interface."""
        if self.dense:
            return getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        return ALL_ATTENTION_FUNCTIONS[self.host]


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("eager", "eager", eager_mask, dense=True),
        Backend("sdpa", "sdpa", sdpa_mask, widens=True),
        Backend("flex", "flex_attention", flex_attention_mask),
        Backend("flash", "flash_attention_2", flash_attention_mask, widens=True),
    )
}
NO_PAGING = (
    "generate_batch uses paged attention, which would drop the positional scheme; use generate() instead, or "
    "unpatch_model(model) first."
)
BY_IMPLEMENTATION = {backend.implementation: backend for backend in BACKENDS.values()}
BY_HOST = {backend.host: backend for backend in BACKENDS.values()}


def backend_for(implementation: str | None) -> Backend:
    """Our backend for an attention implementation by any of its names."""
    name = implementation or "sdpa"
    if not isinstance(name, str):
        raise OptionValueError(f"backend={quoted(name)} is not a name; give one of {', '.join(BACKENDS)}.")
    for table in (BACKENDS, BY_HOST, BY_IMPLEMENTATION):
        if name in table:
            return table[name]
    if name.startswith("paged|"):
        raise UnsupportedError(NO_PAGING)
    raise unknown("attention backend", name, BACKENDS)


def check_backend(backend: Backend, scheme: Scheme) -> None:
    """Raise `UnsupportedError` where this backend would drop what the scheme does to the scores."""
    biased, pointwise = overrides(scheme, "bias"), hasattr(scheme, "of")
    if scheme.own_scores and (backend.name == "flash" or (backend.name == "flex" and not scheme.ranged)):
        others = "'sdpa', 'flex' or 'eager'" if scheme.ranged else "'sdpa' or 'eager'"
        raise UnsupportedError(
            f"{scheme.name!r} makes its own scores, which the {backend.name} kernel does not take; use {others}."
        )
    if backend.name == "flash" and biased and not scheme.widens_heads:
        others = "'sdpa', 'flex' or 'eager'" if pointwise else "'sdpa' or 'eager'"
        raise UnsupportedError(f"Flash attention would drop the bias of {scheme.name!r}; use {others}.")
    if backend.name == "flex" and biased and not pointwise:
        raise UnsupportedError(f"{scheme.name!r} has no pointwise form for FlexAttention; use 'sdpa' or 'eager'.")
    if scheme.scorer is not None:
        check_backend(backend, scheme.scorer)
    if backend.name == "flash":
        _check_flash()


def _check_flash() -> None:
    """Raise `UnsupportedError` where no flash attention is installed for this machine."""
    if not (is_flash_attn_2_available(kernels_fallback_ok=True) or is_torch_npu_available()):
        raise UnsupportedError(
            "backend='flash' needs the package flash-attn, and a GPU that it runs on: pip install flash-attn "
            "--no-build-isolation. 'sdpa' needs no package and uses the flash kernels of PyTorch where it can."
        )
