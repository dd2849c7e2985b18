"""Content-relative positions: learned vectors by distance, and distances counted from the text."""

from __future__ import annotations

import math
from dataclasses import field
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..core.checks import check_flag, check_length, check_table
from ..core.head_slices import SHARED
from ..core.positions import Positions
from ..core.scheme import Scheme, at_least_float32, causal_distance, check_causal, check_heads
from ..errors import OptionValueError, quoted
from .registry import register_scheme

if TYPE_CHECKING:
    from ..core.engine import AttentionEngine, Output


class ContentRelative(Scheme):
    """A scheme whose scores depend on the content of the query and the distance together."""

    mechanism = "content-relative"
    own_scores = "rows"


def _pick(table: Tensor, index: Tensor) -> Tensor:
    """Gather entry `index` `[batch | 1, 1, query, key]` of each row of `table` `[batch, heads, query, entries]`."""
    return table.gather(-1, index.expand(*table.shape[:2], -1, -1))


@register_scheme
class Shaw(ContentRelative):
    """A learned vector for each distance, on the key and on the value (Shaw et al. 2018, arXiv 1803.02155).

    Scores are q_i (k_j + A^K[c]) / sqrt(d) and outputs sum_j w_ij (v_j + A^V[c]), c = clip(j - i, -K, K). Tables
    A^K `[2 K + 1, head]` and A^V `[2 K + 1, value]`, shared by the heads, zeros at the start.
    """

    name = "shaw"
    summary = "a learned vector on keys and values for each distance up to a bound"
    paper = "Shaw et al. 2018, arXiv 1803.02155"
    head_sharded_attributes = SHARED
    per_layer = True

    max_distance: int = 16
    """K in tokens, beyond which all distances share one vector."""
    values: bool = field(default_factory=lambda: True)  # no class attribute, which would hide the parameter
    """Add vectors to values too; without them it is the paper's smaller model."""

    def setup(self) -> None:
        super().setup()
        shape, with_values = self.shape, check_flag("shaw", "values", self.values)
        farthest = check_length("shaw", "max_distance", self.max_distance)
        if farthest is None:
            raise OptionValueError(
                "'shaw' got max_distance=None; max_distance must be a number of tokens. Example: max_distance=16."
            )
        self.max_distance = check_table("shaw", "max_distance", farthest, 2 * (shape.head_dim + shape.value_dim))
        entries = 2 * self.max_distance + 1
        self.keys = nn.Parameter(torch.zeros(entries, shape.head_dim))
        table = nn.Parameter(torch.zeros(entries, shape.value_dim)) if with_values else None
        cast(Any, self).values = table

    def relative_position(self, length: int) -> Tensor:
        return causal_distance(length)

    def vectors(self, count: int, layer: int | None = None) -> Tensor:
        """Return the vectors on keys 0 to count - 1 tokens back, `[1, count, head]`."""
        return self._behind(self.keys, count)

    def value_vectors(self, count: int) -> Tensor | None:
        """Return the vectors on values 0 to count - 1 tokens back, `[1, count, head]`; None without them."""
        table = self._value_table
        return None if table is None else self._behind(table, count)

    @property
    def _value_table(self) -> Tensor | None:
        """Return the parameter `values`, whose name in checkpoints is that of the option."""
        return cast(Any, self).values

    def _behind(self, table: Tensor, count: int) -> Tensor:
        back = torch.arange(count, device=table.device).clamp(max=self.max_distance)
        return at_least_float32(table)[None, self.max_distance - back]

    def _entries(self, positions: Positions) -> Tensor:
        """Return the table index of each pair, `[batch | 1, 1, query, key]`."""
        return (self.max_distance - positions.distance.clamp(-self.max_distance, self.max_distance))[:, None]

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, positions: Positions, engine: AttentionEngine
    ) -> Output:
        values, reach = self._value_table, self.max_distance + 1
        on_values = self.value_vectors(reach)
        fast = engine.clipped(
            query, key, value, positions, self.vectors(reach)[0], None if on_values is None else on_values[0]
        )
        if fast is None:
            fast = self._decode(query, key, value, positions, engine)
        if fast is not None:
            return fast

        def scores(query: Tensor, key: Tensor, chunk_positions: Positions, chunk_engine: AttentionEngine) -> Tensor:
            by_distance = (at_least_float32(query) @ at_least_float32(self.keys).T) * chunk_engine.scaling
            return chunk_engine.scores(query, key) + _pick(by_distance, self._entries(chunk_positions))

        def extra_output(weights: Tensor, chunk_positions: Positions) -> Tensor:
            assert values is not None
            weights, entries = at_least_float32(weights), self._entries(chunk_positions)
            sums = weights.new_zeros(*weights.shape[:3], values.shape[0])
            return sums.scatter_add(-1, entries.expand_as(weights), weights) @ at_least_float32(values)

        return engine.rows(query, key, value, positions, scores, None if values is None else extra_output)

    def _decode(
        self, query: Tensor, key: Tensor, value: Tensor, positions: Positions, engine: AttentionEngine
    ) -> Output | None:
        """Compute the attention of one query; return None if no kernel supports it.

        The weights of near keys follow from the log-sum-exp. All farther keys share one vector on the values, whose
        weight is what remains.
        """
        if query.shape[2] != 1 or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        distance = positions.distance
        near = int((distance < self.max_distance).sum(-1).max())
        if bool((distance[..., : distance.shape[-1] - near] < self.max_distance).any()) or bool((distance < 0).any()):
            return None  # the near keys are not the last ones
        by_distance = (query @ self.keys.T.to(query.dtype)) * engine.scaling
        of_near = _pick(by_distance, self._entries(positions._replace(key=positions.key[:, key.shape[2] - near :])))
        far = by_distance[..., :1].expand(-1, -1, -1, key.shape[2] - near)  # entry 0: `max_distance` or more back
        bias = torch.cat((far, of_near), -1)
        found = engine.one_query(query, key, value, bias)
        if found is None or self._value_table is None:
            return None if found is None else (found[0].transpose(1, 2), None)
        output, lse = found
        last = engine.allowed(query, key)[..., key.shape[2] - near :]
        scores = (engine.scores(query, key[:, :, key.shape[2] - near :]) + of_near).masked_fill(~last, -math.inf)
        if engine.mask is not None and engine.mask.is_floating_point():
            scores = scores + engine.mask[..., key.shape[2] - near : key.shape[2]]
        weights = (scores - lse[..., None]).exp()
        table = self._value_table.to(weights.dtype)
        entries = self._entries(positions._replace(key=positions.key[:, key.shape[2] - near :]))
        sums = weights.new_zeros(*weights.shape[:3], table.shape[0]).scatter_add(
            -1, entries.expand_as(weights), weights
        )
        rest = (1 - weights.sum(-1, keepdim=True)) * table[0]
        return (output + sums @ table + rest).transpose(1, 2), None


