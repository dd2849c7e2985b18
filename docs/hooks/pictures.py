"""Draw the pictures of the schemes' pages: frequencies, distances, biases or vectors, as the classes compute them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import altair as alt
import numpy as np
import torch
import vl_convert

from pe_patch import SCHEMES
from pe_patch.core.scheme import AttentionShape, Scheme
from pe_patch.evaluation.charts.theme import DARK, LIGHT, theme

SMOLLM2 = AttentionShape(576, 9, 3, 64, 64, 0, 100_000.0, 8_192, 30)
"""The attention of SmolLM2 135M, whose frequencies are drawn."""
SMALL = AttentionShape(512, 8, 8, 64, 64, 0, 10_000.0, 512, 8)
"""An attention with a window of 512 tokens, whose distances and biases are drawn."""
LENGTH, CELLS = 1_536, 96
WIDTH, HEIGHT = 520, 260
Picture = tuple[alt.Chart | alt.LayerChart, str]
"""A chart and its caption."""


def render(chart: Any, dark: bool) -> str:
    """Return a chart as SVG, with the colours of the reports."""
    # The renderer measures text in another font than browsers have, so legends need room.
    specification = {**chart.to_dict(), "padding": {"left": 5, "top": 5, "bottom": 5, "right": 60}}
    return str(vl_convert.vegalite_to_svg(specification, config=theme(DARK if dark else LIGHT)))


def picture_of(name: str, options: Mapping[str, Any]) -> Picture | None:
    """Return the picture of a scheme, or None if there is nothing to draw before it is trained."""
    scheme_class = SCHEMES[name]
    draw = DRAWN.get(name) or BY_MECHANISM.get(scheme_class.mechanism)
    return None if draw is None else draw(scheme_class, options)


def wavelengths(scheme_class: type[Scheme], options: Mapping[str, Any]) -> Picture:
    """Draw the wavelength of each pair of dimensions, of the model as it is and under the scheme."""
    if "long_factor" in options:
        options = {"long_factor": [1.0 + 3.0 * min(1.0, pair / 20) for pair in range(32)], "factor": 4}
    plain: Any = SCHEMES["rope"](SMOLLM2)
    scheme: Any = scheme_class(SMOLLM2, **options)
    longest = 4 * SMOLLM2.trained_length
    rows = [("unpatched", plain.inv_freq)]
    if scheme_class.name != "rope":
        rows.append((scheme_class.name, scheme.frequencies(longest)[0]))
    points = [
        {"frequencies": label, "pair": pair, "wavelength": float(2 * np.pi / value)}
        for label, values in rows
        for pair, value in enumerate(values.tolist())
        if value > 0
    ]
    lines = alt.Chart(alt.Data(values=points)).mark_line(point=True).encode(
        x=alt.X("pair:Q", title="pair of dimensions, fastest first", scale=alt.Scale(domain=[0, 31], nice=False)),
        y=alt.Y("wavelength:Q", title="tokens per turn", scale=alt.Scale(type="log"), axis=alt.Axis(format="~s")),
        color=alt.Color("frequencies:N", title=None, sort=[label for label, _ in rows]),
    )  # fmt: skip
    window = alt.Chart(alt.Data(values=[{"y": SMOLLM2.trained_length}])).mark_rule(strokeDash=[4, 3]).encode(y="y:Q")
    still = len(rows) > 1 and any(value == 0 for value in rows[1][1].tolist())
    note = " Pairs without a point do not rotate." if still else ""
    factor = scheme.frequencies(longest)[1]
    if factor != 1:
        note += f" cos and sin are also multiplied by {factor:.3f}."
    return (lines + window).properties(width=WIDTH, height=HEIGHT), (
        f"Tokens that a pair needs for one turn, in SmolLM2 135M's attention at {longest:,} tokens. The dashed line is "
        f"the window.{note}"
    )


def distances(scheme_class: type[Scheme], options: Mapping[str, Any]) -> Picture:
    """Draw the distance by which each query sees each key."""
    if "over" in options:
        options = {**options, "over": {**options["over"], "factor": LENGTH / SMALL.trained_length}}
    if "factor" in options:
        options = {**options, "factor": LENGTH / SMALL.trained_length}
    matrix = scheme_class(SMALL, **options).relative_position(LENGTH)
    step = LENGTH // CELLS
    cells = [
        {"query": row * step, "key": column * step, "distance": float(matrix[row * step, column * step])}
        for row in range(CELLS)
        for column in range(row + 1)
        if not torch.isnan(matrix[row * step, column * step])
    ]
    limit = SMALL.trained_length
    axis = alt.Axis(values=[0, 512, 1024, 1536], grid=False)
    chart = alt.Chart(alt.Data(values=cells)).mark_rect().encode(
        x=alt.X("x0:Q", title="key", scale=alt.Scale(domain=[0, LENGTH], nice=False), axis=axis),
        x2="x1:Q",
        y=alt.Y("y0:Q", title="query", scale=alt.Scale(domain=[LENGTH, 0], nice=False), axis=axis),
        y2="y1:Q",
        color=alt.Color("distance:Q", title="distance", scale=alt.Scale(scheme="cividis")),
    ).transform_calculate(
        # Cells overlap a little, since renderers leave seams between them.
        x0="datum.key", x1=f"datum.key + {1.1 * step}", y0="datum.query", y1=f"datum.query + {1.1 * step}"
    )  # fmt: skip
    greatest = float(matrix[~torch.isnan(matrix)].max())
    return chart.properties(width=300, height=300), (
        f"The distance by which each query sees each key, for a window of {limit} tokens and a text of {LENGTH:,}. The "
        f"greatest is {greatest:,.0f}."
    )


def biases(scheme_class: type[Scheme], options: Mapping[str, Any]) -> Picture:
    """Draw the bias by distance of four heads."""
    built: Any = scheme_class(SMALL, **options)
    scheme = getattr(built, "penalty", built)
    at = torch.arange(0, LENGTH, 4)
    heads = (0, 2, 4, 7)
    points = [
        {"distance": int(x), "bias": float(y), "head": f"head {head + 1}"}
        for head in heads
        for x, y in zip(at, scheme.score_bias(at, torch.tensor(head)), strict=True)
    ]
    chart = alt.Chart(alt.Data(values=points)).mark_line().encode(
        x=alt.X("distance:Q", title="distance in tokens", scale=alt.Scale(nice=False)),
        y=alt.Y("bias:Q", title="added to the score"),
        color=alt.Color("head:N", title=None),
    )  # fmt: skip
    return chart.properties(width=WIDTH, height=HEIGHT), "What each of four heads of eight adds to a score."


def decays(scheme_class: type[Scheme], options: Mapping[str, Any]) -> Picture:
    """Draw how much is left of four pairs of dimensions at each distance."""
    scheme: Any = scheme_class(SMALL, **options)
    points = [
        {"distance": at, "left": float(scheme.zeta[pair] ** (at / scheme.scale_base)), "pair": f"pair {pair}"}
        for pair in (0, 8, 16, 31)
        for at in range(0, LENGTH, 8)
    ]
    chart = alt.Chart(alt.Data(values=points)).mark_line().encode(
        x=alt.X("distance:Q", title="distance in tokens", scale=alt.Scale(nice=False)),
        y=alt.Y("left:Q", title="factor on the pair's part of the score"),
        color=alt.Color("pair:N", title=None, sort=None),
    )  # fmt: skip
    return chart.properties(
        width=WIDTH, height=HEIGHT
    ), "How four pairs of 32 decay with the distance, fast ones sooner."


def vectors(scheme_class: type[Scheme], options: Mapping[str, Any]) -> Picture:
    """Draw the vectors that are added to the input embeddings."""
    shape = AttentionShape(64, 8, 8, 8, 8, 0, 10_000.0, 512, 8)
    scheme = scheme_class(shape, **options)
    added = scheme.embed(torch.zeros(1, 64, 64), torch.arange(64)[None])[0]
    cells = [
        {"position": row, "dimension": column, "value": float(added[row, column])}
        for row in range(64)
        for column in range(64)
    ]
    axis = alt.Axis(values=[0, 16, 32, 48, 63])
    chart = alt.Chart(alt.Data(values=cells)).mark_rect().encode(
        x=alt.X("dimension:O", title="dimension", axis=axis), y=alt.Y("position:O", title="position", axis=axis),
        color=alt.Color("value:Q", title=None, scale=alt.Scale(scheme="cividis")),
    )  # fmt: skip
    return chart.properties(width=300, height=300), "What is added to an embedding of 64 dimensions."


Draw = Callable[[type[Scheme], Mapping[str, Any]], Picture]
BY_MECHANISM: Mapping[str, Draw] = {"rotary": wavelengths, "remapped": distances}
DRAWN: Mapping[str, Draw] = {
    "alibi": biases,
    "sandwich": biases,
    "rope_alibi": biases,
    "xpos": decays,
    "sinusoidal": vectors,
}
