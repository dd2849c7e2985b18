"""Every scheme for text on six families in ten situations: what the cells check, and the table of how they came out.

`python -m tests.matrix > docs/matrix.md` runs the cells and writes the table; with `--compile-all` each of them is also
compiled, twice.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from pe_patch import SCHEMES, PePatchError, load_patched, unpatch_model

from .models import (
    AUTO,
    BACKENDS,
    FAMILIES,
    GIVEN,
    LENGTH_DEPENDENT,
    MASK_ALONE,
    UNROTATED,
    build,
    cached_logits,
    error,
    logits,
    put,
    snapshot,
    tokens,
    unchanged,
)

OTHERS = ("qwen3", "mistral", "gpt2")
TOLERANCE = 1e-5
"""Relative to the largest logit, which is between 3 and 20 on these models."""
ROUNDING = {"sandwich": 3.0, "softmax_scaling": 3.0}
"""How much more is granted: sums of 64 cosines lose digits that no order of adding keeps. Eager in float32 is 3e-6 from
itself in float64, the waves on extra dimensions of the head 9e-6. A random scale of the softmax sharpens it."""
LENGTHS = (20, 48)
"""On both sides of the window of 32."""

REFUSED: dict[tuple[str, ...], str] = {
    ("mla", family): "'mla' converts attention that rotates .*, and this family does not" for family in UNROTATED
}
"""(scheme, family) or (scheme, family, situation) that raises, and a pattern of the reason that it gives."""


@dataclass
class Cell:
    """A scheme on a patched model of a family."""

    family: str
    name: str
    model: Any
    native: dict[str, Any] | None = None
    """A snapshot from before the patch."""
    whole: bool = False
    """Compile a full pass and a decoding step, rather than what falls to this cell."""

    def expected(self, function: Callable[..., Tensor], *args: Any, **inputs: Any) -> Tensor:
        """What eager attention makes of it, which is the specification."""
        with attention(self.model, "eager"):
            return function(self.model, *args, **inputs)

    def same(self, found: Tensor, expected: Tensor) -> None:
        assert error(found, expected) < TOLERANCE * ROUNDING.get(self.name, 1.0)


@contextmanager
def attention(model: Any, backend: str) -> Iterator[None]:
    model.set_attn_implementation(backend)
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")


def decodes(name: str) -> list[tuple[int, int]]:
    """(first pass, total) of decodings that stay in one regime."""
    if name in LENGTH_DEPENDENT:
        return [(27, 32)]
    if name in AUTO:
        return [(27, 32), (59, 64)]
    return [(29, 34)]


def positions_matter(cell: Cell) -> None:
    """Shuffled position ids move the logits by more than a hundred times the tolerance, and by nothing where they mean
    nothing. The mask of ones says that they are no packed documents."""
    for length in LENGTHS:
        ids = tokens(1, length)
        shuffled = torch.randperm(length, generator=torch.Generator().manual_seed(3))[None]
        plain, moved = (
            logits(cell.model, ids, attention_mask=torch.ones_like(ids), **inputs)
            for inputs in ({}, {"position_ids": shuffled})
        )
        found = error(moved, plain)
        assert found == 0 if cell.name in MASK_ALONE else found > 100 * TOLERANCE


def full(cell: Cell) -> None:
    """SDPA is eager."""
    positions_matter(cell)
    for length in LENGTHS:
        ids = tokens(2, length)
        cell.same(logits(cell.model, ids), cell.expected(logits, ids))


def cached(cell: Cell) -> None:
    """A first pass and single tokens are one pass."""
    for prefill, total in decodes(cell.name):
        ids = tokens(2, total)
        expected = cell.expected(logits, ids)
        for backend in BACKENDS:
            with attention(cell.model, backend):
                cell.same(cached_logits(cell.model, ids, prefill), expected)


def static(cell: Cell) -> None:
    """A static cache is a full pass; where the length decides and grows, it is a cache that grows."""
    runs = [(run, logits) for run in decodes(cell.name)]
    if cell.name in LENGTH_DEPENDENT or cell.name in AUTO:
        runs += [((29, 35), cached_logits), ((40, 42), cached_logits)]
    for (prefill, total), function in runs:
        ids = tokens(2, total)
        expected = cell.expected(function, ids, *([prefill] if function is cached_logits else []))
        for backend in BACKENDS:
            with attention(cell.model, backend):
                slots = StaticCache(config=cell.model.config, max_cache_len=64)
                cell.same(cached_logits(cell.model, ids, prefill, slots), expected)


def padded(cell: Cell) -> None:
    """A left-padded row is the row alone, in one pass and in several."""
    short, long = tokens(1, 20), tokens(1, 48, seed=4)
    ids = torch.cat((torch.cat((torch.zeros(1, 28, dtype=torch.long), short), 1), long))
    mask = torch.ones(2, 48, dtype=torch.long)
    mask[0, :28] = 0
    alone = [cell.expected(logits, row) for row in (short, long)]
    steps = [cell.expected(cached_logits, row, prefill) for row, prefill in ((short, 17), (long, 45))]
    for backend in BACKENDS:
        with attention(cell.model, backend):
            together = logits(cell.model, ids, attention_mask=mask)
            stepwise = cached_logits(cell.model, ids, 45, mask=mask)
        for found, (first, second) in ((together, alone), (stepwise, steps)):
            cell.same(found[:1, 28:], first)
            cell.same(found[1:], second)


def packed(cell: Cell) -> None:
    """Documents in one row whose position ids begin again are those documents alone."""
    documents = [tokens(1, length, seed=length) for length in (40, 14, 10)]
    position_ids = torch.cat([torch.arange(document.shape[1]) for document in documents])[None]
    separate = torch.cat([cell.expected(logits, document) for document in documents], 1)
    for backend in BACKENDS:
        with attention(cell.model, backend):
            cell.same(logits(cell.model, torch.cat(documents, 1), position_ids=position_ids), separate)


def batched(cell: Cell) -> None:
    """A batch is its rows alone."""
    for length in LENGTHS:
        ids = tokens(3, length)
        alone = torch.cat([cell.expected(logits, row[None]) for row in ids])
        for backend in BACKENDS:
            with attention(cell.model, backend):
                cell.same(logits(cell.model, ids), alone)


SOFTMAX_INVARIANT = "bias_out"
"""FIRE adds it to all scores of a head alike, so that its gradient is zero, or what rounding leaves."""


def gradients(model: Any) -> dict[str, Tensor]:
    ids = tokens(2, 48)
    model.train()
    model.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    found = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    model.zero_grad()
    model.eval()
    return found


def checkpointed(cell: Cell) -> None:
    """Activations computed again give the gradients of a plain pass, the scheme's own parameters included."""
    expected = cell.expected(gradients)
    cell.model.gradient_checkpointing_enable()
    try:
        found = gradients(cell.model)
    finally:
        cell.model.gradient_checkpointing_disable()
    trained = {name for name, one in cell.model.named_parameters() if one.requires_grad}
    assert found.keys() == expected.keys() == trained
    floor = max(float(one.abs().max()) for one in expected.values())
    for name, one in expected.items():
        largest = float(one.abs().max())
        if name.endswith(SOFTMAX_INVARIANT):
            largest = floor
        assert largest > 0, name
        assert float((found[name] - one).abs().max()) < 1e-4 * largest + 1e-7 * floor, name


