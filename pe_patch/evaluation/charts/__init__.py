"""The charts of a report as Vega-Lite specifications, one file per chart."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..results import Results
from .cache import CacheLine, cache_chart
from .chart import Chart
from .depth import depth_charts
from .dots import dots
from .loss import loss_chart
from .positions import position_chart
from .retrieval import retrieval_chart
from .tasks import task_chart
from .theme import DARK, LIGHT, Colours, theme
from .wavelengths import wavelength_chart

__all__ = ["DARK", "LIGHT", "CacheLine", "Chart", "Colours", "cache_chart", "charts_of", "dots", "theme"]


def charts_of(results: Results, frequencies: Mapping[str, np.ndarray] | None = None) -> list[Chart]:
    """Return every chart that the results have data for, in reading order.

    Args:
        results: Results of an evaluation.
        frequencies: Inverse frequencies [pairs] by scheme name, for the chart of wavelengths.
    """
    charts = [
        task_chart(results),
        retrieval_chart(results),
        *depth_charts(results),
        loss_chart(results),
        position_chart(results),
        wavelength_chart(results, frequencies or {}),
    ]
    return [chart for chart in charts if chart is not None]
