"""The pictures: loss against length, retrieval by length and depth, wavelengths, and both against the cache."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from pe_patch.evaluation.results import Results
from pe_patch.evaluation.tables import pivots

Colours = Mapping[str, Any]

# Okabe and Ito's colours, which colour-blind readers can tell apart; the first is for the untouched model.
_SERIES = ("#8a8f98", "#e69f00", "#56b4e9", "#cc79a7", "#009e73", "#d55e00")
LIGHT: Colours = {
    "paper": "#ffffff",
    "ink": "#1f2328",
    "faint": "#d5d9de",
    "muted": "#656d76",
    "series": (*_SERIES, "#0072b2", "#000000"),
}
DARK: Colours = {
    "paper": "#16191d",
    "ink": "#e6e9ed",
    "faint": "#363c44",
    "muted": "#9aa3ad",
    "series": (*_SERIES, "#f0e442", "#ffffff"),
}
MARKERS = "osD^vPX*"


@contextmanager
def _figure(rows: int, columns: int, size: tuple[float, float], colours: Colours) -> Iterator[Any]:
    """A figure in the given colours, closed afterwards; drawn off screen whatever the user's backend is."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "font.size": 10,
        "text.color": colours["ink"],
        "axes.labelcolor": colours["ink"],
        "axes.edgecolor": colours["muted"],
        "xtick.color": colours["muted"],
        "ytick.color": colours["muted"],
        "xtick.labelcolor": colours["ink"],
        "ytick.labelcolor": colours["ink"],
        "grid.color": colours["faint"],
        "legend.frameon": False,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, dpi=130, facecolor=colours["paper"], layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, columns, squeeze=False)
        for axis in axes.flat:
            axis.set_facecolor(colours["paper"])
            axis.spines[["top", "right"]].set_visible(False)
        yield figure, axes


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=figure.get_facecolor())
    return buffer.getvalue()


def _style(results: Results, scheme: str, colours: Colours) -> dict[str, Any]:
    """The same colour and marker for a scheme in every picture of one set of results."""
    known = results.values("scheme")
    index = known.index(scheme) if scheme in known else len(known)
    return {
        "color": colours["series"][index % len(colours["series"])],
        "marker": MARKERS[index % len(MARKERS)],
        "markersize": 5,
    }


def _lengths_axis(axis: Any, lengths: Sequence[int], window: int | None, colours: Colours) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(list(lengths), [f"{length:,}" for length in lengths])
    axis.minorticks_off()
    axis.set_xlabel("tokens given to the model")
    if window and lengths[0] <= window <= lengths[-1]:
        axis.axvline(window, color=colours["muted"], linestyle=":", linewidth=1.2)
        axis.annotate(
            f" trained window {window:,}",
            (window, 1.0),
            xycoords=("data", "axes fraction"),
            va="bottom",
            fontsize=8.5,
            color=colours["muted"],
        )


def loss_chart(results: Results, colours: Colours = LIGHT) -> bytes | None:
    """Loss on the same targets against length, one line per scheme, as PNG; None where no loss was measured."""
    found = next((pivot for pivot in pivots(results) if "fixed targets" in pivot.measure), None)
    if found is None:
        return None
    with _figure(1, 1, (7.4, 4.4), colours) as (figure, axes):
        axis = axes[0, 0]
        for scheme, cells in found.cells.items():
            points = [(n, cell) for n, cell in zip(found.lengths, cells, strict=True) if cell is not None]
            style = _style(results, scheme, colours)
            axis.plot([n for n, _ in points], [cell.score for _, cell in points], label=scheme, **style)
        _lengths_axis(axis, found.lengths, results.config.get("native_window"), colours)
        axis.set_ylabel("loss on the same tokens (nats per token)")
        axis.grid(axis="y", linewidth=0.7)
        figure.legend(loc="outside lower center", ncols=min(4, len(found.cells)))
        return _png(figure)


