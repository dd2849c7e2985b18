"""Conversion of a model's trained projections to the modules of a scheme. The model itself is not modified."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .. import compat
from ..adapters import Adapter
from ..core.projections import Latents, Projections, Statistics
from ..core.scheme import overrides
from ..errors import OptionError, UnsupportedError
from .calibration import held_out
from .calibration_text import tokens
from .protocol import ProjectionScheme
from .streaming import batches, evaluating, stream

logger = logging.getLogger("pe_patch")

SCALE = "attention_scaling"
"""The attribute of Transformers' rotary modules with the factor on cos and sin."""
ROUNDING = 1e-5
"""Relative tolerance of the loss bound, for rounding in float32."""
TOKENS_PER_NUMBER = 32
"""Calibration tokens for each number that the original model caches for a token and layer."""
LENGTH, LIMIT, SHARE = 512, 65536, 0.25
"""Tokens in a row of calibration, tokens in all, and the share of rows held out to measure the loss."""


@dataclass
class Conversion:
    """The modules of the converted layers, or the latents to build them from once their rank is known."""

    modules: dict[int, nn.Module]
    """The new module of each layer; empty if the rank is still unknown."""
    rows: list[Tensor] = field(default_factory=list)
    """Calibration rows that no layer has seen, to measure the loss on."""
    latents: dict[int, tuple[Projections, Latents, Statistics | None]] = field(default_factory=dict)
    """Weights, latents at full rank and statistics of each layer, if the rank is still unknown."""

    def at(self, scheme_by_layer: dict[int, Any], rank: int) -> dict[int, nn.Module]:
        """Build the modules at a rank, and set the rank of the schemes."""
        modules = {}
        for index, (projections, latents, statistics) in self.latents.items():
            scheme = scheme_by_layer[index]
            scheme.rank = rank
            modules[index] = scheme.converted_module(projections, scheme.truncated(latents, rank, statistics))
        return modules


def convert_model(model: PreTrainedModel, base: Any, adapter: Adapter, scheme_by_layer: dict[int, Any]) -> Conversion:
    """Build the modules that replace the projections of the chosen layers.

    Args:
        model: the whole model.
        base: the base model inside it.
        adapter: the adapter of the family.
        scheme_by_layer: the scheme of each layer to convert.

    Raises:
        OptionError: the options do not fit the model, or calibration tokens are missing.
        UnsupportedError: the projections of this family cannot be converted.
    """
    first = next(iter(scheme_by_layer.values()))
    if adapter.rotary is None:
        raise UnsupportedError(
            f"{first.name!r} converts attention that rotates queries and keys (RoPE), and this family does not."
        )
    attentions = adapter.attentions(base)
    if len(attentions) < len(adapter.blocks(base)):
        raise UnsupportedError(
            f"{first.name!r} converts models whose layers all attend; {len(attentions)} of {len(adapter.blocks(base))} "
            f"layers of {base.config.model_type} do. Choose another scheme."
        )
    if adapter.projections is None:
        raise UnsupportedError(
            f"{first.name!r} replaces query, key and value projections, and it is unknown how {base.config.model_type} "
            "projects: give its adapter `projections=` (pe_patch.adapters.projections)."
        )
    empty = all(p.is_meta for p in model.parameters()) and not any(compat.execution_hook(m) for m in model.modules())
    scale = 1.0 if overrides(first, "angles") else float(getattr(adapter.rotary_module(base), SCALE, 1.0))
    projections = {
        index: replace(
            adapter.projections.read(attentions[index], adapter.shape(base, base.config, index), empty),
            rotation_scale=scale,
        )
        for index in scheme_by_layer
    }
    for index, scheme in scheme_by_layer.items():
        scheme.check(projections[index])
    if empty:  # a model on the meta device, patched to inspect the swaps
        for scheme in scheme_by_layer.values():
            scheme.restored = True
    if first.calibration is not None and not first.needs_calibration:
        logger.warning("%r ignores calibration= with these options; leave it out.", first.name)
    if first.restored or not first.needs_calibration:
        modules = {index: _replace(scheme, projections[index], None) for index, scheme in scheme_by_layer.items()}
        if first.random_init:
            for module in modules.values():
                module.apply(compat.weight_initializer(model))
        return Conversion(modules)
    if first.calibration is None:
        raise OptionError(
            f"{first.name!r} with these options needs calibration: give calibration=<token ids or texts>, about ten "
            "thousand tokens of the kind of text that the model is for."
        )
    rows, held_out_rows = tokens(first.calibration, model, length=LENGTH, limit=LIMIT, seed=first.seed), []
    if first.loss_bound is not None:
        rows, held_out_rows = held_out([row for row in rows if len(row) > 1], SHARE, first.seed)
    count, projection = sum(map(len, rows)), next(iter(projections.values()))
    if warning := few_tokens(count, len(projection.key) + len(projection.value)):
        logger.warning(warning)
    if count < first.rank:
        logger.warning(
            "%d calibration tokens are fewer than the rank of %d, so the remaining directions are arbitrary; give more "
            "text.",
            count, first.rank,
        )  # fmt: skip
    conversion = Conversion({}, held_out_rows)
    statistics: dict[int, Any] = {}

    def each(index: int, hidden: Tensor) -> None:
        if index in scheme_by_layer:
            statistics[index] = scheme_by_layer[index].collect_statistics(
                projections[index], hidden, statistics.get(index)
            )

    def done(index: int) -> None:
        if index not in scheme_by_layer:
            return
        layer_statistics, scheme = statistics.pop(index), scheme_by_layer[index]
        if scheme.loss_bound is None:
            conversion.modules[index] = _replace(scheme, projections[index], layer_statistics)
        else:
            latents = scheme.convert(projections[index], layer_statistics)
            kept_statistics = layer_statistics if scheme.latent_norm else None
            conversion.latents[index] = (projections[index], latents, kept_statistics)

    stream(base, list(adapter.blocks(base)), list(attentions.values()), rows, each, done=done)
    return conversion


