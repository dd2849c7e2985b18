"""The chart of rotary wavelengths."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from ..results import Results
from .chart import Chart, data
from .components import faded_unless_selected, legend_selection, scheme_encoding, tooltips
from .libraries import alt

HOW_TO_READ = (
    "A pair whose wavelength exceeds the trained window made no full turn in training. Beyond the window it gives the "
    "model angles that it has not seen, unless a scheme stretches it."
)


def wavelength_chart(results: Results, frequencies: Mapping[str, np.ndarray]) -> Chart | None:
    """Draw the wavelengths of each scheme (tokens per turn) by pair of dimensions, with lines at the windows.

    Args:
        results: Results with the schemes, lengths and windows.
        frequencies: Inverse frequencies [pairs] by scheme name.

    Returns:
        The chart, or None without frequencies.
    """
    if not frequencies:
        return None
    names = list(dict.fromkeys([*results.values("scheme"), *frequencies]))
    points = [
        {"scheme": scheme, "pair": pair, "wavelength": float(wavelength), "number": f"{wavelength:,.1f} tokens"}
        for scheme, inverse in frequencies.items()
        for pair, wavelength in enumerate(2 * np.pi / np.asarray(inverse, dtype=np.float64))
        if np.isfinite(wavelength)
    ]
    pairs = max(len(inverse) for inverse in frequencies.values())
    lengths = results.values("length")
    windows = {"trained window": results.config.get("native_window") or min(lengths), "greatest length": max(lengths)}
    pick, look = legend_selection(), scheme_encoding(names, list(frequencies))
    x = alt.X(
        "pair:Q", title="pair of rotated dimensions, fastest first",
        scale=alt.Scale(domain=[0, pairs - 1], nice=False, padding=8), axis=alt.Axis(grid=False, tickMinStep=1),
    )  # fmt: skip
    greatest = max([point["wavelength"] for point in points] + list(windows.values()))
    powers = [10**power for power in range(math.ceil(math.log10(greatest)) + 1)]
    y = alt.Y(
        "wavelength:Q", title="tokens per turn", scale=alt.Scale(type="log", nice=False),
        axis=alt.Axis(format="~s", values=powers),
    )  # fmt: skip
    base = alt.Chart(data(points)).encode(x=x, y=y, color=look["color"])
    tips = tooltips("scheme", extra={"pair": "pair", "number": "wavelength"})
    marks = [
        base.mark_line(strokeWidth=1.6).encode(opacity=faded_unless_selected(pick)),
        base.mark_point(filled=True, size=34)
        .encode(shape=look["shape"], opacity=faded_unless_selected(pick), tooltip=tips)
        .add_params(pick),
    ]
    notes = [{"wavelength": n, "pair": 0, "note": f"{name} {n:,}"} for name, n in windows.items()]
    line = alt.Chart(data(notes)).encode(y=y)
    marks.append(line.mark_rule(strokeDash=[2, 3], strokeWidth=1.3))
    # at the left end, where all curves are far below the windows
    marks.append(line.mark_text(style="note", align="left", baseline="bottom", dy=-3).encode(x=x, text="note:N"))
    panel = alt.layer(*marks).properties(width=560, height=280)
    model = f" of {results.config['model']}" if "model" in results.config else ""
    subtitle = f"Tokens per turn of each of the {pairs} pairs of rotated dimensions{model}; computed"
    return Chart("frequencies", "Wavelengths", (panel,), subtitle, HOW_TO_READ)
