"""Write the model card: what was trained, on which data, and the scores."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from ..evaluation.progress import duration
from ..evaluation.results import write_atomically
from . import curve
from .data import mix_table
from .libraries import OmegaConf
from .log import read_lines
from .recipe import Recipe

if TYPE_CHECKING:
    from .run import Run

VERSIONS = ("pe_patch", "torch", "transformers", "accelerate", "peft")
RECOVERED = 0.02
"""Relative tolerance within which a changed scheme counts as recovered to the original's loss."""

TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

{{ model }}{% if steps %}, trained{% endif %}{{ scheme }} by pe_patch.

```python
{{ loading }}
```

## Training

{{ trained }}

{% if steps %}![Loss by step, and held-out results](curve.png)
{% endif %}
{% if scores %}
## Scores

{{ scores }}

Each row says which text it was measured on; *native* is the longest sequence the original model was trained on. \
{{ recovery }}
{% endif %}
## Data

{{ data }}

## Recipe

```yaml
{{ recipe }}```

Run on {{ machine }} with {{ versions }}.
"""


def write(run: Run) -> None:
    """Write `README.md` and `curve.png` beside the trained model, from the run's log.

    A run writes them before the last evaluation and again after it.
    """
    from huggingface_hub import ModelCard, ModelCardData

    recipe, folder = run.recipe, run.output / "model"
    lines = read_lines(run.output / "log.jsonl")
    steps = [line for line in lines if line["event"] == "step"]
    rows = [line for line in lines if line["event"] == "evaluation"]
    if steps:
        write_atomically(folder / "curve.png", curve.picture(steps, rows))
    source = recipe.model.source
    name = "a small demonstration model" if source == "demo" else source or "A model with fresh weights"
    on_hub = source is not None and source.count("/") == 1 and not source.startswith((".", "/"))
    data = ModelCardData(
        base_model=source if on_hub else None, library_name="transformers", tags=["pe_patch", "long-context"]
    )
    card = ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        title=run.output.name,
        model=name[0].upper() + name[1:],
        scheme=_scheme(recipe),
        loading=_loading(run),
        steps=bool(steps),
        trained=_trained(run, steps) if steps else "None.",
        scores=_scores(rows, steps[-1]["step"] if steps else 0),
        recovery=_recovery(rows),
        data=_mix(run) if steps else "No training data.",
        recipe=OmegaConf.to_yaml(OmegaConf.structured(recipe)),
        machine=run.launch.describe(),
        versions=", ".join(f"{package} {version(package)}" for package in VERSIONS)
        + f" and Python {platform.python_version()}",
    )
    write_atomically(folder / "README.md", str(card))


def _scheme(recipe: Recipe) -> str:
    """Return the scheme with its options as the end of a sentence."""
    if recipe.scheme is None:
        return ""
    options = ", ".join(f"{key}: {value}" for key, value in recipe.scheme.options.items())
    return f" with the positional scheme `{recipe.scheme.name}`" + (f" ({options})" if options else "")


def _loading(run: Run) -> str:
    """Return the Python code that loads the saved model."""
    if run.recipe.lora is not None and not run.recipe.lora.merge:
        return (
            'from pe_patch import load_patched\n\nmodel = load_patched("path/to/this/folder")  # an adapter on its base'
        )
    if run.recipe.scheme is None:
        return 'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")'
    return 'from pe_patch import load_patched\n\nmodel = load_patched("path/to/this/folder")'


def _trained(run: Run, steps: list[dict[str, Any]]) -> str:
    """Return a sentence with steps, tokens, time and the last loss."""
    seconds = sum(step["seconds"] for step in steps)
    last = steps[-1]
    return (
        f"{last['step']:,} steps, {last['tokens']:,} tokens in {duration(seconds)} "
        f"({last['tokens'] / max(seconds, 1e-9):,.0f} tokens/s); the loss of the last step is {last['loss']:.3f} nats "
        "per token of the training mixture."
    )


def _mix(run: Run) -> str:
    """Return a Markdown table of the sources of each phase."""
    head = "| phase | part | text | documents | tokens | share of the sequences | tokens drawn | each seen |"
    rows = [
        f"| {number} | {row['source']} ({row['kind']}) | {row['text']} | {row['documents']:,} | {row['tokens']:,} | "
        f"{row['share']:g} | {row['drawn']:,} | {row['times_seen']:g} times |"
        for number in range(len(run.recipe.phases))
        for row in mix_table(run.data(number))
    ]
    return "\n".join(
        [
            head,
            "| ---: | --- | --- | ---: | ---: | ---: | ---: | ---: |",
            *rows,
            "",
            "```text",
            *run.data_notes(),
            "```",
        ]
    )


def _scores(rows: list[dict[str, Any]], last: int) -> str:
    """Return a Markdown table of the scores without the scheme, before step 1 and after step `last`."""
    kinds = list(dict.fromkeys((row["task"], row["measure"], row["length"], row["depth"]) for row in rows))
    if not kinds:
        return ""
    table = [
        "| task | measure | tokens | original | before | after | measured on |",
        "| --- | --- | ---: " + "| ---: " * 3 + "| --- |",
    ]
    for kind in kinds:
        of_kind = [row for row in rows if (row["task"], row["measure"], row["length"], row["depth"]) == kind]
        original = [row["score"] for row in of_kind if row["original"]]
        ours = [row for row in of_kind if not row["original"]]
        before = [row["score"] for row in ours if row["step"] == 0]
        after = [row["score"] for row in ours if row["step"] == last > 0]
        shown = " | ".join(f"{values[-1]:.3f}" if values else "-" for values in (original, before, after))
        depth = "" if kind[3] is None else f", depth {kind[3]:g}"
        measured = f"{of_kind[-1]['samples']} samples: {of_kind[-1]['measured_on']}"
        table.append(f"| {kind[0]} | {kind[1]}{depth} | {kind[2]:,} | {shown} | {measured} |")
    return "\n".join(table)


def _recovery(rows: list[dict[str, Any]]) -> str:
    """Return a sentence on the step at which the loss recovered to the original model's, or an empty string."""
    originals = [row for row in rows if row["original"] and row["measure"].startswith("nats")]
    if not originals:
        return ""
    first = min(originals, key=lambda row: row["length"])
    bound = first["score"] * (1 + RECOVERED)
    same = ("task", "measure", "length", "depth")
    ours = [row for row in rows if not row["original"] and all(row[key] == first[key] for key in same)]
    if not ours:
        return ""
    reached = next((row["step"] for row in ours if row["score"] <= bound), None)
    when = f"first at step {reached}" if reached is not None else f"never in {ours[-1]['step']} steps"
    return (
        f"Within {RECOVERED:.0%} of the original's loss at {first['length']:,} tokens ({first['score']:.3f}): {when}, "
        "among the measured steps."
    )
