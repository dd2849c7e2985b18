"""Trained multi-head and grouped-query attention as latent attention."""

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
from .rotary_keys import RotaryKeys, principal, selected, shared


@torch.no_grad()
def convert(
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
    """The attention of `projections`, with its rotation in `rope_dim` dims and the rest of its cache in `kv_rank`.

    Methods:
        "transmla": one rotary key that all heads share, and the principal axes of what calibration tokens make of the
            other key dims and the values (Meng et al. 2025, arXiv 2502.07864).
        "svd": the same rotary key; then the singular vectors of the weights, whatever tokens make of them.
        "mha2mla": a rotary key for each key-value head, of dims as they are; then singular vectors of the weights
            (Ji et al. 2025, arXiv 2502.14837).

    At `full_rank` nothing is lost but the rotation of the other dims; with all of that kept, nothing. What is beyond it
    holds zeros.

    Options:
        statistics: what `gather` found. None is enough for "mha2mla", unless it selects by "2-norm" or has a norm.
        kv_rank: 1 to `widest_rank`.
        rope_dim: for "transmla" and "svd" the width of the one rotary key: an even divisor of the trained rotary width,
            or a multiple of it up to that of all key-value heads. For "mha2mla" an even number for each of these heads,
            at least 2: without any rotation no order of the tokens would be left.
        select: "high" or "low" frequencies, "uniform" over them, or "2-norm": those that score most ("mha2mla").
        svd: "joint", or "split" for one latent of `kv_rank` each for keys and values ("mha2mla").
        freqfold: how many neighbouring frequencies are taken for one ("transmla", "svd"): a multiple of rotary width /
            rope_dim that divides the number of frequencies. None for the smallest that spans a sixteenth of these, and
            for 1 where rope_dim is above the rotary width. The model's loss may find a better one: try its double.
        balance_kv_ratio: how large the key dims without position are to be, relative to values, when rank is shared out
            ("transmla").
        latent_norm: an RMS norm on the latent, with the weight that undoes it for a latent of mean size; not for
            "split".
    """
    check_unused(method, select=select, svd=svd, freqfold=freqfold, balance_kv_ratio=balance_kv_ratio)
    check_select(select)
    most = full_rank(projections, method, rope_dim, svd)
    check_rank(method, kv_rank, widest_rank(projections, method, rope_dim, svd), f"at rope_dim={rope_dim}")
    if latent_norm and svd == "split":
        raise OptionError("latent_norm=True is one norm, and svd='split' makes two latents; use svd='joint'.")
    _check_statistics(statistics, method, select, latent_norm)
    keys = _rotary_keys(projections, statistics, method, rope_dim, select, freqfold)
    seen, balance = None, 1.0
    if method == "transmla":
        assert statistics is not None
        seen, balance = statistics, balance_of(projections, keys, statistics, check_ratio(method, balance_kv_ratio))
    rest = keys.rest / balance
    moment, rows = second_moment(projections, rest, seen), rest.shape[0]
    moments = [moment] if svd == "joint" else [moment[:rows, :rows], moment[rows:, rows:]]
    axes = [principal(*each) for each in zip(moments, spans(projections, rest, svd), strict=True)]
    key_axes, value_axes = axes[0].tensor_split((rows,)) if svd == "joint" else (_wide(part, most) for part in axes)
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
    latents = truncated(latents, min(kv_rank, most))
    if kv_rank > most:
        latents = _padded(latents, kv_rank)
    return _with_norm(latents, statistics) if latent_norm else latents


def full_rank(projections: Projections, method: str, rope_dim: int, svd: str = "joint") -> int:
    """The `kv_rank` from which on nothing is lost; of each of two latents for `svd="split"`."""
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
            f"svd='split' got rope_dim={rope_dim}, with which all key dims rotate and none are left for a latent of "
            "keys; use svd='joint' or a smaller rope_dim."
        )
    return max(key, value)


def widest_rank(projections: Projections, method: str, rope_dim: int, svd: str = "joint") -> int:
    """All dimensions of values and of keys that do not rotate; `full_rank` is less where the hidden state has fewer."""
    values = projections.kv_heads * projections.head_dim
    rows = values - rope_dim * (projections.kv_heads if method == "mha2mla" else 1)
    return max(full_rank(projections, method, rope_dim, svd), rows + values if svd == "joint" else max(rows, values))


def _padded(latents: Latents, rank: int) -> Latents:
    """The same in a wider latent, the rest of which is zero."""
    more = rank - latents.up_value.shape[-1]
    down = latents.down.unflatten(0, (2 if latents.split else 1, -1))
    down = torch.nn.functional.pad(down, (0, 0, 0, more)).flatten(0, 1)
    up_key, up_value = (torch.nn.functional.pad(up, (0, more)) for up in (latents.up_key, latents.up_value))
    return replace(latents, down=down, up_key=up_key, up_value=up_value)


@torch.no_grad()
def truncated(latents: Latents, rank: int, statistics: Statistics | None = None) -> Latents:
    """`latents` at a smaller rank: what `convert` gives at that one, as directions come in order of what they hold.

    `statistics` are needed where there is a norm, whose weight depends on the rank.
    """
    check_rank("truncated", rank, latents.up_value.shape[-1], "as these latents have")
    down = latents.down.unflatten(0, (2 if latents.split else 1, -1))[:, :rank].flatten(0, 1)
    up_key, up_value = latents.up_key[..., :rank], latents.up_value[..., :rank]
    # Copies, as parts of the larger tensors would keep these alive.
    cut = replace(latents, down=down.clone(), up_key=up_key.clone(), up_value=up_value.clone())
    if latents.norm is None:
        return cut
    if statistics is None:
        raise OptionError("These latents have a norm, whose weight depends on the rank; give their statistics, too.")
    return _with_norm(cut, statistics)


def _rotary_keys(
    projections: Projections,
    statistics: Statistics | None,
    method: str,
    rope_dim: int,
    select: str,
    freqfold: int | None,
) -> RotaryKeys:
    if method == "mha2mla":
        return selected(projections, statistics, rope_dim, select)
    assert statistics is not None
    return shared(projections, statistics, rope_dim, check_freqfold(projections, method, rope_dim, freqfold))


def _check_statistics(statistics: Statistics | None, method: str, select: str, latent_norm: bool) -> None:
    if statistics is not None and not statistics.tokens:
        raise OptionError("The statistics are of no tokens; `gather` them from inputs of this attention first.")
    if statistics is None and (method != "mha2mla" or select == "2-norm" or latent_norm):
        what = f"{method!r}" if method != "mha2mla" else "select='2-norm'" if select == "2-norm" else "latent_norm=True"
        raise OptionError(f"{what} needs the statistics of calibration tokens; `gather` them first.")


def _wide(axes: Tensor, rank: int) -> Tensor:
    """`axes` with zeros up to `rank` columns: of two latents the shorter is as wide as the other."""
    return torch.nn.functional.pad(axes, (0, max(0, rank - axes.shape[1])))


def _with_norm(latents: Latents, statistics: Statistics | None) -> Latents:
    """RMSNorm(c) * norm is c wherever c is as large as calibration's are in the root mean square."""
    assert statistics is not None
    down = latents.down
    mean_square = ((down @ statistics.moment) * down).sum() / (statistics.tokens * down.shape[0])
    return replace(latents, norm=mean_square.sqrt().expand(down.shape[0]).contiguous())
