"""Every scheme for text on six families in ten situations; `tests/matrix.py` says what each of them checks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from pe_patch import PePatchError

from .matrix import OTHERS, REFUSED, SITUATIONS, TOLERANCE, run
from .models import FAMILIES, GIVEN, build, error, logits, put, tokens

ROOT = Path(__file__).parent.parent
EACH_MECHANISM = ("sinusoidal", "nope", "yarn", "dynamic_ntk", "alibi", "shaw", "self_extend", "mla")
PAIRS = [(family, name) for family in (*FAMILIES, *OTHERS) for name in GIVEN]


def marks(family: str, name: str) -> list[pytest.MarkDecorator]:
    """Return the marks of a cell.

    A scheme of each mechanism runs on Llama, GPT-NeoX, BLOOM and one of the others by rota; the rest run on Llama, one
    of GPT-NeoX and BLOOM, and one of the others. The rota agrees with `compiled_here`.
    """
    turn = [*GIVEN].index(name)
    if family in FAMILIES and name in EACH_MECHANISM:
        return [pytest.mark.fast]
    by_rota = ("llama", FAMILIES[turn % 3 or 1 + turn % 2], OTHERS[turn % len(OTHERS)])
    return [] if family in by_rota else [pytest.mark.thorough]


EVERY = [pytest.param(*pair, marks=marks(*pair)) for pair in PAIRS]


@pytest.mark.parametrize(("family", "name"), EVERY)
def test_ten_situations(family, name, request):
    outcome = run(family, name, whole=request.config.getoption("--compile-all"))
    for situation in SITUATIONS:
        pattern = REFUSED.get((name, family, situation), REFUSED.get((name, family)))
        reason = outcome.get(situation)
        if pattern is None:
            if reason is not None:
                raise AssertionError(f"{name} on {family}, {situation}: {reason!r}") from reason
        else:
            assert isinstance(reason, PePatchError) and re.search(pattern, str(reason)), (situation, reason)


def test_the_pages_show_every_scheme():
    """As `python -m tests.matrix` printed them."""
    page = (ROOT / "docs" / "matrix.md").read_text(encoding="utf-8")
    summary, whole = page.split("## Every scheme")
    shown = [line.split("|")[1].strip() for line in whole.splitlines() if line.startswith("| ")]
    assert [name for name in shown if name in GIVEN] == list(GIVEN)
    assert sum(line.startswith("|") for line in summary.splitlines()) > 5


@pytest.mark.parametrize("options", [{}, {"clamp_length": 6}])
def test_transformer_xl_reads_no_position_while_compiled(options):
    """The graph may hold no number that is read from a tensor; positions far from zero keep their digits."""
    model = put(build("llama"), "transformer_xl", backend="eager", **options)
    ids, at = tokens(2, 40), torch.arange(5000, 5040)[None]
    expected = logits(model, ids, position_ids=at)
    model.set_attn_implementation("sdpa")
    with torch._dynamo.config.patch(capture_scalar_outputs=False):
        found = logits(torch.compile(model, backend="eager", fullgraph=True), ids, position_ids=at)
    assert error(found, expected) < TOLERANCE
