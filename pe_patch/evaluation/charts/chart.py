"""A chart: one definition for the interactive page and for the PNG."""

from __future__ import annotations

import math
import re
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from ...errors import escape
from ..results import finite
from .libraries import alt, vl_convert
from .theme import LIGHT, Colours, theme

Panel = alt.Chart | alt.LayerChart

FULL_WIDTH = 960
"""Pixels of page width at which all columns fit next to each other."""


@dataclass(frozen=True)
class Chart:
    """One or more Vega-Lite panels with a common title. The theme adds the colours."""

    name: str
    """Name of the PNG, without its ending."""
    title: str
    panels: tuple[Panel, ...]
    subtitle: str = ""
    """Samples, text and model of the measurement."""
    caption: str = ""
    """How to read the chart."""
    columns: int = 1
    """Panels per line on a wide page. A narrow page has fewer."""

    def specifications(self) -> list[dict[str, Any]]:
        """Return a Vega-Lite specification per panel, as wide as the element that contains it."""
        specifications = []
        for panel in self.panels:
            specification = _specification(panel)
            specification["width"] = "container"
            specification["autosize"] = {"type": "fit-x", "contains": "padding", "resize": True}
            specifications.append(specification)
        return specifications

    @property
    def min_panel_width(self) -> int:
        """Minimum width of a panel in pixels. On a narrower page a line has fewer panels."""
        return round(FULL_WIDTH / self.columns)

    def png(self, colours: Colours = LIGHT) -> bytes:
        """Render the chart as PNG with title and subtitle. This needs no browser and no network."""
        with warnings.catch_warnings():
            # Altair warns that it merges equal selections of the panels, which is intended
            warnings.filterwarnings("ignore", "Automatically deduplicated selection parameter", UserWarning)
            specification = _specification(alt.concat(*self.panels, columns=self.columns, spacing=24))
        width = min(self.columns, len(self.panels)) * cast(int, self.panels[0].width)
        lines = textwrap.wrap(self.subtitle, max(50, round(width / 5.2)))
        specification["title"] = _printable(
            {"text": self.title, "subtitle": lines, "fontSize": 15, "offset": 14, "limit": 0}
        )
        specification["padding"] = 14
        return vl_convert.vegalite_to_png(
            specification, scale=2.0 if len(self.panels) <= 4 else 1.5, config=theme(colours)
        )


def _specification(panel: Any) -> dict[str, Any]:
    """Return the specification of a panel, independent of the theme and the row limit of the user's Altair."""
    with alt.data_transformers.enable("default", max_rows=None), alt.theme.enable("none"):
        specification = panel.to_dict()
    specification.pop("$schema")
    return _printable(specification)


def _printable(value: Any) -> Any:
    """Replace what aborts the renderer: control characters in strings, and numbers that JSON has no words for.

    Escapes would not help: the renderer evaluates some strings as expressions, which turns escapes into the characters.
    """
    if isinstance(value, dict):
        return {_printable(key): _printable(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_printable(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return escape(value, lambda _: "\N{REPLACEMENT CHARACTER}") if isinstance(value, str) else value


def file_name(*parts: str) -> str:
    """Join words to a file name of lower-case letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-")[:60] or "chart"


def data(rows: Sequence[Mapping[str, Any]]) -> alt.InlineData:
    """Wrap rows as inline data of a specification."""
    return alt.InlineData(values=[finite(dict(row)) for row in rows])