def retrieval_chart(results: Results, colours: Colours = LIGHT) -> bytes | None:
    """A length x depth heat map of answers for each scheme, as PNG; None where nothing was retrieved."""
    rows = [row for row in results.rows if row.depth is not None]
    if not rows:
        return None
    task = rows[-1].task
    rows = [row for row in rows if row.task == task]
    schemes = list(dict.fromkeys(row.scheme for row in rows))
    lengths, depths = sorted({row.length for row in rows}), sorted({row.depth for row in rows if row.depth is not None})
    columns = min(4, len(schemes))
    lines = -(-len(schemes) // columns)
    with _figure(lines, columns, (2.1 * columns + 1.2, 2.3 * lines + 0.5), colours) as (figure, axes):
        image = None
        for axis, scheme in zip(axes.flat, schemes, strict=False):
            grid = np.full((len(depths), len(lengths)), np.nan)
            for row in rows:
                if row.scheme == scheme and row.depth is not None:
                    grid[depths.index(row.depth), lengths.index(row.length)] = row.score
            image = _heat_map(axis, grid, colours)
            axis.set_title(scheme, fontsize=10)
            axis.set_xticks(range(len(lengths)), [_short(length) for length in lengths])
            axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        for axis in list(axes.flat)[len(schemes) :]:
            axis.set_visible(False)
        figure.supxlabel("tokens given to the model", fontsize=10)
        figure.supylabel("where the answer stands (0% = start)", fontsize=10)
        bar = figure.colorbar(image, ax=list(axes.flat), shrink=0.8, pad=0.02)
        bar.set_label(f"{task}: share answered exactly")
        bar.outline.set_visible(False)
        return _png(figure)


def _short(length: int) -> str:
    return f"{length // 1024}k" if length >= 1024 and length % 1024 == 0 else str(length)


def _heat_map(axis: Any, grid: np.ndarray, colours: Colours) -> Any:
    import matplotlib

    # not the white-to-black ends: empty and full must both stand out from light and dark paper
    colour_map = matplotlib.colormaps["cividis"].with_extremes(bad=colours["faint"])
    image = axis.imshow(grid, vmin=0, vmax=1, cmap=colour_map, aspect="auto")
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    for (line, column), value in np.ndenumerate(grid):
        if np.isfinite(value):
            ink = "#101418" if value > 0.55 else "#f4f6f8"
            axis.text(column, line, f"{value:.2f}", ha="center", va="center", fontsize=8, color=ink)
    return image


def wavelength_chart(results: Results, frequencies: Mapping[str, np.ndarray], colours: Colours = LIGHT) -> bytes | None:
    """Each scheme's wavelengths (tokens per turn) by pair of dimensions, against the windows; None without any."""
    if not frequencies:
        return None
    lengths = results.values("length")
    windows = {"trained window": results.config.get("native_window") or min(lengths), "greatest length": max(lengths)}
    with _figure(1, 1, (7.4, 4.4), colours) as (figure, axes):
        axis = axes[0, 0]
        for scheme, inverse in frequencies.items():
            wavelengths = 2 * np.pi / np.asarray(inverse, dtype=np.float64)
            axis.plot(wavelengths, label=scheme, linewidth=1.3, **_style(results, scheme, colours) | {"markersize": 4})
        axis.set_yscale("log")
        pairs = max(len(inverse) for inverse in frequencies.values())
        for name, window in windows.items():
            axis.axhline(window, color=colours["muted"], linestyle=":", linewidth=1.2)
            # at the right end, where every curve is far above the windows
            text = f"{name} {window:,}"
            axis.annotate(text, (pairs - 1, window), ha="right", va="bottom", fontsize=8.5, color=colours["muted"])
        axis.set_xlabel(f"pair of rotated dimensions (of {pairs}), fastest first")
        axis.set_ylabel("wavelength (tokens per turn)")
        axis.grid(axis="y", linewidth=0.7)
        figure.legend(loc="outside lower center", ncols=min(4, len(frequencies)))
        return _png(figure)


@dataclass(frozen=True)
class CacheLine:
    """One way to a smaller cache, over several sizes: rows with bytes, a loss and a share of answers each."""

    name: str
    rows: Sequence[Mapping[str, Any]]
    colour: int
    """Number of the colour and the marker."""
    dashed: bool = False


def cache_chart(lines: Sequence[CacheLine], original: Mapping[str, Any], title: str, colours: Colours = LIGHT) -> bytes:
    """Loss and retrieval against what a token leaves in the cache, as PNG; the original is a horizontal line."""
    shown = {
        "loss": "loss on held-out text (nats per token)",
        "retrieval": f"questions answered exactly (of {original['questions']})",
    }
    sizes = sorted({row["cached_bytes_per_token"] for line in lines for row in line.rows})
    whole = original["cached_bytes_per_token"]
    with _figure(1, 2, (10.6, 5.0), colours) as (figure, axes):
        for axis, (measure, label) in zip(axes.flat, shown.items(), strict=True):
            ink = {"color": colours["ink"], "linestyle": ":", "linewidth": 1.5}
            axis.axhline(original[measure], label=f"original, {whole:,} bytes", **ink)
            for line in lines:
                points = sorted((row["cached_bytes_per_token"], row[measure]) for row in line.rows)
                colour = colours["series"][1 + line.colour % (len(colours["series"]) - 1)]
                axis.plot(
                    [size for size, _ in points], [value for _, value in points], label=line.name, color=colour,
                    marker=MARKERS[line.colour % len(MARKERS)], markersize=6,
                    linestyle="--" if line.dashed else "-", alpha=0.65 if line.dashed else 1.0,
                )  # fmt: skip
            axis.set_xscale("log", base=2)
            axis.set_xticks(sizes, [f"{size:,}\n{size / whole:.2%}".replace(".00%", "%") for size in sizes])
            axis.minorticks_off()
            axis.set_xlabel("cache: bytes per token in all layers, and share of the original")
            axis.set_ylabel(label)
            axis.grid(axis="y", linewidth=0.7)
        axes[0, 1].set_ylim(-0.03, 1.04)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(5, (len(labels) + 1) // 2 + 1))
        figure.suptitle(title, fontsize=10)
        return _png(figure)
