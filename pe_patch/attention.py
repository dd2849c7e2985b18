"""The attention function that every patched layer ends in, and what a scheme may ask of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import (
    AttentionMaskInterface,
    eager_mask,
    flash_attention_mask,
    flex_attention_mask,
    sdpa_mask,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .band import LONG, banded_attention, reaches
from .errors import NoEffectError, UnsupportedError, unknown
from .kernels import portable
from .positions import Positions
from .ranges import Range
from .scheme import Scheme, overrides

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
    for table in (BACKENDS, BY_HOST, BY_IMPLEMENTATION):
        if name in table:
            return table[name]
    if name.startswith("paged|"):
        raise UnsupportedError(NO_PAGING)
    raise unknown("attention backend", name, BACKENDS)


@dataclass
class Core:
    """What a scheme may ask for once queries, keys and values are projected. It never sees Transformers."""

    module: nn.Module
    mask: Tensor | None
    scaling: float
    dropout: float
    backend: Backend
    extra: dict[str, Any]

    @property
    def widens(self) -> bool:
        """Whether a bias is better carried on extra dimensions of the head than built."""
        return self.backend.widens

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, positions: Positions, bias: Scheme | None = None
    ) -> Output:
        """Attention of query `[batch, heads, query, head]` over key and value `[batch, key_heads, key, head]`.

        `bias` is the scheme whose `bias` (or pointwise `of`) is added to the scaled scores.
        """
        if bias is None:
            return self.host(query, key, value, self.mask)
        if self.backend.dense:
            additive = bias.bias(query * self.scaling, key, positions)
            assert additive is not None
            return self.mix(self.scores(query, key) + additive, value)
        return BIASED[self.backend.name](self, query, key, value, positions, bias)

    @property
    def causal(self) -> bool:
        """Whether a query sees no key ahead of it where no mask says so."""
        return getattr(self.module, "is_causal", True)

    @property
    def layer(self) -> int:
        """Which of the model's layers this is, from 0."""
        return self.module.__dict__["pe_layer"]

    def part(self, start: int, stop: int, end: int) -> Core:
        """The same for the queries `start` to `stop` and the keys up to `end`; without a mask `end` is where the
        causal view of the last of them ends."""
        return self if self.mask is None else replace(self, mask=self.mask[:, :, start:stop, :end])

    def allowed(self, query: Tensor, key: Tensor) -> Tensor:
        """Which keys each query may see, `[batch | 1, 1, query, key]`, bool."""
        rows, columns = query.shape[2], key.shape[2]
        if self.mask is None:
            every = torch.ones(1, 1, rows, columns, dtype=torch.bool, device=query.device)
            return every.tril(columns - rows) if self.causal and rows > 1 else every
        mask = self.mask[..., :columns]
        return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2

    def rows(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        positions: Positions,
        scores: Callable[[Tensor, Tensor, Positions, Core], Tensor],
        also: Callable[[Tensor, Positions], Tensor] | None = None,
    ) -> Output:
        """Attention by scores of one's own, for what needs to see whole rows of them.

        `scores(query, key, positions, core)` gives `[batch, heads, query, key]`, float32, for some of the queries and
        all the keys that they may see (`core.scores` and `core.allowed` help); `also(weights, positions)` gives what
        is added to the output, `[batch, heads, query, head]`.
        """

        def made(queries: Any, keys: Any, seen: Positions, part: Core, _: Any) -> Tensor:
            return scores(queries[0], keys[0], seen, part)

        if self.backend.dense:
            output, weights = self.mix(scores(query, key, positions, self), value)
            assert weights is not None
            return output if also is None else output + also(weights, positions).transpose(1, 2), weights
        return portable.by_rows(self, (query,), (key,), value, positions, made, also), None

    def ranges(self, ranges: Sequence[Range], value: Tensor, positions: Positions) -> Output:
        """Attention in which pairs of a query and a key differ in their encoding: one softmax over all ranges."""
        queries, keys = tuple(one.query for one in ranges), tuple(one.key for one in ranges)

        def made(queries: Any, keys: Any, seen: Positions, part: Core, chunk: tuple[int, int, int]) -> Tensor:
            total: Tensor | None = None
            for whole, query, key in zip(ranges, queries, keys, strict=True):
                own = part.scores(query, key)
                covered = whole.part(*chunk).covers(seen)[:, None]
                rest = torch.full_like(own, torch.finfo(own.dtype).min) if total is None else total
                total = torch.where(covered, own, rest)
            assert total is not None
            return total

        if self.backend.dense:
            count, total = queries[0].shape[2], keys[0].shape[2]
            return self.mix(made(queries, keys, positions, self, (0, count, total)), value)
        return portable.by_rows(self, queries, keys, value, positions, made), None

    def reaches(self, query: Tensor, key: Tensor, positions: Positions, slopes: Tensor) -> list[int] | None:
        """How far back each head has to look under a bias of -slope x distance; None where it has to be everywhere.

        Only a long first pass over consecutive positions is worth it; reading the bound would break a compiled graph.
        """
        count = query.shape[2]
        if self.backend.name != "sdpa" or self.mask is not None or key.shape[2] != count or count < LONG:
            return None
        if torch.compiler.is_compiling() or bool((positions.query.diff(dim=-1) != 1).any()):
            return None
        return reaches(query, key, self.scaling, slopes)

    def widened(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        more_query: Tensor,
        more_key: Tensor,
        reach: list[int] | None = None,
    ) -> Output:
        """Attention with extra dimensions on query and key; value is padded, since unequal heads leave fast kernels.

        With `reach`, heads leave out keys farther back than that.
        """
        width, extra = value.shape[-1], more_query.shape[-1]
        more_query = more_query.expand(query.shape[0], query.shape[1], -1, -1)
        more_key = more_key.expand(key.shape[0], key.shape[1], -1, -1)
        # Before the head's own dimensions: large terms that cancel must meet before anything small is added to them.
        query, key = torch.cat((more_query, query), -1), torch.cat((more_key, key), -1)
        value = nn.functional.pad(value, (0, query.shape[-1] - width if extra else 0))
        if reach is not None:
            dropout = self.dropout if self.module.training else 0.0
            banded = banded_attention(query, key, value, reach, scaling=self.scaling, dropout=dropout)
            return banded[..., :width], None
        output, weights = self.host(query, key, value, self.mask)
        return output[..., :width], weights

    def where(self, condition: Tensor, first: Output, second: Output) -> Output:
        """The one or the other output for each query; condition `[batch, query, 1, 1]`."""
        weights = None
        if first[1] is not None and second[1] is not None:
            weights = torch.where(condition.transpose(1, 2), first[1], second[1])
        return torch.where(condition, first[0], second[0]), weights

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        """Scaled scores in float32 or wider, `[batch, heads, query, key]`, soft-capped where the family does so."""
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        scores = torch.matmul(query, key.transpose(2, 3))
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * self.scaling
        softcap = self.extra.get("softcap")
        return scores if softcap is None else torch.tanh(scores / softcap) * softcap

    def mix(self, scores: Tensor, value: Tensor) -> Output:
        """Mask and normalise scores, and mix the values by them."""
        lowest = torch.finfo(scores.dtype).min
        if self.mask is None and self.causal and scores.shape[2] > 1:
            rows, columns = scores.shape[-2:]
            causal = torch.ones(rows, columns, dtype=torch.bool, device=scores.device).tril(columns - rows)
            scores = scores.masked_fill(~causal, lowest)
        elif self.mask is not None:
            mask = self.mask[..., : scores.shape[-1]]
            scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
        sinks = self.extra.get("s_aux")
        if sinks is not None:
            sinks = sinks.to(scores.dtype).reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
            scores = torch.cat((scores, sinks), -1)
        weights = scores.softmax(-1)
        weights = (weights if sinks is None else weights[..., :-1]).to(value.dtype)
        weights = nn.functional.dropout(weights, self.dropout, self.module.training)
        value = value.repeat_interleave(weights.shape[1] // value.shape[1], 1)
        return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights

    def host(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Output:
        function = self.backend.function(self.module)
        if function is None:
            return self.mix(self.scores(query, key), value)
        return function(self.module, query, key, value, mask, scaling=self.scaling, dropout=self.dropout, **self.extra)


def _biased_by_chunks(
    core: Core, query: Tensor, key: Tensor, value: Tensor, positions: Positions, bias: Scheme
) -> Output:
    return portable.biased(core, query, key, value, positions, bias), None


def _flex(core: Core, query: Tensor, key: Tensor, value: Tensor, positions: Positions, bias: Scheme) -> Output:
    """A distance bias as FlexAttention's score modification."""
    from transformers.integrations.flex_attention import compile_friendly_flex_attention

    of = getattr(bias, "of", None)
    if of is None:
        raise UnsupportedError(f"{bias.name!r} has no pointwise form for FlexAttention; use backend='sdpa' or 'eager'.")
    if core.extra.get("softcap") is not None or core.extra.get("s_aux") is not None or core.dropout:
        raise UnsupportedError("FlexAttention here takes no soft cap, sinks or dropout beside a bias; use 'eager'.")
    at_query = positions.query.expand(query.shape[0], -1)
    at_key = positions.key.expand(query.shape[0], -1)

    def modify(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score + of(at_query[batch, q] - at_key[batch, k], head)

    output: Any = compile_friendly_flex_attention(
        query, key, value, score_mod=modify, block_mask=core.mask, enable_gqa=key.shape[1] != query.shape[1],
        scale=core.scaling, training=core.module.training,
    )  # fmt: skip
    return output.transpose(1, 2).contiguous(), None


def _no_flash(core: Core, query: Tensor, key: Tensor, value: Tensor, positions: Positions, bias: Scheme) -> Output:
    raise UnsupportedError(
        f"Flash attention would drop the bias of {bias.name!r} in {type(core.module).__name__}; use backend='sdpa', "
        "'flex' or 'eager'."
    )


BIASED: dict[str, Callable[..., Output]] = {"sdpa": _biased_by_chunks, "flex": _flex, "flash": _no_flash}


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    backend: Backend,
    scaling: float | None,
    dropout: float = 0.0,
    positions: Positions | None,
    **extra: Any,
) -> Output:
    """Attention of one layer under the scheme that was bound to it; Transformers' own where none was."""
    probe = module.__dict__.get("pe_probe")
    if probe is not None:
        probe.append((module, positions))
    core = Core(module, mask, query.shape[-1] ** -0.5 if scaling is None else scaling, dropout, backend, extra)
    scheme = module.__dict__.get("pe_scheme")
    if scheme is None:
        return core.host(query, key, value, mask)
    if positions is None:
        raise NoEffectError(
            f"No positions reached {type(module).__name__}, so {scheme.name!r} would have no effect there. Call the "
            "model or its base model rather than a layer of it; unpatch_model(model) to use layers alone."
        )
    return scheme("attend", query, key, value, positions.fit(key.shape[2]), core)


def _register(backend: Backend) -> None:
    def interface(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        pe_positions: Positions | None = None,
        **extra: Any,
    ) -> Output:
        return attend(
            module, query, key, value, attention_mask, backend=backend, scaling=scaling, dropout=dropout,
            positions=pe_positions, **extra,
        )  # fmt: skip

    AttentionInterface.register(backend.implementation, interface)
    AttentionMaskInterface.register(backend.implementation, backend.mask)


for _backend in BACKENDS.values():
    _register(_backend)


def check_backend(backend: Backend, scheme: Scheme) -> None:
    """Raise `UnsupportedError` where this backend would drop what the scheme does to the scores."""
    biased, pointwise = overrides(scheme, "bias"), hasattr(scheme, "of")
    if scheme.own_scores and backend.name in ("flash", "flex"):
        raise UnsupportedError(
            f"{scheme.name!r} makes its own scores, which the {backend.name} kernel does not take; use 'sdpa' or "
            "'eager'."
        )
    if backend.name == "flash" and biased and not scheme.widens_heads:
        others = "'sdpa', 'flex' or 'eager'" if pointwise else "'sdpa' or 'eager'"
        raise UnsupportedError(f"Flash attention would drop the bias of {scheme.name!r}; use {others}.")
    if backend.name == "flex" and biased and not pointwise:
        raise UnsupportedError(f"{scheme.name!r} has no pointwise form for FlexAttention; use 'sdpa' or 'eager'.")
    if scheme.scorer is not None:
        check_backend(backend, scheme.scorer)