def few_tokens(count: int, cached_numbers: int) -> str:
    """Return a warning if a conversion has too few calibration tokens, else an empty string.

    Args:
        count: number of calibration tokens.
        cached_numbers: numbers that the original model caches for a token and layer.
    """
    needed = tokens_needed(cached_numbers)
    if count >= needed:
        return ""
    return (
        f"{count:,} calibration tokens are few: give at least {needed:,} of the kind of text that the model is for. "
        "With too few, loss and answers get worse, and short training may not repair them (docs/mla.md)."
    )


def tokens_needed(cached_numbers: int) -> int:
    """Return the number of calibration tokens from which more of them help little, at most `LIMIT`.

    docs/mla.md has the loss by the number of tokens.
    """
    return min(TOKENS_PER_NUMBER * cached_numbers, LIMIT)


def _replace(scheme: ProjectionScheme, projections: Projections, statistics: Any) -> nn.Module:
    """Return the module with which a scheme replaces the projections of one layer."""
    module = scheme.replace(projections, statistics)
    assert module is not None
    return module


@torch.no_grad()
def loss(model: Any, rows: list[Tensor]) -> float:
    """Return the mean next-token loss over rows of token ids, in nats."""
    if model.get_output_embeddings() is None:
        raise OptionError(f"max_loss needs a model that predicts tokens, and {type(model).__name__} has no such head.")
    total, count = 0.0, 0
    with evaluating(model):
        for ids in batches(rows, 2048):
            ids = ids.to(model.device)
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            total += float(nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
            count += ids[:, 1:].numel()
    return total / count


def smallest_rank(most: int, bound: float, loss_at: Callable[[int], float]) -> int:
    """Return the smallest rank whose loss is within the bound, by binary search; ranks above 64 in steps of 8.

    The search assumes that the loss falls as the rank grows, which is true up to noise.

    Args:
        most: the full rank.
        bound: the largest allowed loss, in nats.
        loss_at: returns the loss at a rank, in nats.

    Raises:
        OptionError: the loss at full rank exceeds the bound.
    """
    ranks = [*range(1, min(most, 64) + 1), *range(72, most, 8)]
    ranks += [most] if ranks[-1] != most else []
    low, high = 0, len(ranks) - 1
    full_rank_loss, bound = loss_at(ranks[high]), bound * (1 + ROUNDING)
    if not full_rank_loss <= bound:
        raise OptionError(
            f"max_loss cannot be kept: at the full rank of {most} the loss is {full_rank_loss:.6f}, and the bound is "
            f"{bound:.6f}. The lost rotation causes the difference; give a larger rope_dim."
        )
    while low < high:
        middle = (low + high) // 2
        value = loss_at(ranks[middle])
        if math.isfinite(value) and value <= bound:
            high = middle
        else:
            low = middle + 1
    return ranks[high]
