"""Define `pe-patch inspect`."""

from __future__ import annotations

from .application import app
from .options import AsJson, Factor, Model, OnExisting, Options, SchemeName, TargetLength
from .output import echo, print_json


@app.command(
    epilog="\b\nExample:\n  pe-patch inspect meta-llama/Llama-3.1-8B --scheme yarn --factor 4 --on-existing replace"
)
def inspect(
    model: Model,
    scheme: SchemeName = None,
    factor: Factor = None,
    target_length: TargetLength = None,
    option: Options = None,
    on_existing: OnExisting = None,
    as_json: AsJson = False,
) -> None:
    """Show what a scheme would replace in a model. Reads only the model's config."""
    from ..checkpoints import sources
    from ..patching.description import describe

    empty = sources.empty_model(model)
    sources.apply(empty, scheme, factor, option, on_existing, target_length)
    description = describe(empty)
    if as_json:
        print_json(description.to_dict())
    else:
        echo(str(description))
