"""A patch is wholly there or wholly gone, whatever cuts patching or undoing short."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pe_patch import NoEffectError, PePatchError, patch_model, unpatch_model
from pe_patch import patch as patching
from pe_patch.patch import find_patch

from .interrupts import Lines, count, differing, outline, run, state
from .models import build, case, logits, tokens

CASES = [("llama", "yarn"), ("llama", "alibi"), ("llama", "self_extend"), ("gpt2", "learned"), ("llama", "mla"),
         ("bloom", "yarn")]  # fmt: skip
BY_LOSS = ("llama", "mla_by_loss")
"""A conversion that patches and undoes several times on its way; only its patching differs from `mla`."""
QUICK = 9
"""Lines that are tried of each operation, unless `--all-lines` tries every one."""


def given(family: str, name: str) -> dict[str, Any]:
    if name == "mla_by_loss":
        calibration = tokens(8, 12, seed=5)
        return {"scheme": "mla", "max_loss": 10.0, "rope_dim": 8, "calibration": calibration}
    scheme, options = case(family, name)
    if name == "mla":
        options |= {"kv_rank": 4, "calibration": tokens(3, 4, seed=5)}
    return {"scheme": scheme, **options}


def tiny(family: str) -> Any:
    return build(family, num_hidden_layers=1, vocab_size=97).train(False)


def chosen(total: int, request: Any) -> list[int]:
    """Every line, or a few that are spread evenly and begin elsewhere for each case."""
    if request.config.getoption("--all-lines"):
        return list(range(1, total + 1))
    step = max(1, total // QUICK)
    return list(range(1 + sum(map(ord, request.node.name)) % step, total + 1, step))


class Sweep:
    """One operation on one model, interrupted again and again."""

    def __init__(self, family: str, name: str) -> None:
        self.arguments = given(family, name)
        self.earlier = {"scheme": "learned", "max_positions": 64} if family != "gpt2" else {"scheme": "alibi"}
        self.model = tiny(family)
        self.native, self.logits, self.checks = state(self.model), logits(self.model, tokens(1, 12)), 0
        self.patch()
        self.patched = outline(self.model)
        unpatch_model(self.model)
        self.is_native("at the start")

    def patch(self, **more: Any) -> None:
        patch_model(self.model, **self.arguments, **more)

    def is_native(self, place: str) -> None:
        assert not (found := differing(self.native, state(self.model))), (place, found)
        self.checks += 1
        if self.checks % 25 == 1:  # the same objects compute the same, so that a few passes are enough
            assert torch.equal(logits(self.model, tokens(1, 12)), self.logits), place

    def is_whole(self, place: str) -> None:
        """Native, or patched and nothing in between."""
        patch = find_patch(self.model)
        if patch is None:
            self.is_native(place)
        else:
            assert patch.whole and outline(self.model) == self.patched, place

    def finish(self, place: str) -> None:
        try:
            unpatch_model(self.model)
        except PePatchError as error:
            assert "no patch" in str(error), place
        self.is_native(place)


@pytest.fixture(params=CASES, ids=" ".join)
def sweep(request) -> Sweep:
    return Sweep(*request.param)


@pytest.mark.parametrize("sweep", [*CASES, BY_LOSS], ids=" ".join, indirect=True)
def test_interrupts_while_patching(sweep, request):
    total = count(sweep.patch)
    unpatch_model(sweep.model)
    for stop in chosen(total, request):
        lines = Lines(stop)
        run(sweep.patch, lines)
        assert lines.place
        sweep.is_whole(lines.place)
        sweep.finish(lines.place)


def test_interrupts_while_undoing(sweep, request):
    sweep.patch()
    for stop in chosen(count(lambda: unpatch_model(sweep.model)), request):
        lines = Lines(stop)
        sweep.patch()
        run(lambda: unpatch_model(sweep.model), lines)
        sweep.is_whole(lines.place)
        sweep.finish(lines.place)


def test_interrupts_while_replacing(sweep, request):
    """The earlier patch comes back, object by object, or the later one is whole."""

    def replace() -> None:
        sweep.patch(on_existing="replace")

    def begin() -> dict[str, Any]:
        patch_model(sweep.model, **sweep.earlier)
        return state(sweep.model)

    begin()
    total = count(replace)
    for stop in chosen(total, request):
        sweep.finish("before")
        lines, before = Lines(stop), begin()
        earlier = find_patch(sweep.model)
        run(replace, lines)
        if find_patch(sweep.model) is earlier:
            assert not (found := differing(before, state(sweep.model))), (lines.place, found)
        else:
            sweep.is_whole(lines.place)
        sweep.finish(lines.place)


@pytest.mark.parametrize("replaces", [False, True])
def test_interrupts_while_a_failed_patch_is_taken_back(sweep, request, monkeypatch, replaces):
    """Two faults in one call: what is left is finished by one more `unpatch_model`."""

    def fail(*_: Any, **__: Any) -> None:
        raise NoEffectError("as if a layer had not been reached")

    def work() -> None:
        with monkeypatch.context() as context:
            context.setattr(patching, "_verify", fail)
            sweep.patch(on_existing="replace")

    if replaces:
        patch_model(sweep.model, **sweep.earlier)
    total = count(work)
    for stop in chosen(total, request):
        sweep.finish("before")
        if replaces:
            patch_model(sweep.model, **sweep.earlier)
        lines = Lines(stop)
        assert run(work, lines) is not None
        sweep.finish(lines.place)
