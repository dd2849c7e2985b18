"""Conversion of trained multi-head and grouped-query attention to latent attention."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..core.projections import Latents, Projections, Statistics
from ..errors import OptionError
from .checks import (
    check_decomposition,
    check_freqfold,
    check_method,
    check_rank,
    check_ratio,
    check_rope_dim,
    check_select,
    check_unused,
)
from .low_rank import balance_of, full_ranks, second_moment, spans
from .rotary_keys import RotaryKeys, principal, select_rotary_dims, shared_rotary_key


@torch.no_grad()
def convert_layer(
    projections: Projections,
    statistics: Statistics | None,
    *,
    method: str,
    kv_rank: int,
    rope_dim: int,
    select: str = "2-norm",
    svd: str = "joint",
    freqfold: int | None = None,
    balance_kv_ratio: float = 1.0,
    latent_norm: bool = False,
) -> Latents:
    """Convert one attention: `rope_dim` dimensions keep their rotation, and a latent of `kv_rank` holds the rest.

    At `full_rank` the conversion loses only the rotation of the other dimensions, and nothing if `rope_dim` keeps all
    of them. Latent dimensions beyond `full_rank` are zero.

    Methods:
        "transmla": one rotary key that all heads share, and the principal components of the activations of the other
            key dimensions and the values (Meng et al. 2025, arXiv 2502.07864).
        "svd": the same rotary key, and the singular vectors of the weights.
        "mha2mla": one rotary key for each key-value head, made of a selection of its dimensions, and the singular
            vectors of the weights (Ji et al. 2025, arXiv 2502.14837).

    Args:
        projections: the weights of the attention.
        statistics: the result of `gather`. "mha2mla" accepts None, unless it selects by "2-norm" or has a latent norm.
        method: "transmla", "svd" or "mha2mla".
        kv_rank: width of the latent, 1 to `widest_rank`.
        rope_dim: for "transmla" and "svd", the width of the shared rotary key: an even divisor of the trained rotary
            width, or a multiple of it up to that of all key-value heads. For "mha2mla", an even number of dimensions
            for each key-value head, at least 2, since the model needs some rotation to see the order of tokens.
        select: the frequencies that "mha2mla" keeps: "high", "low", "uniform", or "2-norm" for those whose queries and
            keys have the largest norms.
        svd: "joint", or "split" for one latent of `kv_rank` each for keys and values ("mha2mla").
        freqfold: number of neighboring frequencies treated as one ("transmla", "svd"): a multiple of rotary width /
            rope_dim that divides the number of frequencies. None for the smallest that spans a sixteenth of the
            frequencies, or 1 if rope_dim exceeds the rotary width. Twice that value may give a lower loss.
        balance_kv_ratio: norm of the keys without position relative to the values when they compete for rank
            ("transmla").
        latent_norm: add an RMSNorm on the latent, with a weight that cancels it for a latent of average size; not
            for "split".

    Raises:
        OptionError: an option is unknown, out of range, or not one of this method.
    """
    check_unused(method, select=select, svd=svd, freqfold=freqfold, balance_kv_ratio=balance_kv_ratio)
    check_select(select)
    lossless = full_rank(projections, method, rope_dim, svd)
    check_rank(method, kv_rank, widest_rank(projections, method, rope_dim, svd), f"at rope_dim={rope_dim}")
    if latent_norm and svd == "split":
        raise OptionError("latent_norm=True adds one norm, and svd='split' makes two latents; use svd='joint'.")
    _check_statistics(statistics, method, select, latent_norm)
    keys = _rotary_keys(projections, statistics, method, rope_dim, select, freqfold)
    activations, balance = None, 1.0
    if method == "transmla":
        assert statistics is not None
        activations = statistics
        balance = balance_of(projections, keys, statistics, check_ratio(method, balance_kv_ratio))
    rest = keys.rest / balance
    moment, rows = second_moment(projections, rest, activations), rest.shape[0]
    moments = [moment] if svd == "joint" else [moment[:rows, :rows], moment[rows:, rows:]]
    axes = [principal(*each) for each in zip(moments, spans(projections, rest, svd), strict=True)]
    if svd == "joint":
        key_axes, value_axes = axes[0].tensor_split((rows,))
    else:
        key_axes, value_axes = (_pad_columns(each, lossless) for each in axes)
    of_key, of_value = key_axes.T @ rest, value_axes.T
    latents = Latents(
        query=keys.query.repeat_interleave(projections.group, 0),
        down=torch.cat((of_key, of_value), 1) if svd == "joint" else torch.block_diag(of_key, of_value),
        rope_key=keys.rope_key,
        up_key=balance * keys.expand @ key_axes,
        up_value=value_axes.unflatten(0, (projections.kv_heads, projections.head_dim)),
        frequency=keys.frequency,
        split=svd == "split",
    )
    latents = truncated(latents, min(kv_rank, lossless))
    if kv_rank > lossless:
        latents = _padded(latents, kv_rank)
    return _with_norm(latents, statistics) if latent_norm else latents


def full_rank(projections: Projections, method: str, rope_dim: int, svd: str = "joint") -> int:
    """Return the smallest lossless `kv_rank`; for `svd="split"`, that of each of the two latents."""
    check_method(method)
    check_decomposition(method, svd)
    check_rope_dim(projections, method, rope_dim)
    rotary = rope_dim * projections.kv_heads if method == "mha2mla" else rope_dim
    rows = projections.kv_heads * projections.head_dim - rotary
    key, value, joint = full_ranks(projections, rows)
    if svd == "joint":
        return joint
    if not rows:
        raise OptionError(
            f"svd='split' got rope_dim={rope_dim}, so all key dimensions rotate and none are left for a latent of "
            "keys; use svd='joint' or a smaller rope_dim."
        )
    return max(key, value)


def widest_rank(projections: Projections, method: str, rope_dim: int, svd: str = "joint") -> int:
    """Return the largest allowed `kv_rank`: the number of dimensions of values and of keys that do not rotate.

    It exceeds `full_rank` if the hidden state has fewer dimensions than that.
    """
    values = projections.kv_heads * projections.head_dim
    rows = values - rope_dim * (projections.kv_heads if method == "mha2mla" else 1)
    return max(full_rank(projections, method, rope_dim, svd), rows + values if svd == "joint" else max(rows, values))


def _padded(latents: Latents, rank: int) -> Latents:
    """Return the latents padded with zeros to a larger rank."""
    missing = rank - latents.up_value.shape[-1]
    down = latents.down.unflatten(0, (2 if latents.split else 1, -1))
    down = torch.nn.functional.pad(down, (0, 0, 0, missing)).flatten(0, 1)
    up_key, up_value = (torch.nn.functional.pad(up, (0, missing)) for up in (latents.up_key, latents.up_value))
    return replace(latents, down=down, up_key=up_key, up_value=up_value)


@torch.no_grad()
def truncated(latents: Latents, rank: int, statistics: Statistics | None = None) -> Latents:
    """Truncate latents to a smaller rank; the result equals a conversion at that rank.

    Args:
        latents: the result of a conversion, whose dimensions are sorted by decreasing importance.
        rank: the new rank.
        statistics: the statistics of the conversion; needed for latents with a norm, whose weight depends on the rank.
    """
    check_rank("truncated", rank, latents.up_value.shape[-1], "of these latents")
    down = latents.down.unflatten(0, (2 if latents.split else 1, -1))[:, :rank].flatten(0, 1)
    up_key, up_value = latents.up_key[..., :rank], latents.up_value[..., :rank]
    # Copies, because views would keep the larger tensors in memory.
    cut = replace(latents, down=down.clone(), up_key=up_key.clone(), up_value=up_value.clone())
    if latents.norm is None:
        return cut
    if statistics is None:
        raise OptionError("These latents have a norm, whose weight depends on the rank; give their statistics too.")
    return _with_norm(cut, statistics)


def _rotary_keys(
    projections: Projections,
    statistics: Statistics | None,
    method: str,
    rope_dim: int,
    select: str,
    freqfold: int | None,
) -> RotaryKeys:
    """Return the rotary keys of a method."""
    if method == "mha2mla":
        return select_rotary_dims(projections, statistics, rope_dim, select)
    assert statistics is not None
    return shared_rotary_key(projections, statistics, rope_dim, check_freqfold(projections, method, rope_dim, freqfold))


def _check_statistics(statistics: Statistics | None, method: str, select: str, latent_norm: bool) -> None:
    """Raise `OptionError` if the method needs statistics and there are none."""
    if statistics is not None and not statistics.tokens:
        raise OptionError("The statistics cover no tokens; call `gather` with inputs of this attention first.")
    if statistics is None and (method != "mha2mla" or select == "2-norm" or latent_norm):
        what = f"{method!r}" if method != "mha2mla" else "select='2-norm'" if select == "2-norm" else "latent_norm=True"
        raise OptionError(f"{what} needs the statistics of calibration tokens; `gather` them first.")


def _pad_columns(axes: Tensor, rank: int) -> Tensor:
    """Pad `axes` with zeros to `rank` columns, so that both latents have the same width."""
    return torch.nn.functional.pad(axes, (0, max(0, rank - axes.shape[1])))


def _with_norm(latents: Latents, statistics: Statistics | None) -> Latents:
    """Add a norm weight with which RMSNorm leaves a latent of the calibration's root mean square unchanged."""
    assert statistics is not None
    down = latents.down
    mean_square = ((down @ statistics.moment) * down).sum() / (statistics.tokens * down.shape[0])
    return replace(latents, norm=mean_square.sqrt().expand(down.shape[0]).contiguous())