@register_scheme
class TransformerXL(ContentRelative):
    """Relative sinusoids through a projection (Dai et al. 2019, arXiv 1901.02860, section 3.3).

    Scores are ((q_i + u) k_j + (q_i + v) W_R R_{i-j}) / sqrt(d) with u and v `[heads, head]` shared by all layers, a
    projection W_R `[heads * head, hidden]` for each, and R_n = [sin(n w), cos(n w)] of the model's width. One module
    for the model; all of it is zeros at the start. The KV cache holds earlier segments.
    """

    name = "transformer_xl"
    summary = "projected sinusoids of the distance meet the query, with learned biases beside it"
    paper = "Dai et al. 2019, arXiv 1901.02860"
    head_sharded_attributes = MappingProxyType({"u": 0, "v": 0, "projection": 1})

    clamp_length: int | None = None
    """Distance in tokens to which farther ones are cut; None for no cut."""

    def setup(self) -> None:
        super().setup()
        shape = self.shape
        if shape.hidden_size % 2:
            raise OptionValueError(f"'transformer_xl' pairs dimensions; hidden_size={shape.hidden_size} is odd.")
        self.clamp_length = check_length("transformer_xl", "clamp_length", self.clamp_length)
        heads = shape.num_heads
        self.u = nn.Parameter(torch.zeros(heads, shape.head_dim))
        self.v = nn.Parameter(torch.zeros(heads, shape.head_dim))
        self.projection = nn.Parameter(torch.zeros(shape.num_layers, heads * shape.head_dim, shape.hidden_size))

    def relative_position(self, length: int) -> Tensor:
        return causal_distance(length)

    def frequencies(self, device: torch.device) -> Tensor:
        """Return w, `[hidden / 2]`, float32."""

        def make() -> Tensor:
            exponent = torch.arange(0, self.shape.hidden_size, 2, dtype=torch.float64, device="cpu")
            return (10000.0 ** -(exponent / self.shape.hidden_size)).float()

        return self.constant("frequencies", device, make)

    def sinusoids(self, count: int, device: torch.device) -> Tensor:
        """Return R for the distances 0 .. count - 1, `[count, hidden]`, float32."""
        distance = torch.arange(count, device=device)
        if self.clamp_length is not None:
            distance = distance.clamp(max=self.clamp_length)
        angles = distance[:, None].float() * self.frequencies(device)
        return torch.cat((angles.sin(), angles.cos()), -1)

    def prepare(self, positions: Positions) -> tuple[Tensor, ...]:
        if torch.compiler.is_compiling():  # where no position can be read
            entries = 0 if self.clamp_length is None else self.clamp_length + 1
            return (self.sinusoids(entries, positions.query.device),)
        count = int((positions.query.max() - positions.key.min()).clamp(min=0)) + 1
        if self.clamp_length is not None:
            count = min(count, self.clamp_length + 1)
        if positions.encoded is not None:
            make = partial(self.sinusoids, device=positions.query.device)
            return (positions.encoded.table(("sinusoids", positions.query.device), count, make),)
        return (self.sinusoids(count, positions.query.device),)

    @property
    def remembers(self) -> bool:
        return True

    def vectors(self, count: int, layer: int) -> Tensor:
        """Return W_R R for the distances 0 .. count - 1, `[heads, count, head]`."""
        return self._projected(self.sinusoids(count, self.projection.device), layer)

    def _by_head(self, layer: int) -> Tensor:
        """Return W_R of each head, `[heads, head, hidden]`."""
        return at_least_float32(self.projection[layer]).view(self.shape.num_heads, self.shape.head_dim, -1)

    def _projected(self, sinusoids: Tensor, layer: int) -> Tensor:
        return sinusoids.to(self._by_head(layer).dtype) @ self._by_head(layer).transpose(1, 2)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, positions: Positions, engine: AttentionEngine
    ) -> Output:
        check_heads(self, query)
        check_causal(self, engine)
        (sinusoids,) = positions.prepared or self.prepare(positions)

        if not sinusoids.shape[0]:
            return self._attend_by_products(query, key, value, positions, engine)

        def by_distance(distance: Tensor) -> Tensor:
            return self._projected(sinusoids, engine.layer)[:, distance.clamp(max=sinusoids.shape[0] - 1)]

        fast = engine.relative(
            query, key, value, positions, at_least_float32(self.u), at_least_float32(self.v), by_distance
        )
        if fast is None:
            fast = self._decode(query, key, value, positions, engine, sinusoids)
        if fast is not None:
            return fast
        # W_R R serves all queries; for a few of them W_R is better applied to the query than to every distance.
        few = query.shape[2] <= self.shape.head_dim
        vectors = None if few else self._projected(sinusoids, engine.layer)

        def scores(query: Tensor, key: Tensor, chunk_positions: Positions, chunk_engine: AttentionEngine) -> Tensor:
            biased = at_least_float32(query) + at_least_float32(self.v)[:, None]
            if vectors is None:
                by_distance = (biased @ self._by_head(engine.layer)) @ sinusoids.to(biased.dtype).T
            else:
                by_distance = biased @ vectors.transpose(1, 2)
            distance = chunk_positions.distance.clamp(0, sinusoids.shape[0] - 1)[:, None]
            of_key = self._key_bias(key) + _pick(by_distance, distance)
            return chunk_engine.scores(query, key) + of_key * chunk_engine.scaling

        return engine.rows(query, key, value, positions, scores)

    def _decode(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        positions: Positions,
        engine: AttentionEngine,
        sinusoids: Tensor,
    ) -> Output | None:
        """Compute the attention of one query; return None if no kernel supports it.

        u joins the query, and the term by distance is one row of biases.
        """
        if query.shape[2] != 1 or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        u, v = (vector.to(query.dtype)[:, None] for vector in (self.u, self.v))
        projected = (query + v) @ self._by_head(engine.layer).to(query.dtype)
        by_distance = (projected @ sinusoids.to(query.dtype).T) * engine.scaling
        distance = positions.distance.clamp(0, sinusoids.shape[0] - 1)[:, None]
        found = engine.one_query(query + u, key, value, _pick(by_distance, distance))
        return None if found is None else (found[0].transpose(1, 2), None)

    def _attend_by_products(
        self, query: Tensor, key: Tensor, value: Tensor, positions: Positions, engine: AttentionEngine
    ) -> Any:
        """Compute scores without a table by distance: rotate the query side by i, multiply by sin and cos of j."""
        origin, frequencies = positions.query[:, -1:], self.frequencies(query.device)

        def angles(at: Tensor) -> tuple[Tensor, Tensor]:
            rotated = (at - origin)[:, None, :, None].float() * frequencies
            return rotated.sin(), rotated.cos()

        def scores(query: Tensor, key: Tensor, chunk_positions: Positions, chunk_engine: AttentionEngine) -> Tensor:
            with_sin, with_cos = (
                (at_least_float32(query) + at_least_float32(self.v)[:, None]) @ self._by_head(engine.layer)
            ).chunk(2, -1)
            sin, cos = angles(chunk_positions.query)
            rotated = torch.cat((with_cos * sin - with_sin * cos, with_sin * sin + with_cos * cos), -1)
            waves = torch.cat(angles(chunk_positions.key), -1).to(rotated.dtype)
            of_key = self._key_bias(key) + rotated @ waves.transpose(2, 3)
            return chunk_engine.scores(query, key) + of_key * chunk_engine.scaling

        return engine.rows(query, key, value, positions, scores)

    def _key_bias(self, key: Tensor) -> Tensor:
        """Return u k, `[batch, heads, 1, key]`, which is the same for every query."""
        by_group = at_least_float32(self.u).view(key.shape[1], -1, key.shape[-1])
        return (by_group @ at_least_float32(key).transpose(2, 3)).flatten(1, 2)[:, :, None]