PARTS = ("pass", "step")
SAME_GRAPH = (
    "linear",
    "ntk",
    "ntk_by_parts",
    "llama3",
    "proportional",
    "clipped_rope",
    "resonance",
    "integer",
    "one_hot",
)
"""Schemes that differ from another one (`yarn`, `learned`) in numbers only, so that their graph is the same."""


def compiled_here(family: str, name: str) -> tuple[str, ...]:
    """Return what to compile in this cell: "pass", "step", both or nothing.

    Compiling takes longer than all other checks. So the forward pass of each distinct graph is compiled on one family,
    and the decoding step of every third scheme on another.
    """
    if name in SAME_GRAPH:
        return ()
    turn, families = list(GIVEN).index(name), (*FAMILIES, *OTHERS)
    chosen = {"pass": families[turn % 6]}
    if turn % 3 == turn // 3 % 3:
        chosen["step"] = families[(turn + 3) % 6]
    return tuple(part for part in PARTS if chosen.get(part) == family)


def compiled(cell: Cell) -> None:
    """One graph gives what eager attention does, in a full pass and in a decoding step over a static cache."""
    parts = PARTS if cell.whole else compiled_here(cell.family, cell.name)
    if not parts:
        return
    model = torch.compile(cell.model, backend="eager", fullgraph=True)
    if "pass" in parts:
        ids = tokens(2, 48)
        cell.same(logits(model, ids), cell.expected(logits, ids))
    if "step" in parts:
        ids = tokens(2, 32)
        slots = StaticCache(config=cell.model.config, max_cache_len=64)
        expected = cell.expected(logits, ids)[:, 30:]
        with torch.no_grad():
            cell.model(input_ids=ids[:, :30], past_key_values=slots, use_cache=True)
            steps = [
                model(input_ids=ids[:, at : at + 1], past_key_values=slots, use_cache=True).logits for at in (30, 31)
            ]
        cell.same(torch.cat(steps, 1), expected)


