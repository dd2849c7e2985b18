"""A patch is wholly there or wholly gone, whatever cuts patching or undoing short."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from pe_patch import NoEffectError, PePatchError, describe, patch_model, patched, unpatch_model
from pe_patch.core.swaps import Swap
from pe_patch.patching import api as patching
from pe_patch.patching.api import find_patch
from pe_patch.patching.build import Patch
from pe_patch.training.shifted_attention import shift_attention, unshift_attention

from .interrupts import Lines, count, differing, outline, run, state
from .models import build, case, logits, tokens

CASES = [("llama", "yarn"), ("llama", "alibi"), ("llama", "self_extend"), ("gpt2", "learned"), ("llama", "mla"),
         ("bloom", "yarn")]  # fmt: skip
BY_LOSS = ("llama", "mla_by_loss")
"""A conversion that patches and undoes several times on its way; only its patching differs from `mla`."""
QUICK = 6
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
    step = max(1, total // (2 if "mla" in request.node.name else QUICK))
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


@pytest.mark.parametrize(
    "sweep", [("llama", "yarn"), ("gpt2", "learned"), ("bloom", "yarn")], ids=" ".join, indirect=True
)
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


@contextmanager
def failing(attribute: str) -> Iterator[None]:
    """Every write of one attribute fails."""
    put = Swap.put

    def refuse(swap: Swap, value: Any) -> None:
        if swap.attribute == attribute:
            raise RuntimeError(f"no writing of {attribute}")
        put(swap, value)

    with pytest.MonkeyPatch.context() as context:
        context.setattr(Swap, "put", refuse)
        yield


@pytest.mark.parametrize("attribute", ["rotary_emb", "pe_runtime", "forward", "pe_patch", "config"])
def test_an_undo_that_fails_is_finished_by_the_next(attribute):
    """All that can be put back is put back; what is left is neither described nor lost."""
    sweep = Sweep("llama", "yarn")
    sweep.patch()
    patch = find_patch(sweep.model)
    assert patch is not None
    with failing(attribute):
        if any(swap.attribute == attribute for swap in patch.swaps):
            with pytest.raises(RuntimeError, match=f"no writing of {attribute}"):
                unpatch_model(sweep.model)
            left = [s for s in patch.swaps if s.current() is not s.original and s.attribute != attribute]
            assert find_patch(sweep.model) is patch and not patch.whole
            assert all(isinstance(swap.current(), str | int) for swap in left)
            with pytest.raises(PePatchError, match="unpatch_model"):
                describe(sweep.model)
            with pytest.raises(RuntimeError):
                unpatch_model(sweep.model)
    unpatch_model(sweep.model)
    sweep.is_native(attribute)


def test_a_patch_on_a_half_state_begins_from_the_native_model():
    sweep = Sweep("llama", "alibi")
    sweep.patch()
    with failing("rotary_emb"), pytest.raises(RuntimeError):
        unpatch_model(sweep.model)
    patch_model(sweep.model, "linear", factor=2.0)  # without on_existing: the earlier patch is not there any more
    assert describe(sweep.model).scheme == "linear"
    unpatch_model(sweep.model)
    sweep.is_native("after both")


@pytest.mark.parametrize("step", ["_verify", "_announce", "logger", "release_originals", "wrapper_swaps"])
@pytest.mark.parametrize("replaces", [False, True])
def test_a_step_that_fails_leaves_the_model_as_it_was(monkeypatch, step, replaces):
    sweep = Sweep("llama", "alibi")
    if replaces:
        patch_model(sweep.model, **sweep.earlier)
        sweep.model.set_attn_implementation("eager")  # what the user chose under the earlier patch comes back too
        sweep.model.config.use_cache = False
    before, earlier = state(sweep.model), find_patch(sweep.model)

    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as context:
        if step == "logger":
            for level in ("info", "warning"):
                context.setattr(patching.logger, level, fail)
        else:
            context.setattr(Patch if step == "release_originals" else patching, step, fail)
        with pytest.raises(ZeroDivisionError):
            sweep.patch(on_existing="replace")
    assert find_patch(sweep.model) is earlier
    assert not (found := differing(before, state(sweep.model))), found


def test_originals_are_given_up_last():
    """Until then the patch can be taken back; afterwards the model stays patched, as a whole."""
    arguments = {**given("llama", "mla"), "keep_original": False}
    total = count(lambda: patch_model(tiny("llama"), **arguments))

    def kept(stop: int) -> bool:
        model, lines = tiny("llama"), Lines(stop)
        before = state(model)
        run(lambda: patch_model(model, **arguments), lines)
        patch = find_patch(model)
        if patch is None:
            assert not differing(before, state(model)), lines.place
            return False
        assert patch.whole and not patch.undoable, lines.place
        assert torch.isfinite(logits(model, tokens(1, 12))).all()
        return True

    low, high = 1, total + 1  # undone when interrupted at the first line, patched when never interrupted
    assert not kept(low) and kept(high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if kept(middle) else (middle, high)
    assert not any(kept(stop) for stop in range(max(1, low - 3), low)) and all(kept(high + n) for n in range(1, 4))


def test_the_block_of_patched_is_undone_wherever_it_is_interrupted(request):
    sweep = Sweep("llama", "yarn")

    def work() -> None:
        with patched(sweep.model, **sweep.arguments):
            pass

    total = count(work)
    for stop in [*range(1, 12), *chosen(total, request), *range(total - 12, total + 1)]:
        lines = Lines(stop)
        run(work, lines)
        sweep.is_native(lines.place)


def test_shifted_attention_is_wholly_there_or_wholly_gone(request):
    sweep = Sweep("llama", "yarn")
    sweep.patch()
    patch = find_patch(sweep.model)
    assert patch is not None
    before, swaps = state(sweep.model), len(patch.swaps)
    lines = Lines()
    run(lambda: shift_attention(sweep.model, 2), lines)
    with_shift = outline(sweep.model)
    unshift_attention(sweep.model)
    undo = count(lambda: (shift_attention(sweep.model, 2), unshift_attention(sweep.model)))
    for stop in range(1, undo + 1):
        run(lambda: (shift_attention(sweep.model, 2), unshift_attention(sweep.model)), Lines(stop))
        patch = find_patch(sweep.model)
        assert patch is not None and patch.whole
        if len(patch.swaps) > swaps:
            assert outline(sweep.model) == with_shift
            unshift_attention(sweep.model)
        assert not (found := differing(before, state(sweep.model))), found
    unpatch_model(sweep.model)
    sweep.is_native("at the end")
