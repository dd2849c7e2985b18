"""Colours and markers of the charts, for light and dark backgrounds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Colours = Mapping[str, Any]

# Okabe and Ito's palette, which colour-blind readers can distinguish. The first colour is for the original model.
_SERIES = ("#8a8f98", "#e69f00", "#56b4e9", "#cc79a7", "#009e73", "#d55e00")
LIGHT: Colours = {
    "paper": "#ffffff",
    "ink": "#1f2328",
    "faint": "#e3e6ea",
    "muted": "#59616b",
    "series": (*_SERIES, "#0072b2", "#000000"),
}
DARK: Colours = {
    "paper": "#16191d",
    "ink": "#e6e9ed",
    "faint": "#2c3138",
    "muted": "#a2abb5",
    "series": (*_SERIES, "#f0e442", "#ffffff"),
}
# One marker fewer than colours, so that the combinations repeat later than the colours.
SHAPES = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "triangle-right")
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', Arial, sans-serif"

# Blue to yellow in perceptually uniform steps, also for colour-blind readers. Both ends differ from both backgrounds.
HEAT = "cividis"
DARK_INK, LIGHT_INK = "#101418", "#f4f6f8"


def theme(colours: Colours) -> dict[str, Any]:
    """Return the Vega-Lite configuration for these colours. Charts have no colours without it."""
    return {
        "background": colours["paper"],
        "font": FONT,
        "title": {
            "color": colours["ink"],
            "subtitleColor": colours["muted"],
            "anchor": "start",
            "frame": "group",
            "fontSize": 13,
            "fontWeight": 600,
            "subtitleFontSize": 11,
            "subtitleLineHeight": 14,
            "offset": 8,
            # limit the title to the width of its panel; in a PNG the panels have no `width` signal
            "limit": {"expr": "width > 0 ? max(width, 120) : 290"},
        },
        "axis": {
            "domainColor": colours["muted"],
            "tickColor": colours["muted"],
            "gridColor": colours["faint"],
            "labelColor": colours["ink"],
            "titleColor": colours["muted"],
            "titleFontWeight": "normal",
            "labelFontSize": 11,
            "titleFontSize": 11.5,
            "titlePadding": 8,
        },
        "legend": {
            "labelColor": colours["ink"],
            "titleColor": colours["muted"],
            "labelFontSize": 11.5,
            "symbolSize": 90,
            "symbolStrokeWidth": 2,
        },
        "view": {"stroke": None},
        "range": {"category": list(colours["series"]), "symbol": list(SHAPES), "heatmap": {"scheme": HEAT}},
        "rule": {"color": colours["muted"]},
        "style": {"note": {"color": colours["muted"], "fontSize": 10.5}, "original": {"color": colours["ink"]}},
    }