def saved(cell: Cell) -> None:
    """What is loaded is what was saved."""
    with tempfile.TemporaryDirectory() as folder:
        cell.model.save_pretrained(folder)
        loaded = load_patched(folder).eval()
    for length in LENGTHS:
        ids = tokens(2, length)
        assert torch.equal(logits(loaded, ids), logits(cell.model, ids))


def undone(cell: Cell) -> None:
    """Logits, weights, config and every attribute, bit for bit."""
    unpatch_model(cell.model)
    assert cell.native is not None and unchanged(cell.native, snapshot(cell.model))


SITUATIONS: dict[str, Callable[[Cell], None]] = {
    "full": full, "cached": cached, "static cache": static, "left-padded": padded, "packed": packed,
    "batched": batched, "checkpointing": checkpointed, "compile": compiled, "save and load": saved, "unpatch": undone,
}  # fmt: skip


@cache
def model_of(family: str) -> tuple[Any, dict[str, Any]]:
    """One model for all schemes, and a snapshot of it with all that the hosts' own calls leave on it."""
    model = build(family)
    model.gradient_checkpointing_enable()
    model.gradient_checkpointing_disable()
    torch.compile(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
    return model, snapshot(model)


Outcome = dict[str, Exception]
"""What each situation that is not green raised."""
OUTCOMES: dict[tuple[str, str], Outcome] = {}


def run(family: str, name: str, whole: bool = False) -> Outcome:
    """Put a scheme in and run the ten situations. What raises does not keep the others from running."""
    model, native = model_of(family)
    outcome = OUTCOMES[family, name] = {}
    try:
        put(model, name, backend="sdpa")
    except PePatchError as reason:
        outcome.update(dict.fromkeys(SITUATIONS, reason))
        undisturbed = unchanged(native, snapshot(model))
        assert undisturbed, "a refusal changed the model"
        return outcome
    cell = Cell(family, name, model, native, whole)
    for situation, check in SITUATIONS.items():
        try:
            check(cell)
        except Exception as reason:
            outcome[situation] = reason
    return outcome


def refused(outcome: Outcome) -> bool:
    return bool(outcome) and all(isinstance(reason, PePatchError) for reason in outcome.values())


def table() -> tuple[list[list[str]], list[str]]:
    """Rows of the matrix, a header first, and the notes that they refer to."""
    families = [family for family in (*FAMILIES, *OTHERS) if any(one == family for one, _ in OUTCOMES)]
    rows, notes = [["", *families]], []
    for name in GIVEN:
        row = [name]
        for family in families:
            outcome = OUTCOMES.get((family, name))
            if not outcome:
                row.append("" if outcome is None else "✓")
                continue
            text = str(next(iter(outcome.values()))).splitlines()
            where = "all" if len(outcome) == len(SITUATIONS) else ", ".join(outcome)
            verb = "refused" if refused(outcome) else "FAILED"
            note = f"{verb} ({where}): {text[0] if text else 'not the same'}"
            notes += [] if note in notes else [note]
            row.append(f"{'-' if verb == 'refused' else '✗'}{notes.index(note) + 1}")
        if any(row[1:]):
            rows.append(row)
    return rows, notes


def legend(whole: bool) -> str:
    """What a tick says."""
    rota = (
        "" if whole else " Compiled by rota: each scheme with its own graph on one family or two, all families in turn."
    )
    return f"✓ all of {', '.join(SITUATIONS)}.{rota}"


def plain() -> list[str]:
    """The matrix for a terminal."""
    rows, notes = table()
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [*lines, *(f"{index}  {note}" for index, note in enumerate(notes, 1))]


def grouped(rows: list[list[str]]) -> list[list[str]]:
    """One row for the schemes of a mechanism that came out alike."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, *cells in rows:
        groups.setdefault((SCHEMES[name].mechanism, *cells), []).append(name)
    return [[f"{key[0]}: {', '.join(names)}", *key[1:]] for key, names in groups.items()]


def markdown(by_mechanism: bool = False) -> str:
    """The matrix for a page."""
    rows, notes = table()
    head, *body = rows
    body = grouped(body) if by_mechanism else body
    lines = [head, ["---", *[":-:"] * (len(head) - 1)], *body]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return text + "".join(f"\n\n{index}. {note}" for index, note in enumerate(notes, 1))


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    everything = "--compile-all" in sys.argv
    for one_family in (*FAMILIES, *OTHERS):
        for one_name in GIVEN:
            found = run(one_family, one_name, whole=everything)
            print(one_family, one_name, found or "green", file=sys.stderr, flush=True)
    print(f"# What works where\n\n{legend(everything)}\n\n{markdown(True)}\n\n## Every scheme\n\n{markdown()}")
