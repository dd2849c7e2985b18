"""Advice as a page for people: the verdict, then tables."""

from __future__ import annotations

import io
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from ..schemes.bias import alibi_slopes
from .advise import Advice
from .frequencies import Pair
from .verdict import billions, short, written

ROWS = 9
"""Of the table of frequencies."""
STATES = {
    "mixed": "all weights, float32 under bfloat16 autocast",
    "bfloat16": "all weights, bfloat16 with float32 moments",
    "adapters": "adapters of rank 8, embeddings, norms",
}


def page(advice: Advice, width: int = 120) -> str:
    """The page as plain text."""
    console = Console(file=io.StringIO(), width=width, markup=False, highlight=False, force_terminal=False)
    console.print(renderable(advice))
    file = console.file
    assert isinstance(file, io.StringIO)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def renderable(advice: Advice) -> RenderableType:
    """The page for a console."""
    return Group(*_sections(advice))


def _sections(advice: Advice) -> Iterator[RenderableType]:
    yield Text(advice.verdict, style="bold")
    for note in advice.notes:
        yield Padding(Text(f"- {note}"), (0, 0, 0, 1))
    yield from _section("The model as it is", _model(advice))
    if advice.pairs and advice.case.needed:
        yield from _section("Frequencies", _frequencies(advice))
    if advice.case.facts.positions == "alibi":
        yield from _section("Slopes", _slopes(advice))
    if advice.schemes:
        yield from _section("Schemes", _schemes(advice))
    if advice.plans:
        yield from _section("How the papers trained", _plans(advice))
    yield from _section(f"Memory at {advice.case.target:,} tokens", _memory(advice))
    if advice.steps:
        yield from _section("Next", _steps(advice))


def _section(title: str, *content: RenderableType) -> Iterator[RenderableType]:
    yield Text()
    yield Rule(title, align="left", style="dim")
    yield from content


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


def _model(advice: Advice) -> Table:
    facts, shape, parameters = advice.case.facts, advice.case.facts.shape, advice.case.facts.parameters
    weights = f"{parameters.total:,} weights"
    if parameters.active != parameters.total:
        weights += f", {parameters.active:,} of them active for a token"
    embeddings = f"{parameters.embedding:,} of them embeddings{', tied to the output' if parameters.tied else ''}"
    heads = f"{shape.num_heads} query heads and {shape.num_key_value_heads} for keys and values, of {shape.head_dim}"
    if shape.latent_rank:
        heads = f"{shape.num_heads} heads over a latent of {shape.latent_rank} numbers that is cached in their place"
    window = f"trained for {facts.window:,} tokens"
    window += f" ({facts.trained.scaled_source or facts.trained.source})"
    if facts.config_window and facts.config_window != facts.window:
        window += f"; the config says {facts.config_window:,}"
    rows = [
        ("family", f"{facts.family}, {facts.dtype}"),
        ("size", f"{weights}, {embeddings}"),
        ("layers", f"{shape.num_layers} of width {shape.hidden_size:,}, {heads}"),
        ("window", window),
        ("positions", _positions(advice)),
        ("sliding", _sliding(advice)),
    ]
    return _grid([row for row in rows if row[1]])


def _positions(advice: Advice) -> str:
    facts, shape = advice.case.facts, advice.case.facts.shape
    if facts.positions == "alibi":
        slopes = alibi_slopes(shape.num_heads)
        return f"ALiBi, slopes {max(slopes):.4g} to {min(slopes):.4g}"
    if facts.positions == "learned":
        return "learned, one vector for each position"
    told = f"rotary, {shape.rotary_dim // 2} pairs a head, base {shape.rope_theta:g}"
    if not facts.scaling:
        return f"{told}, unscaled"
    named = {key: value for key, value in facts.scaling.items() if key not in ("rope_type", "rope_theta")}
    return f"{told}, {facts.scaling['rope_type']} " + ", ".join(f"{key}={short(value)}" for key, value in named.items())


