"""What a scheme may ask for once queries, keys and values are projected."""

from __future__ import annotations

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
from .backends import Backend, HostView, Output
from .kernels import chunked, cpu
from .kernels import ranges as cpu_ranges
from .kernels.band import LONG, attention_by_distance, reaches
from .kernels.clipped import Clipped
from .kernels.cpu import HIDDEN
from .kernels.dense import Dense
from .kernels.relative import Relative, distances


@dataclass
class Engine(AttentionEngine):
    """What a scheme may ask for once queries, keys and values are projected. It never sees Transformers."""

    module: nn.Module
    mask: Tensor | None
    scaling: float
    dropout: float
    backend: Backend
    extra: dict[str, Any]
    heads: Heads | None = None
    """Which heads of the model these are; None for all of them."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, positions: Positions, bias: Scheme | None = None
    ) -> Output:
        """Attention of query `[batch, heads, query, head]` over key and value `[batch, key_heads, key, head]`.

        `bias` is the scheme whose `bias` (or pointwise `of`) is added to the scaled scores.
        """
        if bias is None:
            return self.host(query, key, value, self.mask)
        if self.backend.dense:
            additive = self.additive(bias, query, key, positions)
            return self.mix(self.scores(query, key) + additive, value)
        fast = self._fast_bias(query, key, value, positions, bias)
        if fast is not None:
            return fast, None
        # One query's row of a bias is small; otherwise a bias is better carried than built.
        row = query.shape[2] == 1 and query.device.type == "cpu" and self.backend.name == "sdpa"
        exact = query.device.type != "mps"  # which has no float64, and limbs are cut in that
        if isinstance(bias, DistanceBias) and self.backend.widens and exact and not row and not self.has_sinks:
            features = bias.features(positions, self.scaling, query.dtype)
            if features is not None:
                return self._widened(query, key, value, *features)
        return BIASED[self.backend.name](self, query, key, value, positions, bias)

    @property
    def has_sinks(self) -> bool:
        """Whether the family has a learned sink for each head (gpt-oss)."""
        return self.extra.get("s_aux") is not None

    def additive(self, bias: Scheme, query: Tensor, key: Tensor, positions: Positions) -> Tensor:
        """Return what a bias adds to the scaled scores, broadcastable to `[batch, heads, query, key]`.

        A learned sink competes with the scores, so there the bias must not be off by a constant for each query, which
        a softmax over keys alone does not see (ALiBi by the key's position).
        """
        query = query * self.scaling
        if isinstance(bias, DistanceBias) and self.has_sinks:
            made = DistanceBias.bias(bias, query, key, positions)
        else:
            made = bias.bias(query, key, positions)
        assert made is not None
        return made

    @property
    def causal(self) -> bool:
        """Whether a query sees no key ahead of it where no mask says so."""
        given = self.extra.get("is_causal")
        return getattr(self.module, "is_causal", True) if given is None else given

    def after_rotation(self, x: Tensor) -> Tensor:
        """Normalise queries or keys that were rotated at the scores, where the family does so after its rotation."""
        norm = self.module.__dict__.get("pe_norm_after_rotation")
        return x if norm is None else norm(x)

    @property
    def layer(self) -> int:
        """Which of the model's layers this is, from 0."""
        return self.module.__dict__["pe_layer"]

    def part(self, start: int, stop: int, end: int) -> Engine:
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
        return mask if mask.dtype == torch.bool else mask > HIDDEN

    def rows(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        positions: Positions,
        scores: Callable[[Tensor, Tensor, Positions, Engine], Tensor],
        also: Callable[[Tensor, Positions], Tensor] | None = None,
    ) -> Output:
        """Attention by scores of one's own, for what needs to see whole rows of them.

        `scores(query, key, positions, engine)` gives `[batch, heads, query, key]`, float32, for some of the queries and
        all the keys that they may see (`engine.scores` and `engine.allowed` help); `also(weights, positions)` gives
        what is added to the output, `[batch, heads, query, head]`.
        """

        if self.backend.dense:
            output, weights = self.mix(scores(query, key, positions, self), value)
            assert weights is not None
            more = 0 if also is None else also(weights, positions).transpose(1, 2).to(output.dtype)
            return output + more, weights

        def made(chunk: Tensor, keys: Tensor, seen: Positions, part: Engine, _: Any) -> Tensor:
            return scores(chunk, keys, seen, part)

        return chunked.by_rows(self, query, key, value, positions, made, also), None

    def ranges(
        self, query: Tensor, key: Tensor, value: Tensor, positions: Positions, ranges: Sequence[Range]
    ) -> Output:
        """Attention in which pairs of a query and a key differ in their encoding: one softmax over all ranges."""

        def scores(chunk: Tensor, keys: Tensor, seen: Positions, part: Engine, place: tuple[int, int, int]) -> Tensor:
            total: Tensor | None = None
            for whole in ranges:
                one = whole.part(*place)
                own = part.scores(*one.turned(chunk, keys))
                rest = torch.full_like(own, torch.finfo(own.dtype).min) if total is None else total
                total = torch.where(one.covers(seen)[:, None], own, rest)
            assert total is not None
            return total

        count, total = query.shape[2], key.shape[2]
        if self.backend.dense:
            return self.mix(scores(query, key, positions, self, (0, count, total)), value)
        if self.backend.name == "flex":
            from .kernels import flex

            self._check_flex()
            return flex.ranges(query, key, value, positions, ranges, cast(Any, self.mask), self.scaling), None
        if cpu.suits(self, query, value):
            (key, value), positions = chunked.first_pass(self, count, (key, value), positions)
            cut = [one.part(0, count, key.shape[2]) for one in ranges]
            return cpu_ranges.attention(query, key, value, positions, cut, self.mask, self.scaling), None
        return chunked.by_rows(self, query, key, value, positions, scores), None

    @staticmethod
    def _precise(query: Tensor) -> torch.dtype:
        """Float32, or float64 where the queries are that."""
        return torch.promote_types(query.dtype, torch.float32)

    def _check_flex(self) -> None:
        dropout = self.dropout and self.module.training
        if self.extra.get("softcap") is not None or self.extra.get("s_aux") is not None or dropout:
            raise UnsupportedError("FlexAttention here takes no soft cap, sinks or dropout; use 'sdpa' or 'eager'.")

    def _consecutive(
        self, query: Tensor, key: Tensor, value: Tensor, positions: Positions
    ) -> tuple[Tensor, Tensor, Positions] | None:
        """Key, value and positions for the kernels that go by distance along the sequence; None where they do not do.

        They need every token to stand right behind the one before, and to see all of those. Reading that would break a
        compiled graph.
        """
        if query.shape[2] == 1 or not cpu.suits(self, query, value):
            return None
        if self.mask is None:
            (key, value), positions = chunked.first_pass(self, query.shape[2], (key, value), positions)
        steady = cpu.consecutive(positions.query, positions.key)
        return (key, value, positions) if steady and self._sees_all_behind(query, key) else None

    def _sees_all_behind(self, query: Tensor, key: Tensor) -> bool:
        """Whether the mask is the plain causal one, as it is for a prompt that is read in several passes."""
        if self.mask is None:
            return True
        rows, columns = query.shape[2], key.shape[2]
        if self.mask.dtype != torch.bool or self.mask.shape[-1] != columns:
            return False
        causal = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril(columns - rows)
        return bool((self.mask == causal).all())

    def _fast_bias(self, query: Tensor, key: Tensor, value: Tensor, positions: Positions, bias: Scheme) -> Any:
        """Attention with a bias in the form that its structure allows, `[batch, query, heads, head]`, or None."""
        build = getattr(bias, "tile", None)
        if (
            not (isinstance(bias, DistanceBias) or build)
            or (fit := self._consecutive(query, key, value, positions)) is None
        ):
            return None
        key, value, positions = fit
        if not isinstance(bias, DistanceBias):
            if any(bool((one != one[:1]).any()) for one in (positions.query, positions.key)):
                return None  # built once, for rows that stand at the same places
            at = (positions.query[0], positions.key[0])
            parameters = tuple(bias.parameters())
            return Dense.apply(query, key, value, at, build, self.scaling, *parameters).transpose(1, 2)  # pyright: ignore
        heads = torch.arange(query.shape[1], device=query.device)
        table = bias.of(torch.arange(key.shape[2], device=query.device), heads[:, None])
        table = table.to(self._precise(query))
        reach, fall = None, bias.fall(query.device)
        if fall is not None and query.shape[2] == key.shape[2] >= LONG:
            reach = reaches(query, key, self.scaling, fall)
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
        """Attention with the scores `scaling ((q_i + u) k_j + (q_i + v) r)`; None where no kernel serves.

        u and v are `[heads, head]`, `vectors(distance)` gives r for i - j, `[heads, distances, head]`, all float32.
        """
        fit = self._consecutive(query, key, value, positions)
        if fit is None:
            return None
        u, v, strip = (one.to(self._precise(query)) for one in (u, v, vectors(distances(fit[0].shape[2]))))
        output: Any = Relative.apply(query, fit[0], fit[1], u, v, strip, self.scaling)
        return output.transpose(1, 2), None

    def blocks(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        positions: Positions,
        size: int,
        change: Callable[[Tensor, Tensor, Positions], tuple[Tensor, Tensor]],
    ) -> Output | None:
        """Attention in which every `size` queries see queries and keys as `change` makes them; None where no kernel
        serves."""
        fit = self._consecutive(query, key, value, positions)
        if fit is None:
            return None
        key, value, positions = fit
        count, total = query.shape[2], key.shape[2]

        def compute(start: int, stop: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            end = total - count + stop
            seen = positions._replace(query=positions.query[:, start:stop], key=positions.key[:, :end])
            changed = change(query[:, :, start:stop], key[:, :, :end], seen)
            nothing = torch.zeros(query.shape[1], end, dtype=self._precise(query))
            return attention_by_distance(*changed, value[:, :, :end], nothing, self.scaling)

        outputs = []
        for start in range(0, count, size):
            arguments = (start, min(start + size, count), query, key, value)
            again = torch.is_grad_enabled() and count > size  # else every block keeps keys of its own
            outputs.append(chunked.again(self, compute, *arguments) if again else compute(*arguments))
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
        """Attention with vectors `[bound + 1, head]`, float32, on keys and values, by a distance that stops at the
        bound; None where no kernel serves."""
        fit = self._consecutive(query, key, value, positions)
        if fit is None:
            return None
        on_keys = on_keys.to(self._precise(query))
        on_values = None if on_values is None else on_values.to(self._precise(query))
        output: Any = Clipped.apply(query, fit[0], fit[1], on_keys, on_values, self.scaling)
        return output.transpose(1, 2), None

    def _widened(
        self, query: Tensor, key: Tensor, value: Tensor, more_query: Tensor, more_key: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Attention with extra dimensions on query and key.

        The narrower of key and value is padded, since unequal heads leave fast kernels.
        """
        width = value.shape[-1]
        if self.backend.name == "flash" and self.extra.get("softcap") is not None:
            raise UnsupportedError("Flash attention would cap scores and bias together; use backend='sdpa' or 'eager'.")
        more_query = more_query.expand(query.shape[0], query.shape[1], -1, -1)
        more_key = more_key.expand(key.shape[0], key.shape[1], -1, -1)
        # Before the head's own dimensions: large terms that cancel must meet before anything small is added to them.
        query, key = torch.cat((more_query, query), -1), torch.cat((more_key, key), -1)
        missing = query.shape[-1] - width
        value = nn.functional.pad(value, (0, max(0, missing)))
        query, key = (nn.functional.pad(one, (0, max(0, -missing))) for one in (query, key))
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

    def weights(self, scores: Tensor) -> Tensor:
        """Scores masked and normalised, `[batch, heads, query, key]`, in their own dtype."""
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

    def mix(self, scores: Tensor, value: Tensor) -> Output:
        """Mask and normalise scores, and mix the values by them."""
        weights = self.weights(scores).to(value.dtype)
        weights = nn.functional.dropout(weights, self.dropout, self.module.training)
        value = value.repeat_interleave(weights.shape[1] // value.shape[1], 1)
        return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights

    def host(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Output:
        seen = self.module.__dict__.get("pe_seen")
        if seen is not None:
            seen(query, key)
        function = self.backend.function(self.module)
        if function is None:
            return self.mix(self.scores(query, key), value)
        if self.backend.name == "sdpa" and self.has_sinks:  # which Transformers' function for SDPA leaves out
            own = replace(self, mask=mask)
            return own.mix(own.scores(query, key), value)[0], None
        module: Any = HostView(self.module, self.backend.host) if self.backend.name == "flash" else self.module
        return function(module, query, key, value, mask, scaling=self.scaling, dropout=self.dropout, **self.extra)


def _biased_by_chunks(
    engine: Engine, query: Tensor, key: Tensor, value: Tensor, positions: Positions, bias: Scheme
) -> Output:
    return chunked.biased(engine, query, key, value, positions, bias), None


def _flex(engine: Engine, query: Tensor, key: Tensor, value: Tensor, positions: Positions, bias: Scheme) -> Output:
    """A distance bias as FlexAttention's score modification."""
    from transformers.integrations.flex_attention import compile_friendly_flex_attention

    of = getattr(bias, "of", None)
    if of is None:
        raise UnsupportedError(f"{bias.name!r} has no pointwise form for FlexAttention; use backend='sdpa' or 'eager'.")
    engine._check_flex()
    at_query = positions.query.expand(query.shape[0], -1)
    at_key = positions.key.expand(query.shape[0], -1)

    def modify(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score + of(at_query[batch, q] - at_key[batch, k], head)

    output: Any = compile_friendly_flex_attention(
        query, key, value, score_mod=modify, block_mask=engine.mask, enable_gqa=key.shape[1] != query.shape[1],
        scale=engine.scaling, training=engine.module.training,
    )  # fmt: skip
    return output.transpose(1, 2).contiguous(), None


def _no_flash(engine: Engine, query: Tensor, key: Tensor, value: Tensor, positions: Positions, bias: Scheme) -> Output:
    raise UnsupportedError(
        f"Flash attention would drop the bias of {bias.name!r} in {type(engine.module).__name__}; use backend='sdpa', "
        "'flex' or 'eager'."
    )


BIASED: dict[str, Callable[..., Output]] = {"sdpa": _biased_by_chunks, "flex": _flex, "flash": _no_flash}
