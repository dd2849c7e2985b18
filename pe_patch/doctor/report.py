"""Lay out a diagnosis for a terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .finding import SEVERITIES, Diagnosis, Finding

COLOURS = {"error": "bold red", "warning": "bold yellow", "note": "bold cyan"}


def render(diagnosis: Diagnosis) -> Group:
    """Return each finding as a block, then the checks made, the numbers in effect and a summary."""
    blocks: list[RenderableType] = []
    for finding in diagnosis.findings:
        blocks += [_block(finding), Text()]
    return Group(*blocks, _details(diagnosis), Text(_summary(diagnosis), style="bold"))


def _block(finding: Finding) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    title = Text(f"{finding.code}  ", style="bold")
    title.append(finding.where, style="default")
    table.add_row(Text(finding.severity, style=COLOURS[finding.severity]), title)
    for name in ("claimed", "in_effect", "remedy"):
        table.add_row(f"  {name.replace('_', ' ')}", Text(getattr(finding, name)))
    return table


def _details(diagnosis: Diagnosis) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("checked", Text(", ".join(diagnosis.checked)))
    for layer_type, numbers in diagnosis.effective.items():
        waves = numbers["wavelengths_in_tokens"]
        span = f"; wavelengths {waves[0]:,g} to {waves[-1]:,.0f} tokens" if waves else ""
        table.add_row(
            "in effect" if layer_type == "all" else layer_type,
            Text(
                f"base {numbers['base']:.10g}, trained window {numbers['trained_window'] or 'unknown'}, "
                f"with scaling {numbers['scaled_window'] or 'unknown'}, window {numbers['window']}, "
                f"cos and sin times {numbers['attention_factor']:.4g}{span} ({numbers['dtype']})"
            ),
        )
    return table


def _summary(diagnosis: Diagnosis) -> str:
    name = f"{diagnosis.subject} ({diagnosis.family}, Transformers {diagnosis.transformers})"
    if not diagnosis.findings:
        return f"No fault found in {name}."
    counts = [(sum(f.severity == severity for f in diagnosis.findings), severity) for severity in SEVERITIES]
    totals = ", ".join(f"{count} {severity}{'s' if count > 1 else ''}" for count, severity in counts if count)
    return f"{totals} in {name}."