def _sliding(advice: Advice) -> str:
    facts = advice.case.facts
    return ", ".join(
        f"{count} of {len(facts.cache)} layers over {size:,} tokens" for size, count in facts.sliding.items()
    )


def _frequencies(advice: Advice) -> Table:
    case, chosen = advice.case, advice.choice.trained or advice.choice.untrained
    under = (chosen.effective.get("wavelengths_in_tokens") if chosen else None) or []
    moved = bool(under) and any(
        abs(new / pair.wavelength - 1) > 1e-3 for new, pair in zip(under, advice.pairs, strict=True)
    )
    columns = ["pair", "wavelength", f"turns in {case.facts.window:,}", f"turns in {case.target:,}", "at the target"]
    if moved and chosen:
        columns.append(f"wavelength under {written(chosen)}")
    table = _table(*columns, right=[*columns[:4], *columns[5:]])
    for pair in _sample(advice.pairs):
        new = [f"{under[pair.index]:,.0f}"] if moved else []
        said = f"{pair.unseen_degrees:.0f} degrees of the circle unseen" if pair.leaves else "all angles seen"
        wavelength = f"{pair.wavelength:,.1f}" if pair.wavelength < 100 else f"{pair.wavelength:,.0f}"
        table.add_row(str(pair.index), wavelength, _turns(pair.turns_trained), _turns(pair.turns_target), said, *new)
    return table


def _turns(turns: float) -> str:
    return f"{turns:,.0f}" if turns >= 100 else f"{turns:.3g}"


def _sample(pairs: Sequence[Pair]) -> list[Pair]:
    """Some pairs from the fastest to the slowest, those on both sides of the trained range among them."""
    first = next((pair.index for pair in pairs if pair.leaves), len(pairs))
    even = {round(step * (len(pairs) - 1) / (ROWS - 3)) for step in range(ROWS - 2)}
    return [pair for pair in pairs if pair.index in even | {first - 1, first}]


