"""A chart: one definition for the page, where it can be touched, and for the picture beside it."""

from __future__ import annotations

import re
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
import vl_convert

from ...errors import escape
from .theme import LIGHT, Colours, theme

Panel = alt.Chart | alt.LayerChart

WIDE = 960
"""Pixels of a page on which all columns stand side by side."""


@dataclass(frozen=True)
class Chart:
    """Panels that are read together, in Vega-Lite, without colours of their own.

    `name` is that of the picture's file, without its ending. `title` says what is shown, `subtitle` what it was
    measured on (samples, text, model), `caption` how to read it. `columns` panels stand side by side, on a narrow
    page fewer.
    """

    name: str
    title: str
    panels: tuple[Panel, ...]
    subtitle: str = ""
    caption: str = ""
    columns: int = 1

    def specifications(self) -> list[dict[str, Any]]:
        """One Vega-Lite specification for each panel, as wide as the element that it is put in."""
        found = []
        for panel in self.panels:
            plain = _plain(panel)
            plain["width"] = "container"
            plain["autosize"] = {"type": "fit-x", "contains": "padding", "resize": True}
            found.append(plain)
        return found

    @property
    def least(self) -> int:
        """The narrowest that a panel gets on the page, in pixels, before fewer stand side by side."""
        return round(WIDE / self.columns)

    def png(self, colours: Colours = LIGHT) -> bytes:
        """The picture, with title and subtitle; needs no browser and no network."""
        with warnings.catch_warnings():
            # Altair tells that equal selections of the panels become one, which is what is meant
            warnings.filterwarnings("ignore", "Automatically deduplicated selection parameter", UserWarning)
            whole = _plain(alt.concat(*self.panels, columns=self.columns, spacing=24))
        width = min(self.columns, len(self.panels)) * self.panels[0].width  # pyright: ignore[reportOperatorIssue]
        lines = textwrap.wrap(self.subtitle, max(50, round(width / 5.2)))
        whole["title"] = _printable({"text": self.title, "subtitle": lines, "fontSize": 15, "offset": 14, "limit": 0})
        whole["padding"] = 14
        return vl_convert.vegalite_to_png(whole, scale=2.0 if len(self.panels) <= 4 else 1.5, config=theme(colours))


def _plain(panel: Any) -> dict[str, Any]:
    """The specification alone: neither the theme that the user's Altair is set to nor its limit of rows."""
    with alt.data_transformers.enable("default", max_rows=None), alt.theme.enable("none"):
        found = panel.to_dict()
    found.pop("$schema")
    return _printable(found)


def _printable(value: Any) -> Any:
    """Replace the control characters in every string of a specification, at which the renderer would abort.

    Not by an escape: the renderer puts some strings into expressions, which would make the character of it again.
    """
    if isinstance(value, dict):
        return {_printable(key): _printable(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_printable(inner) for inner in value]
    return escape(value, lambda _: "\N{REPLACEMENT CHARACTER}") if isinstance(value, str) else value


def file_name(*parts: str) -> str:
    """Letters, digits and hyphens of some words, for the name of a file."""
    return re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-")[:60] or "chart"


def data(rows: Sequence[Mapping[str, Any]]) -> alt.InlineData:
    return alt.InlineData(values=[dict(row) for row in rows])
