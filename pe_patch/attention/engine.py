"""The attention engine of one layer. `core/engine.py` declares the part of it that schemes use."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..core.engine import AttentionEngine
from ..core.head_slices import Heads
from ..core.positions import Positions
from ..core.ranges import Range
from ..core.scheme import DistanceBias, Scheme
from ..errors import UnsupportedError
from . import chunked
from .backends import Backend, NativeView, Output
from .kernels import cpu
from .kernels import ranges as cpu_ranges
from .kernels.band import LONG, attention_by_distance, reaches
from .kernels.clipped import Clipped
from .kernels.cpu import HIDDEN
from .kernels.dense import Dense
from .kernels.relative import Relative, distances

ROWS = 1024
"""Rows of a mask that are compared with the positions together."""


@dataclass
class Engine(AttentionEngine):
    """The attention of one layer in one forward pass, in the backend that the model uses."""

    module: nn.Module
    mask: Tensor | None
    scaling: float
    dropout: float
    backend: Backend
    extra: dict[str, Any]
    heads: Heads | None = None
    """The range of the model's heads that this process holds; None for all of them."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, positions: Positions, bias: Scheme | None = None
    ) -> Output:
        """Compute attention, and add a bias to the scaled scores if a scheme is given.

        Args:
            query: `[batch, heads, query, head]`.
            key: `[batch, key_heads, key, head]`.
            value: `[batch, key_heads, key, head]`.
            positions: positions of the queries and keys.
            bias: the scheme whose `bias` (or pointwise `score_bias`) is added; None for no bias.

        Returns:
            The output `[batch, query, heads, head]`, and the weights `[batch, heads, query, key]` or None.

        Raises:
            UnsupportedError: the backend cannot add this bias.
        """
        if bias is None:
            return self.native_attention(query, key, value, self.mask)
        if self.backend.dense:
            additive = self.additive(bias, query, key, positions)
            return self.softmax_and_mix(self.scores(query, key) + additive, value)
        fast = self._fast_bias(query, key, value, positions, bias)
        if fast is not None:
            return fast, None
        # For a single query on a CPU, a row of the bias is small and cheaper to build than extra head dimensions.
        is_row = query.shape[2] == 1 and query.device.type == "cpu" and self.backend.name == "sdpa"
        has_float64 = query.device.type != "mps"  # `bias_as_head_dims` splits positions into limbs in float64
        if (
            isinstance(bias, DistanceBias)
            and self.backend.supports_bias_as_head_dims
            and has_float64
            and not is_row
            and not self.has_sinks
            and not self.looks_ahead(positions)
        ):
            extra_dims = bias.bias_as_head_dims(positions, self.scaling, query.dtype)
            if extra_dims is not None:
                return self._with_extra_head_dims(query, key, value, *extra_dims)
        return BIASED[self.backend.name](self, query, key, value, positions, bias)

    @property
    def has_sinks(self) -> bool:
        """Return whether the family has a learned attention sink for each head (gpt-oss)."""
        return self.extra.get("s_aux") is not None

    def additive(self, bias: Scheme, query: Tensor, key: Tensor, positions: Positions) -> Tensor:
        """Return the bias to add to the scaled scores, broadcastable to `[batch, heads, query, key]`.

        Softmax over the keys ignores a constant for each query, so ALiBi may use the key's position alone. A learned
        sink competes with the scores and makes such a constant matter, and a key ahead has another sign, so there the
        bias uses the exact distance. The layers of a decoding step share a bias by distance.
        """
        if isinstance(bias, DistanceBias) and positions.encoded is not None and positions.query.shape[1] == 1:
            name = ("bias", id(bias), positions.key.shape[1], positions.key.device, self.has_sinks)
            return positions.encoded.once(name, lambda: self._additive(bias, query, key, positions), bias)
        return self._additive(bias, query, key, positions)

    def _additive(self, bias: Scheme, query: Tensor, key: Tensor, positions: Positions) -> Tensor:
        query = query * self.scaling
        own_form = type(bias).bias is not DistanceBias.bias
        if isinstance(bias, DistanceBias) and own_form and (self.has_sinks or self.looks_ahead(positions)):
            additive = DistanceBias.bias(bias, query, key, positions)
        else:
            additive = bias.bias(query, key, positions)
        assert additive is not None
        return additive

    @property
    def causal(self) -> bool:
        """Return whether attention without a mask is causal."""
        is_causal = self.extra.get("is_causal")
        return getattr(self.module, "is_causal", True) if is_causal is None else is_causal

    def looks_ahead(self, positions: Positions) -> bool:
        """Return whether a query attends to a key with a greater position: in encoders, and by a mask or position ids
        of the caller's.

        A compiled graph cannot read them, and takes the model's word. So do kernels that get documents in place of a
        mask.
        """
        if not self.causal:
            return True
        if torch.compiler.is_compiling():
            return False
        count = positions.query.shape[1]
        if count == 1:
            return bool((positions.key > positions.query).any())
        if not isinstance(self.mask, Tensor):
            if self.mask is not None or self.backend.name not in ("sdpa", "eager"):
                return False
            return bool((positions.key[:, :count].cummax(-1).values > positions.query).any())
        for start in range(0, count, ROWS):  # a whole comparison could be larger than the mask
            rows = slice(start, start + ROWS)
            seen = self.mask[:, :, rows if self.mask.shape[2] > 1 else slice(None), : positions.key.shape[1]]
            seen = seen if seen.dtype == torch.bool else seen > HIDDEN
            if bool((seen & (positions.key[:, None] > positions.query[:, rows, None])[:, None]).any()):
                return True
        return False

    def after_rotation(self, x: Tensor) -> Tensor:
        """Normalize rotated queries or keys if the family does so after its rotation; else return them unchanged."""
        norm = self.module.__dict__.get("pe_norm_after_rotation")
        return x if norm is None else norm(x)

    @property
    def is_specification(self) -> bool:
        """Return whether this is eager attention, the specification, which reuses nothing."""
        return self.backend.dense

    @property
    def cache_layer(self) -> int | None:
        """Return the index of the layer in its cache, as far as the family's module says."""
        return getattr(self.module, "layer_idx", None)

    @property
    def layer(self) -> int:
        """Return the index of the layer, counted from 0."""
        return self.module.__dict__["pe_layer"]

    def slice_queries(self, start: int, stop: int, end: int) -> Engine:
        """Return the engine for the queries `start` to `stop` and the keys up to `end`.

        Without a mask, the same engine serves: causal attention aligns the last query with the last key.
        """
        return self if self.mask is None else replace(self, mask=self.mask[:, :, start:stop, :end])

    def allowed(self, query: Tensor, key: Tensor) -> Tensor:
        """Return the boolean mask of the keys that each query attends to, `[batch | 1, 1, query, key]`."""
        rows, columns = query.shape[2], key.shape[2]
        if self.mask is None:
            all_pairs = torch.ones(1, 1, rows, columns, dtype=torch.bool, device=query.device)
            return all_pairs.tril(columns - rows) if self.causal and rows > 1 else all_pairs
        mask = self.mask[..., :columns]
        return mask if mask.dtype == torch.bool else mask > HIDDEN

    def rows(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        positions: Positions,
        scores: Callable[[Tensor, Tensor, Positions, Engine], Tensor],
        extra_output: Callable[[Tensor, Positions], Tensor] | None = None,
    ) -> Output:
        """Compute attention from scores that the scheme computes row by row.

        Args:
            query: `[batch, heads, query, head]`.
            key: `[batch, key_heads, key, head]`.
            value: `[batch, key_heads, key, head]`.
            positions: positions of the queries and keys.
            scores: `scores(query, key, positions, engine)` returns float32 scores `[batch, heads, query, key]` for a
                chunk of the queries and all keys that they attend to. `engine.scores` and `engine.allowed` help.
            extra_output: `extra_output(weights, positions)` returns a term `[batch, heads, query, head]` to add to the
                output.
        """

        if self.backend.dense:
            output, weights = self.softmax_and_mix(scores(query, key, positions, self), value)
            assert weights is not None
            term = 0 if extra_output is None else extra_output(weights, positions).transpose(1, 2).to(output.dtype)
            return output + term, weights

        def chunk_scores(chunk: Tensor, keys: Tensor, chunk_positions: Positions, engine: Engine, _: Any) -> Tensor:
            return scores(chunk, keys, chunk_positions, engine)

        return chunked.by_rows(self, query, key, value, positions, chunk_scores, extra_output), None

    def ranges(
        self, query: Tensor, key: Tensor, value: Tensor, positions: Positions, ranges: Sequence[Range]
    ) -> Output:
        """Compute one softmax over ranges of distance, each with its own encoding of queries and keys."""

        def scores(
            chunk: Tensor, keys: Tensor, chunk_positions: Positions, engine: Engine, bounds: tuple[int, int, int]
        ) -> Tensor:
            merged: Tensor | None = None
            for whole_range in ranges:
                chunk_range = whole_range.slice_pairs(*bounds)
                range_scores = engine.scores(*chunk_range.rotate(chunk, keys))
                if merged is None:
                    merged = torch.full_like(range_scores, torch.finfo(range_scores.dtype).min)
                merged = torch.where(chunk_range.covers(chunk_positions)[:, None], range_scores, merged)
            assert merged is not None
            return merged

        count, total = query.shape[2], key.shape[2]
        if self.backend.dense:
            return self.softmax_and_mix(scores(query, key, positions, self, (0, count, total)), value)
        if self.backend.name == "flex":
            from .kernels import flex

            self._check_flex()
            return flex.ranges(query, key, value, positions, ranges, cast(Any, self.mask), self.scaling), None
        if cpu.is_supported(self, query, value):
            (key, value), positions = chunked.first_pass(self, count, (key, value), positions)
            sliced = [whole_range.slice_pairs(0, count, key.shape[2]) for whole_range in ranges]
            return cpu_ranges.attention(query, key, value, positions, sliced, self.mask, self.scaling), None
        return chunked.by_rows(self, query, key, value, positions, scores), None

    @staticmethod
    def _precise(query: Tensor) -> torch.dtype:
        """Return the dtype to compute in: float64 for float64 queries, otherwise float32."""
        return torch.promote_types(query.dtype, torch.float32)

    def _check_flex(self) -> None:
        """Raise `UnsupportedError` if the layer needs what the FlexAttention backend does not compute."""
        features = {
            "a soft cap": self.extra.get("softcap") is not None,
            "attention sinks": self.extra.get("s_aux") is not None,
            "dropout": bool(self.dropout and self.module.training),
        }
        unsupported = [feature for feature, is_used in features.items() if is_used]
        if unsupported:
            raise UnsupportedError(
                f"backend='flex' does not support {' or '.join(unsupported)}; use backend='sdpa' or 'eager'."
            )

    def _consecutive(
        self, query: Tensor, key: Tensor, value: Tensor, positions: Positions
    ) -> tuple[Tensor, Tensor, Positions] | None:
        """Return key, value and positions for the kernels that index by distance; None if these do not apply.

        The kernels require consecutive positions in every row and a plain causal mask. The check reads tensor values,
        which would break a compiled graph, so they are not used in one.
        """
        if query.shape[2] == 1 or not cpu.is_supported(self, query, value):
            return None
        if self.mask is None:
            (key, value), positions = chunked.first_pass(self, query.shape[2], (key, value), positions)
        applies = cpu.are_consecutive(positions.query, positions.key) and self._has_causal_mask(query, key)
        return (key, value, positions) if applies else None

    def _has_causal_mask(self, query: Tensor, key: Tensor) -> bool:
        """Return whether the mask is the plain causal one, as it is in chunked prefill."""
        if self.mask is None:
            return True
        rows, columns = query.shape[2], key.shape[2]
        if self.mask.dtype != torch.bool or self.mask.shape[-1] != columns:
            return False
        causal = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril(columns - rows)
        return bool((self.mask == causal).all())

    def _fast_bias(self, query: Tensor, key: Tensor, value: Tensor, positions: Positions, bias: Scheme) -> Any:
        """Compute attention with a bias in a CPU kernel, `[batch, query, heads, head]`; None if no kernel applies."""
        bias_block = getattr(bias, "bias_block", None)
        if not (isinstance(bias, DistanceBias) or bias_block):
            return None
        inputs = self._consecutive(query, key, value, positions)
        if inputs is None:
            return None
        key, value, positions = inputs
        if not isinstance(bias, DistanceBias):
            if any(bool((rows != rows[:1]).any()) for rows in (positions.query, positions.key)):
                return None  # the kernel builds one bias for all rows of the batch
            at = (positions.query[0], positions.key[0])
            parameters = tuple(bias.parameters())
            output: Any = Dense.apply(query, key, value, at, bias_block, self.scaling, *parameters)
            return output.transpose(1, 2)
        heads = torch.arange(query.shape[1], device=query.device)
        table = bias.score_bias(torch.arange(key.shape[2], device=query.device), heads[:, None])
        # A bias that ignores the head or the distance has the shape of the other one alone, or is a scalar.
        table = table.to(self._precise(query)).expand(query.shape[1], key.shape[2])
        reach, min_slope = None, bias.min_slope(query.device)
        if min_slope is not None and query.shape[2] == key.shape[2] >= LONG:
            reach = reaches(query, key, self.scaling, min_slope.expand(query.shape[1]))
        return attention_by_distance(query, key, value, table, self.scaling, reach)

    def relative(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        positions: Positions,
        u: Tensor,
        v: Tensor,
        vectors: Callable[[Tensor], Tensor],
    ) -> Output | None:
        """Compute attention with scores `scaling ((q_i + u) k_j + (q_i + v) r)`; return None if no kernel supports it.

        Args:
            query: `[batch, heads, query, head]`.
            key: `[batch, key_heads, key, head]`.
            value: `[batch, key_heads, key, head]`.
            positions: positions of the queries and keys.
            u: `[heads, head]`, float32.
            v: `[heads, head]`, float32.
            vectors: returns r `[heads, distances, head]`, float32, for the distances i - j.

        Source: Dai et al. 2019 (Transformer-XL), arXiv 1901.02860, section 3.3.
        """
        inputs = self._consecutive(query, key, value, positions)
        if inputs is None:
            return None
        key, value, _ = inputs
        u, v, strip = (tensor.to(self._precise(query)) for tensor in (u, v, vectors(distances(key.shape[2]))))
        output: Any = Relative.apply(query, key, value, u, v, strip, self.scaling)
        return output.transpose(1, 2), None

    def one_query(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> tuple[Tensor, Tensor] | None:
        """Compute the attention of one query with a bias on its scaled scores; return None if no kernel supports it.

        Args:
            query: `[batch, heads, 1, head]`.
            key: `[batch, key_heads, key, head]`.
            value: `[batch, key_heads, key, head]`.
            bias: `[batch | 1, heads, 1, key]`, float32 or wider.

        Returns:
            The output `[batch, heads, 1, head]`, and the log-sum-exp of the scores, `[batch, heads, 1]`.
        """
        wide = query.dtype == self._precise(query)
        if query.shape[2] != 1 or torch.is_grad_enabled() or not wide or not cpu.is_supported(self, query, value):
            return None
        if self.mask is not None:
            hidden = self.mask[..., : key.shape[2]]
            bias = bias.masked_fill(~hidden, -math.inf) if hidden.dtype == torch.bool else bias + hidden
        mask = bias.to(query.dtype).expand(query.shape[0], query.shape[1], 1, -1)
        return cpu.attention(query, key, value, mask, self.scaling)

    def blocks(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        positions: Positions,
        size: int,
        change: Callable[[Tensor, Tensor, Positions], tuple[Tensor, Tensor]],
    ) -> Output | None:
        """Compute attention in blocks of `size` queries, each with the queries and keys that `change` returns.

        Args:
            query: `[batch, heads, query, head]`.
            key: `[batch, key_heads, key, head]`.
            value: `[batch, key_heads, key, head]`.
            positions: positions of the queries and keys.
            size: queries in a block.
            change: returns the encoded queries of a block and the encoded keys that they attend to.

        Returns:
            The output, or None if no kernel supports it.
        """
        inputs = self._consecutive(query, key, value, positions)
        if inputs is None:
            return None
        key, value, positions = inputs
        count, total = query.shape[2], key.shape[2]

        def compute(start: int, stop: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            end = total - count + stop
            block_positions = positions._replace(query=positions.query[:, start:stop], key=positions.key[:, :end])
            encoded = change(query[:, :, start:stop], key[:, :, :end], block_positions)
            zero_bias = torch.zeros(query.shape[1], end, dtype=self._precise(query))
            return attention_by_distance(*encoded, value[:, :, :end], zero_bias, self.scaling)

        outputs = []
        for start in range(0, count, size):
            arguments = (start, min(start + size, count), query, key, value)
            if torch.is_grad_enabled() and count > size:  # otherwise autograd keeps a copy of the keys for each block
                outputs.append(chunked.checkpointed(self, compute, *arguments))
            else:
                outputs.append(compute(*arguments))
        return torch.cat(outputs, 1), None

    def clipped(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        positions: Positions,
        on_keys: Tensor,
        on_values: Tensor | None,
    ) -> Output | None:
        """Compute attention with vectors added to keys and values, indexed by the distance clipped at a bound.

        Args:
            query: `[batch, heads, query, head]`.
            key: `[batch, key_heads, key, head]`.
            value: `[batch, key_heads, key, head]`.
            positions: positions of the queries and keys.
            on_keys: `[bound + 1, head]`, float32.
            on_values: `[bound + 1, head]`, float32; None to leave the values unchanged.

        Returns:
            The output, or None if no kernel supports it.

        Source: Shaw et al. 2018, arXiv 1803.02155, section 3.2.
        """
        inputs = self._consecutive(query, key, value, positions)
        if inputs is None:
            return None
        key, value, _ = inputs
        on_keys = on_keys.to(self._precise(query))
        on_values = None if on_values is None else on_values.to(self._precise(query))
        output: Any = Clipped.apply(query, key, value, on_keys, on_values, self.scaling)
        return output.transpose(1, 2), None

    def _with_extra_head_dims(
        self, query: Tensor, key: Tensor, value: Tensor, extra_query: Tensor, extra_key: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Compute attention with extra head dimensions on query and key, whose products are the bias.

        The narrower of key and value is padded, because fast kernels require equal widths.
        """
        width = value.shape[-1]
        if self.backend.name == "flash" and self.extra.get("softcap") is not None:
            raise UnsupportedError(
                "backend='flash' would apply the soft cap to the sum of scores and bias; use backend='sdpa' or 'eager'."
            )
        extra_query = extra_query.expand(query.shape[0], query.shape[1], -1, -1)
        extra_key = extra_key.expand(key.shape[0], key.shape[1], -1, -1)
        # The extra dimensions come first: large terms that cancel must be summed before small ones are added.
        query, key = torch.cat((extra_query, query), -1), torch.cat((extra_key, key), -1)
        missing = query.shape[-1] - width
        value = nn.functional.pad(value, (0, max(0, missing)))
        query, key = (nn.functional.pad(tensor, (0, max(0, -missing))) for tensor in (query, key))
        output, weights = self.native_attention(query, key, value, self.mask)
        return output[..., :width], weights

    def where(self, condition: Tensor, first: Output, second: Output) -> Output:
        """Select `first` or `second` for each query by `condition` `[batch, query, 1, 1]`."""
        weights = None
        if first[1] is not None and second[1] is not None:
            weights = torch.where(condition.transpose(1, 2), first[1], second[1])
        return torch.where(condition, first[0], second[0]), weights

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        """Return scaled scores `[batch, heads, query, key]` in float32 or wider, soft-capped if the family does so."""
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        scores = torch.matmul(query, key.transpose(2, 3))
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * self.scaling
        softcap = self.extra.get("softcap")
        return scores if softcap is None else torch.tanh(scores / softcap) * softcap

    def weights(self, scores: Tensor) -> Tensor:
        """Mask the scores and apply softmax; return weights `[batch, heads, query, key]` in the dtype of the scores."""
        lowest = torch.finfo(scores.dtype).min
        if self.mask is None and self.causal and scores.shape[2] > 1:
            rows, columns = scores.shape[-2:]
            causal = torch.ones(rows, columns, dtype=torch.bool, device=scores.device).tril(columns - rows)
            scores = scores.masked_fill(~causal, lowest)
        elif self.mask is not None:
            mask = self.mask[..., : scores.shape[-1]]
            scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
        sinks = self.extra.get("s_aux")
        if sinks is None:
            return scores.softmax(-1)
        sinks = sinks.to(scores.dtype).reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        return torch.cat((scores, sinks), -1).softmax(-1)[..., :-1]

    def softmax_and_mix(self, scores: Tensor, value: Tensor) -> Output:
        """Mask the scores, apply softmax and dropout, and multiply the weights by the values."""
        weights = self.weights(scores).to(value.dtype)
        weights = nn.functional.dropout(weights, self.dropout, self.module.training)
        value = value.repeat_interleave(weights.shape[1] // value.shape[1], 1)
        return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights

    def native_attention(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Output:
        """Call the attention function of Transformers with `mask` in place of the engine's mask."""
        observe = self.module.__dict__.get("pe_seen")
        if observe is not None:
            observe(query, key)
        function = self.backend.function(self.module)
        if function is None:
            return self.softmax_and_mix(self.scores(query, key), value)
        if self.backend.name == "sdpa" and self.has_sinks:  # Transformers' SDPA function ignores sinks
            masked = replace(self, mask=mask)
            return masked.softmax_and_mix(masked.scores(query, key), value)[0], None
        module: Any = NativeView(self.module, self.backend.native_name) if self.backend.name == "flash" else self.module
        return function(module, query, key, value, mask, scaling=self.scaling, dropout=self.dropout, **self.extra)


def _biased_by_chunks(
    engine: Engine, query: Tensor, key: Tensor, value: Tensor, positions: Positions, bias: Scheme
) -> Output:
    return chunked.biased(engine, query, key, value, positions, bias), None


def _flex(engine: Engine, query: Tensor, key: Tensor, value: Tensor, positions: Positions, bias: Scheme) -> Output:
    """Compute attention with a distance bias as the `score_mod` of FlexAttention."""
    from transformers.integrations.flex_attention import compile_friendly_flex_attention

    score_bias = getattr(bias, "score_bias", None)
    if score_bias is None:
        raise UnsupportedError(
            f"backend='flex' needs a bias that is a function of distance and head, and {bias.name!r} has no such "
            "`score_bias`; use backend='sdpa' or 'eager'."
        )
    engine._check_flex()
    at_query = positions.query.expand(query.shape[0], -1)
    at_key = positions.key.expand(query.shape[0], -1)

    def modify(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score + score_bias(at_query[batch, q] - at_key[batch, k], head)

    output: Any = compile_friendly_flex_attention(
        query, key, value, score_mod=modify, block_mask=engine.mask, enable_gqa=key.shape[1] != query.shape[1],
        scale=engine.scaling, training=engine.module.training,
    )  # fmt: skip
    return output.transpose(1, 2).contiguous(), None


def _no_flash(engine: Engine, query: Tensor, key: Tensor, value: Tensor, positions: Positions, bias: Scheme) -> Output:
    """Raise `UnsupportedError`: the flash kernel takes no bias."""
    raise UnsupportedError(
        f"backend='flash' would drop the bias of {bias.name!r} in {type(engine.module).__name__}; use backend='sdpa', "
        "'flex' or 'eager'."
    )


BIASED: dict[str, Callable[..., Output]] = {"sdpa": _biased_by_chunks, "flex": _flex, "flash": _no_flash}
"""How each backend adds a bias to the scores when no faster form applies."""