def _slopes(advice: Advice) -> Table:
    case, slopes = advice.case, alibi_slopes(advice.case.facts.shape.num_heads)
    window, target = case.facts.window, case.target
    table = _table("head", "slope", f"taken off at {window:,}", f"taken off at {target:,}", "a weight halves every")
    for head in sorted({0, len(slopes) // 4, len(slopes) // 2, 3 * len(slopes) // 4, len(slopes) - 1}):
        slope = slopes[head]
        halves = f"{0.6931471805599453 / slope:,.1f} tokens"
        table.add_row(str(head), f"{slope:.4g}", f"{slope * window:,.4g}", f"{slope * target:,.4g}", halves)
    return table


def _schemes(advice: Advice) -> RenderableType:
    table = _table("scheme", "untrained", "trained", "exports", "why")
    table.columns[0].min_width = 24
    marked = (advice.choice.untrained, advice.choice.trained)
    unfit = []
    for one in advice.schemes:
        if one.obstacle is not None:
            unfit.append((one.scheme, f"{one.obstacle}"))
            continue
        label = Text(written(one), style="bold" if any(one is chosen for chosen in marked) else "")
        for option in ("on_existing", "original_max_position_embeddings"):
            if option in one.options:
                label.append(f"\n{option}={one.options[option]}", style="dim")
        table.add_row(label, one.untrained, one.trained, "yes" if one.exports else "no", Text(one.why))
    parts: list[RenderableType] = [table]
    if unfit:
        parts += [Text("\nThese do not fit:"), Padding(_grid(unfit), (0, 0, 0, 1))]
    parts.append(Text("\nexports: plain Transformers loads the result without pe_patch.", style="dim"))
    parts.append(Text(f"With these a model is trained from the start: {', '.join(advice.from_the_start)}."))
    return Group(*parts)


def _plans(advice: Advice) -> Table:
    table = _table("scheme", "tokens here", "FLOP", "a step", "settings", "paper", right=["tokens here", "FLOP"])
    for plan in advice.plans:
        recipe = plan.recipe
        settings = [f"learning rate {recipe.learning_rate:g}"]
        settings += [f"{recipe.steps:,} steps"] if recipe.steps else []
        settings += [recipe.schedule] if recipe.schedule else []
        settings += [f"{recipe.warmup} of warm-up"] if recipe.warmup else []
        settings += [f"betas {recipe.betas[0]:g} {recipe.betas[1]:g}"] if recipe.betas else []
        settings += [f"decay {recipe.weight_decay:g}"] if recipe.weight_decay is not None else []
        table.add_row(
            ", ".join(recipe.schemes), billions(plan.tokens), f"{plan.flops:.1e}",
            f"{recipe.sequences} x {plan.length:,}", ", ".join(settings),
            f"{recipe.paper}. {recipe.ran}; {recipe.note}.",
        )  # fmt: skip
    return table


def _memory(advice: Advice) -> RenderableType:
    inference, training, facts = advice.inference, advice.training, advice.case.facts
    sequences = "one sequence" if inference.batch == 1 else f"{inference.batch} sequences"
    cache = f"{inference.cache_per_token:,} bytes a token"
    if inference.cache != inference.cache_full:
        cache += f"; {gigabytes(inference.cache_full)} if no layer slid"
    rows = [
        ("weights", gigabytes(inference.weights), facts.dtype),
        (f"cache, {sequences}", gigabytes(inference.cache), cache),
        ("activations", gigabytes(inference.activations), "estimate: the widest layer, the prompt in one pass"),
        ("in all, to generate", gigabytes(inference.generating), ""),
    ]
    if inference.scores:
        rows.insert(3, ("scores", gigabytes(inference.scores), "its own attention only, which a patch replaces"))
    rows.append(
        ("logits of every token", gigabytes(inference.logits), "float32, to score a text; generating needs one row")
    )
    reading = _figures("Reading", rows)
    rows = [(STATES[key], gigabytes(size), _devices(training.devices[key])) for key, size in training.states.items()]
    rows += [
        ("activations, one sequence", gigabytes(training.activations), "estimate, every layer recomputed"),
        ("logits and their gradient", gigabytes(training.logits), "float32, all at once"),
        ("the same in chunks of 2048", gigabytes(training.chunked_logits), "what the devices are counted with"),
    ]
    return Group(reading, Text(), _figures("Training, with AdamW", rows))


def _figures(title: str, rows: Sequence[tuple[str, str, str]]) -> Table:
    table = _table(title, "bytes", "", right=["bytes"])
    table.columns[0].min_width = 46
    for row in rows:
        table.add_row(*row)
    return table


def _devices(count: int | None) -> str:
    if count is None:
        return "one sequence is too long for a device of 80 GB: split the sequence"
    return f"{count} device{'s' if count > 1 else ''} of 80 GB or more, states shared, a sequence each"


def gigabytes(count: int) -> str:
    """Bytes in units of 10^9, or of 10^6 below one of these."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def _steps(advice: Advice) -> RenderableType:
    parts: list[Any] = []
    for number, step in enumerate(advice.steps, 1):
        parts.append(Text(f"{number}. {step.purpose}{':' if step.command or step.block else '.'}"))
        if step.block:
            parts.append(Padding(Text(step.block), (0, 0, 0, 3)))
        if step.command:
            parts.append(
                Text(_folded(step.command), style="cyan")
            )  # no padding: a shell wants nothing after a backslash
    return Group(*parts)


def _folded(command: str, width: int = 100, indent: str = "   ") -> str:
    """A command over several lines, as a shell reads it; a flag stays with its values."""
    parts: list[str] = []
    for word in shlex.split(command):
        if parts and parts[-1].startswith("--") and not word.startswith("--"):
            parts[-1] += f" {shlex.quote(word)}"
        else:
            parts.append(shlex.quote(word))
    lines = [indent]
    for part in parts:
        if lines[-1].strip() and len(lines[-1]) + len(part) >= width:
            lines[-1] += " \\"
            lines.append(2 * indent)
        lines[-1] += part if not lines[-1].strip() else f" {part}"
    return "\n".join(lines)
