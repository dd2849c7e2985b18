"""Lay out the parts of an advice as text and tables for Rich."""

from __future__ import annotations

import io
import shlex
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from ..schemes.bias import alibi_slopes
from .case import Case
from .commands import Step
from .frequencies import Pair
from .memory import Inference, Training
from .model_facts import ModelFacts
from .recommend import SERVING, Choice, Judgement
from .training import TrainingPlan
from .verdict import billions, format_scheme, format_value

ROWS = 9
"""The largest number of rows in the frequency table."""
STATE_LABELS = {
    "mixed": "all weights, float32 under bfloat16 autocast",
    "bfloat16": "all weights, bfloat16 with float32 moments",
    "adapters": "adapters of rank 8, embeddings, norms",
}


def plain_text(content: RenderableType, width: int = 120) -> str:
    """Return a Rich renderable as plain text."""
    console = Console(file=io.StringIO(), width=width, markup=False, highlight=False, force_terminal=False)
    console.print(content)
    file = console.file
    assert isinstance(file, io.StringIO)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def opening(verdict: str, notes: Sequence[str]) -> Group:
    """Lay out the verdict and the notes."""
    return Group(Text(verdict, style="bold"), *(Padding(Text(f"- {note}"), (0, 0, 0, 1)) for note in notes))


def section(title: str, content: RenderableType) -> Group:
    """Put a title line above a part of the page."""
    return Group(Text(), Rule(title, align="left", style="dim"), content)