@register_scheme
class CoPE(ContentRelative):
    """Positions counted from the text (Golovneva et al. 2024, arXiv 2405.18719), not the clipped RoPE of the same name.

    Each key counts by a gate sigmoid(q_i k_j / sqrt(d)); the position of j is the sum of the gates from j to i, at most
    `max_positions` - 1, and the score gains q_i E[position] / sqrt(d), interpolated between whole positions. E
    `[head, max_positions]` is shared by the heads, zeros at the start. Position ids play no part.
    """

    name = "cope"
    summary = "distances counted in tokens that the query takes to matter, each with a learned vector"
    paper = "Golovneva et al. 2024, arXiv 2405.18719"
    head_sharded_attributes = SHARED
    per_layer = True

    max_positions: int = 64
    """Entries of E."""

    def setup(self) -> None:
        super().setup()
        shape, max_positions = self.shape, self.max_positions
        entries = check_length("cope", "max_positions", max_positions)
        if entries is None or entries < 2:
            raise OptionValueError(
                f"'cope' got max_positions={quoted(max_positions)}; give a whole number of at least 2."
            )
        self.max_positions = check_table("cope", "max_positions", entries, shape.head_dim)
        self.table = nn.Parameter(torch.zeros(shape.head_dim, entries))

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, positions: Positions, engine: AttentionEngine
    ) -> Output:
        check_causal(self, engine)

        def scores(query: Tensor, key: Tensor, chunk_positions: Positions, chunk_engine: AttentionEngine) -> Tensor:
            raw_scores = chunk_engine.scores(query, key)
            gates = raw_scores.sigmoid().masked_fill(~chunk_engine.allowed(query, key), 0)
            # From the query backwards: far sums are cut off anyway, near ones keep their digits.
            counted_position = gates.flip(-1).cumsum(-1).flip(-1).clamp(max=self.max_positions - 1)
            by_position = (at_least_float32(query) @ at_least_float32(self.table)) * chunk_engine.scaling
            whole = counted_position.detach().long()
            step = nn.functional.pad(by_position.diff(dim=-1), (0, 1))
            return raw_scores + by_position.gather(-1, whole) + (counted_position - whole) * step.gather(-1, whole)

        return engine.rows(query, key, value, positions, scores)
