"""Colours and signs of the charts, on light and on dark paper."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Colours = Mapping[str, Any]

# Okabe and Ito's colours, which colour-blind readers can tell apart; the first is for the untouched model.
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
# One sign fewer than colours: where the colours begin again, the signs do not.
SHAPES = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "triangle-right")
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', Arial, sans-serif"

# Blue to yellow, equal steps for every kind of sight. Its ends differ from light and from dark paper.
HEAT = "cividis"
DARK_INK, LIGHT_INK = "#101418", "#f4f6f8"


def theme(colours: Colours) -> dict[str, Any]:
    """The Vega-Lite configuration that paints a chart in these colours; charts themselves name none."""
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
            # no wider than the panel that it names; a picture's panels have other names for their widths
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
