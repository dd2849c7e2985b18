"""Trained projections turned into the modules of a scheme that takes their place; the model stays as it is."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

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
"""What a host's rotary module calls the factor on cos and sin."""
ROUNDING = 1e-5
"""By how much a loss may exceed its bound for float32's sake."""
LENGTH, LIMIT, SHARE = 512, 65536, 0.25
"""Tokens to a row of calibration, tokens in all, and the share of rows on which a loss is measured."""


@dataclass
class Conversion:
    """The modules of the chosen layers; and, where their rank is still to be found, what narrower ones are made of."""

    modules: dict[int, nn.Module]
    rows: list[Tensor] = field(default_factory=list)
    """Calibration tokens that no layer has seen, to measure the loss on."""
    latents: dict[int, tuple[Projections, Latents, Statistics | None]] = field(default_factory=dict)

    def at(self, own: dict[int, Any], rank: int) -> dict[int, nn.Module]:
        """Modules of the same conversion with this rank, which becomes the schemes' own."""
        modules = {}
        for index, (projections, latents, seen) in self.latents.items():
            own[index].rank = rank
            modules[index] = own[index].filled(projections, own[index].narrowed(latents, rank, seen))
        return modules


def convert(head: PreTrainedModel, base: Any, adapter: Adapter, own: dict[int, Any]) -> Conversion:
    """The modules that take the place of projections, one for each layer of `own`."""
    first = next(iter(own.values()))
    if adapter.rotary is None:
        raise UnsupportedError(
            f"{first.name!r} converts attention that rotates queries and keys (RoPE), and this family does not."
        )
    if adapter.projections is None:
        raise UnsupportedError(
            f"{first.name!r} takes the place of query, key and value projections, and nothing says how "
            f"{base.config.model_type} projects: give its adapter `projections=` (pe_patch.adapters.projections)."
        )
    attentions = adapter.attentions(base)
    empty = all(p.is_meta for p in head.parameters()) and not any(hasattr(m, "_hf_hook") for m in head.modules())
    scale = 1.0 if overrides(first, "angles") else float(getattr(base.get_submodule(adapter.rotary), SCALE, 1.0))
    read = {
        i: replace(
            adapter.projections.read(attentions[i], adapter.shape(base, base.config, i), empty), rotation_scale=scale
        )
        for i in own
    }
    for index, scheme in own.items():
        scheme.check(read[index])
    if empty:  # a model without any weights, to look at what would be swapped
        for scheme in own.values():
            scheme.restored = True
    if first.calibration is not None and not first.needs_calibration:
        logger.warning("%r with these options does not look at the calibration tokens that it was given", first.name)
    if first.restored or not first.needs_calibration:
        modules = _all(own, read)
        if first.starts_fresh:
            for module in modules.values():
                module.apply(head._init_weights)
        return Conversion(modules)
    if first.calibration is None:
        raise OptionError(
            f"{first.name!r} with these options is calibrated on text: give calibration=<token ids or texts> of the "
            "kind that the model is for, some ten thousand tokens."
        )
    rows, kept = tokens(first.calibration, head, length=LENGTH, limit=LIMIT, seed=first.seed), []
    if first.loss_bound is not None:
        rows, kept = held_out([row for row in rows if len(row) > 1], SHARE, first.seed)
    if (count := sum(map(len, rows))) < first.rank:
        logger.warning(
            "%d calibration tokens are fewer than the rank of %d, so the rest of it is left to chance; give more text.",
            count, first.rank,
        )  # fmt: skip
    found = Conversion({}, kept)
    seen: dict[int, Any] = {}

    def each(index: int, hidden: Tensor) -> None:
        if index in own:
            seen[index] = own[index].observe(read[index], hidden, seen.get(index))

    def done(index: int) -> None:
        if index not in own:
            return
        statistics, scheme = seen.pop(index), own[index]
        if scheme.loss_bound is None:
            found.modules[index] = _filled(scheme, read[index], statistics)
        else:
            latents = scheme.convert(read[index], statistics)
            found.latents[index] = (read[index], latents, statistics if scheme.latent_norm else None)

    stream(base, adapter.blocks(base), attentions, rows, each, done=done)
    return found


def _filled(scheme: ProjectionScheme, projections: Projections, statistics: Any) -> nn.Module:
    module = scheme.replace(projections, statistics)
    assert module is not None
    return module


def _all(own: dict[int, Any], read: dict[int, Projections]) -> dict[int, nn.Module]:
    return {index: _filled(scheme, read[index], None) for index, scheme in own.items()}


@torch.no_grad()
def loss(head: Any, rows: list[Tensor]) -> float:
    """Mean loss of the next token, in nats."""
    if head.get_output_embeddings() is None:
        raise OptionError(f"max_loss needs a model that predicts tokens, and {type(head).__name__} has no such head.")
    total, count = 0.0, 0
    with evaluating(head):
        for ids in batches(rows, 2048):
            ids = ids.to(head.device)
            logits = head(input_ids=ids, use_cache=False).logits[:, :-1].float()
            total += float(nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
            count += ids[:, 1:].numel()
    return total / count


def smallest_rank(most: int, bound: float, loss_at: Callable[[int], float]) -> int:
    """The smallest rank whose loss is within the bound, by halving; ranks above 64 in steps of 8.

    Taken to fall as the rank grows, which holds but for noise.
    """
    ranks = [*range(1, min(most, 64) + 1), *range(72, most, 8)]
    ranks += [most] if ranks[-1] != most else []
    low, high = 0, len(ranks) - 1
    reached, bound = loss_at(ranks[high]), bound * (1 + ROUNDING)
    if not reached <= bound:
        raise OptionError(
            f"max_loss cannot be kept: with the full rank of {most} the loss is {reached:.6f} and was to be at most "
            f"{bound:.6f}. What is missing is rotation: give a larger rope_dim."
        )
    while low < high:
        middle = (low + high) // 2
        value = loss_at(ranks[middle])
        if math.isfinite(value) and value <= bound:
            high = middle
        else:
            low = middle + 1
    return ranks[high]