def _grid(rows: Sequence[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text(value))
    return table


def _table(*columns: str, right: Sequence[str] = ()) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


def model_table(facts: ModelFacts) -> Table:
    """Lay out the facts about the unpatched model."""
    shape, parameters = facts.shape, facts.parameters
    weights = f"{parameters.total:,} weights"
    if parameters.active != parameters.total:
        weights += f", {parameters.active:,} active per token"
    embeddings = f"{parameters.embedding:,} in embeddings{', tied to the output' if parameters.tied else ''}"
    heads = f"{shape.num_heads} query heads and {shape.num_key_value_heads} key-value heads of {shape.head_dim}"
    if shape.latent_rank:
        heads = f"{shape.num_heads} heads with a cached latent of {shape.latent_rank} numbers"
    window = f"trained for {facts.window:,} tokens"
    window += f" ({facts.trained.scaled_source or facts.trained.source})"
    if facts.config_window and facts.config_window != facts.window:
        window += f"; the config says {facts.config_window:,}"
    rows = [
        ("family", f"{facts.family}, {facts.dtype}"),
        ("size", f"{weights}, {embeddings}"),
        ("layers", f"{shape.num_layers} of width {shape.hidden_size:,}, {heads}"),
        ("window", window),
        ("positions", _positions(facts)),
        ("sliding", _sliding(facts)),
    ]
    return _grid([row for row in rows if row[1]])


def _positions(facts: ModelFacts) -> str:
    shape = facts.shape
    if facts.positions == "alibi":
        slopes = alibi_slopes(shape.num_heads)
        return f"ALiBi, slopes {max(slopes):.4g} to {min(slopes):.4g}"
    if facts.positions == "learned":
        return "learned, one vector per position"
    rotation = f"rotary, {shape.rotary_dim // 2} pairs per head, base {shape.rope_theta:g}"
    if not facts.scaling:
        return f"{rotation}, unscaled"
    options = ", ".join(
        f"{key}={format_value(value)}" for key, value in facts.scaling.items() if key not in ("rope_type", "rope_theta")
    )
    return f"{rotation}, {facts.scaling['rope_type']} {options}"


def _sliding(facts: ModelFacts) -> str:
    return ", ".join(
        f"{count} of {len(facts.cache)} layers over {size:,} tokens" for size, count in facts.sliding.items()
    )


def frequency_table(case: Case, pairs: Sequence[Pair], chosen: Judgement | None) -> Table:
    """Lay out a sample of the rotating pairs, with their wavelengths under the chosen scheme if they change."""
    patched = (chosen.effective.get("wavelengths_in_tokens") if chosen else None) or []
    changed = bool(patched) and any(
        abs(new / pair.wavelength - 1) > 1e-3 for new, pair in zip(patched, pairs, strict=True)
    )
    columns = ["pair", "wavelength", f"turns in {case.facts.window:,}", f"turns in {case.target:,}", "at the target"]
    if changed and chosen:
        columns.append(f"wavelength under {format_scheme(chosen)}")
    table = _table(*columns, right=[*columns[:4], *columns[5:]])
    for pair in _sample(pairs):
        new = [f"{patched[pair.index]:,.0f}"] if changed else []
        angles = f"{pair.unseen_degrees:.0f} degrees of the circle unseen" if pair.leaves else "all angles seen"
        wavelength = f"{pair.wavelength:,.1f}" if pair.wavelength < 100 else f"{pair.wavelength:,.0f}"
        table.add_row(str(pair.index), wavelength, _turns(pair.turns_trained), _turns(pair.turns_target), angles, *new)
    return table


def _turns(turns: float) -> str:
    return f"{turns:,.0f}" if turns >= 100 else f"{turns:.3g}"


def _sample(pairs: Sequence[Pair]) -> list[Pair]:
    """Return evenly spaced pairs, and the two around the first pair that reaches unseen angles."""
    first = next((pair.index for pair in pairs if pair.leaves), len(pairs))
    even = {round(step * (len(pairs) - 1) / (ROWS - 3)) for step in range(ROWS - 2)}
    return [pair for pair in pairs if pair.index in even | {first - 1, first}]


def slope_table(case: Case) -> Table:
    """Lay out the ALiBi slopes of a sample of heads."""
    slopes = alibi_slopes(case.facts.shape.num_heads)
    window, target = case.facts.window, case.target
    table = _table("head", "slope", f"bias at {window:,}", f"bias at {target:,}", "weight halves every")
    for head in sorted({0, len(slopes) // 4, len(slopes) // 2, 3 * len(slopes) // 4, len(slopes) - 1}):
        slope = slopes[head]
        halves = f"{0.6931471805599453 / slope:,.1f} tokens"
        table.add_row(str(head), f"{slope:.4g}", f"-{slope * window:,.4g}", f"-{slope * target:,.4g}", halves)
    return table


def scheme_table(schemes: Sequence[Judgement], choice: Choice, from_the_start: Sequence[str]) -> RenderableType:
    """Lay out the schemes that fit, then those that do not with the reason."""
    table = _table("scheme", "untrained", "trained", "exports", "why")
    table.columns[0].min_width = 24
    chosen = (choice.untrained, choice.trained)
    obstacles = []
    for judgement in schemes:
        if judgement.obstacle is not None:
            obstacles.append((judgement.scheme, judgement.obstacle))
            continue
        bold = any(judgement is recommended for recommended in chosen)
        label = Text(format_scheme(judgement), style="bold" if bold else "")
        for option in ("on_existing", "original_max_position_embeddings"):
            if option in judgement.options:
                label.append(f"\n{option}={judgement.options[option]}", style="dim")
        exports = "all" if len(judgement.exports) == len(SERVING) else ", ".join(judgement.exports) or "no"
        table.add_row(label, judgement.untrained, judgement.trained, exports, Text(judgement.why))
    blocks: list[RenderableType] = [table]
    if obstacles:
        blocks += [Text("\nThese do not fit:"), Padding(_grid(obstacles), (0, 0, 0, 1))]
    legend = (
        "\nuntrained, trained: whether the scheme reads the target without training, and after it. weak: in part, or "
        f"less well than others.\nexports: what loads the result without pe_patch, of {', '.join(SERVING)}."
    )
    blocks.append(Text(legend, style="dim"))
    blocks.append(Text(f"These require training from scratch: {', '.join(from_the_start)}."))
    return Group(*blocks)


def plan_table(plans: Sequence[TrainingPlan]) -> Table:
    """Lay out the training settings of the papers, scaled to the target."""
    table = _table("scheme", "tokens here", "FLOP", "per step", "settings", "paper", right=["tokens here", "FLOP"])
    for plan in plans:
        recipe = plan.recipe
        settings = [f"learning rate {recipe.learning_rate:g}"]
        settings += [f"{recipe.steps:,} steps"] if recipe.steps else []
        settings += [recipe.schedule] if recipe.schedule else []
        settings += [f"{recipe.warmup} warmup steps"] if recipe.warmup else []
        settings += [f"betas {recipe.betas[0]:g} {recipe.betas[1]:g}"] if recipe.betas else []
        settings += [f"weight decay {recipe.weight_decay:g}"] if recipe.weight_decay is not None else []
        table.add_row(
            ", ".join(recipe.schemes), billions(plan.tokens), f"{plan.flops:.1e}",
            f"{recipe.sequences} x {plan.length:,}", ", ".join(settings),
            f"{recipe.paper}. {recipe.ran}; {recipe.note}.",
        )  # fmt: skip
    return table


def memory_tables(inference: Inference, training: Training, dtype: str) -> RenderableType:
    """Lay out the memory of inference and of training."""
    sequences = "one sequence" if inference.batch == 1 else f"{inference.batch} sequences"
    cache = f"{inference.cache_per_token:,} bytes per token"
    if inference.cache != inference.cache_full:
        cache += f"; {gigabytes(inference.cache_full)} without sliding windows"
    rows = [
        ("weights", gigabytes(inference.weights), dtype),
        (f"cache, {sequences}", gigabytes(inference.cache), cache),
        ("activations", gigabytes(inference.activations), "estimate: the widest layer, the prompt in one pass"),
        ("total to generate", gigabytes(inference.generating), ""),
    ]
    if inference.scores:
        rows.insert(3, ("scores", gigabytes(inference.scores), "native attention only; a patch avoids them"))
    rows.append(
        ("logits of every token", gigabytes(inference.logits), "float32, to score a text; generation needs one row")
    )
    inference_table = _figures("Inference", rows)
    rows = [
        (STATE_LABELS[key], gigabytes(size), _devices(training.devices[key], training.smallest[key]))
        for key, size in training.states.items()
    ]
    rows += [
        ("activations, one sequence", gigabytes(training.activations), "estimate, with every layer recomputed"),
        ("logits and their gradient", gigabytes(training.logits), "float32, of the whole sequence"),
        ("the same in chunks of 2048", gigabytes(training.chunked_logits), "used for the number of devices"),
    ]
    return Group(inference_table, Text(), _figures("Training, with AdamW", rows))


def _figures(title: str, rows: Sequence[tuple[str, str, str]]) -> Table:
    table = _table(title, "bytes", "", right=["bytes"])
    table.columns[0].min_width = 46
    for row in rows:
        table.add_row(*row)
    return table


def _devices(count: int | None, smallest: int | None) -> str:
    if smallest is not None:
        return f"one device of {smallest} GB, with one sequence"
    if count is None:
        return "one sequence exceeds an 80 GB device: shard the sequence"
    return f"{count} devices of 80 GB, with sharded states and one sequence each"


def gigabytes(count: int) -> str:
    """Return bytes as GB (10^9), or as MB (10^6) if below 1 GB."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def step_list(steps: Sequence[Step]) -> RenderableType:
    """Lay out the numbered steps with their commands."""
    blocks: list[RenderableType] = []
    for number, step in enumerate(steps, 1):
        blocks.append(Text(f"{number}. {step.purpose}{':' if step.command or step.block else '.'}"))
        if step.block:
            blocks.append(Padding(Text(step.block), (0, 0, 0, 3)))
        if step.command:
            # Padding would put spaces after a backslash, which a shell does not accept.
            blocks.append(Text(_folded(step.command), style="cyan"))
    return Group(*blocks)


def _folded(command: str, width: int = 100, indent: str = "   ") -> str:
    """Split a command over several lines with backslashes and keep each flag with its values."""
    groups: list[str] = []
    for word in shlex.split(command):
        if groups and groups[-1].startswith("--") and not word.startswith("--"):
            groups[-1] += f" {shlex.quote(word)}"
        else:
            groups.append(shlex.quote(word))
    lines = [indent]
    for group in groups:
        if lines[-1].strip() and len(lines[-1]) + len(group) >= width:
            lines[-1] += " \\"
            lines.append(2 * indent)
        lines[-1] += group if not lines[-1].strip() else f" {group}"
    return "\n".join(lines)
