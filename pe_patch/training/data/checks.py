"""Check the tokens against the model, and the text against the one that a run started with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...evaluation.results import write_atomically
from ...evaluation.retrieval import TOKEN_KEYS, wording_for
from ..recipe import Recipe, RecipeError
from .store import Corpora, tokenizer_hash

RECORD = "data.json"
"""File in the output folder with the hashes of the text that a run started with."""
NAMES = 5
"""Number of names that an error lists."""


def check_ids(corpora: Corpora, recipe: Recipe, tokenizer: Any, model: Any) -> None:
    """Raise `RecipeError` if a token of the training text, or of hidden facts, has no row in the model's embedding."""
    largest = {corpus.name: corpus.largest_id for corpus in corpora.values()}
    kinds = [source.kind for phase in recipe.phases for source in phase.mixture.values()]
    if "needles" in kinds and wording_for(tokenizer).name == "tokens":
        names = [f"<{kind}{index}>" for kind in "kv" for index in range(TOKEN_KEYS)]
        largest["the hidden facts (tokenizer.retrieval_tokens)"] = max(tokenizer.convert_tokens_to_ids(names))
    refuse_ids(largest, tokenizer, model)


def refuse_ids(largest: Mapping[str, int], tokenizer: Any, model: Any) -> None:
    """Raise `RecipeError` if the largest token id of a text, given by name, has no row in the model's embedding."""
    table = model.get_input_embeddings()
    size = getattr(table, "num_embeddings", None) or table.weight.shape[0]
    for name, number in largest.items():
        if number >= size:
            raise RecipeError(
                f"The token {tokenizer.convert_ids_to_tokens(number)!r} in {name} has the id {number:,}, but the "
                f"model's embedding has {size:,} rows (ids 0 to {size - 1:,}). Enlarge the model with "
                f"model.resize_token_embeddings({len(tokenizer)}), save it and give it as model.source, or use a "
                "tokenizer without this token."
            )


def data_notes(corpora: Corpora, recipe: Recipe, tokenizer: Any) -> list[str]:
    """Return sentences on how rows begin, what was skipped, and control tokens in the text."""
    unique = list({id(corpus): corpus for corpus in corpora.values()}.values())
    start = next((list(corpus.start) for corpus in unique if len(corpus.start)), [])
    if start:
        begin = f"Every row begins with {''.join(map(str, tokenizer.convert_ids_to_tokens(start)))}"
        begin += ", as the tokenizer begins a text (data.bos)."
    else:
        begin = "Rows begin without a start token: " + (
            "the tokenizer adds none." if recipe.data.bos else "data.bos is false."
        )
    return [begin, *(note for corpus in unique for note in corpus.notes())] if unique else []


def check_unchanged(corpora: Corpora, recipe: Recipe, tokenizer: Any, checkpoint: Path | None, *, write: bool) -> None:
    """Record the text of a new run in its output folder, or compare it on resuming.

    Args:
        corpora: the tokenised text of the run.
        recipe: the recipe of the run.
        tokenizer: the tokenizer of the run.
        checkpoint: the checkpoint to resume from, or None to record.
        write: write the record of a new run; only one process may.

    Raises:
        RecipeError: the text or the tokenizer changed, and the recipe does not accept it.
    """
    now: dict[str, Any] = {"tokenizer": tokenizer_hash(tokenizer)}
    now["sources"] = {corpus.name: corpus.files for corpus in corpora.values()}
    path = (Path(recipe.output) if checkpoint is None else checkpoint.parent.parent) / RECORD
    if checkpoint is not None and path.is_file():
        changes = _changes(json.loads(path.read_text(encoding="utf-8")), now)
        if changes and not recipe.accept_changed_data:
            raise RecipeError(
                f"The training data has changed since the run of {checkpoint} began: {'; '.join(changes)}. Restore "
                "it, start a new run in another output, or set accept_changed_data=true to continue with the new data."
            )
        if not changes:
            return
    if write:
        path = Path(recipe.output) / RECORD
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(now, indent=1))


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return what differs between two records, in words."""
    changes = [] if before["tokenizer"] == now["tokenizer"] else ["the tokenizer differs"]
    for source in sorted(before["sources"].keys() | now["sources"].keys()):
        old, new = before["sources"].get(source), now["sources"].get(source)
        if old is None or new is None:
            changes.append(f"the source {source} was {'added' if old is None else 'removed'}")
            continue
        kinds = {
            "edited": [name for name in old if name in new and old[name] != new[name]],
            "deleted": [name for name in old if name not in new],
            "added": [name for name in new if name not in old],
        }
        found = [f"{kind} {_listed(names)}" for kind, names in kinds.items() if names]
        if found:
            changes.append(f"{source}: {', '.join(found)}")
    return changes


def _listed(names: list[str]) -> str:
    rest = len(names) - NAMES
    return ", ".join(names[:NAMES]) + (f" and {rest:,} more" if rest > 0 else "")
