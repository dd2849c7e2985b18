"""Test that a patch or an undo that is interrupted or fails leaves a native or a completely patched model."""

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
from pe_patch.patching.patch import Patch
from pe_patch.training.shifted_attention import shift_attention, unshift_attention

from .interrupts import Lines, count, differing, outline, run, state
from .models import build, case, logits, tokens

CASES = [("llama", "yarn"), ("llama", "alibi"), ("llama", "self_extend"), ("gpt2", "learned"), ("llama", "mla"),
         ("bloom", "yarn")]  # fmt: skip
BY_LOSS = ("llama", "mla_by_loss")
"""A conversion that patches and undoes several times; only its patching differs from `mla`."""
QUICK = 6
"""Number of lines at which each operation is interrupted; `--all-lines` interrupts at every one."""


def patch_arguments(family: str, name: str) -> dict[str, Any]:
    if name == "mla_by_loss":
        calibration = tokens(8, 12, seed=5)
        return {"scheme": "mla", "max_loss": 10.0, "rope_dim": 8, "calibration": calibration}
    scheme, options = case(family, name)
    if name == "mla":
        options |= {"kv_rank": 4, "calibration": tokens(3, 4, seed=5)}
    return {"scheme": scheme, **options}


def tiny_model(family: str) -> Any:
    return build(family, num_hidden_layers=1, vocab_size=97).train(False)


def lines_to_interrupt(total: int, request: Any) -> list[int]:
    """Return all line numbers, or a few at even distances, which start at another line for each case."""
    if request.config.getoption("--all-lines"):
        return list(range(1, total + 1))
    step = max(1, total // (2 if "mla" in request.node.name else QUICK))
    return list(range(1 + sum(map(ord, request.node.name)) % step, total + 1, step))


class InterruptedModel:
    """A model whose patch is interrupted, with its state before and after a complete patch."""

    def __init__(self, family: str, name: str) -> None:
        self.arguments = patch_arguments(family, name)
        self.earlier = {"scheme": "learned", "max_positions": 64} if family != "gpt2" else {"scheme": "alibi"}
        self.model = tiny_model(family)
        self.native, self.logits, self.checks = state(self.model), logits(self.model, tokens(1, 12)), 0
        self.patch()
        self.patched = outline(self.model)
        unpatch_model(self.model)
        self.check_native("at the start")

    def patch(self, **more: Any) -> None:
        patch_model(self.model, **self.arguments, **more)

    def check_native(self, place: str) -> None:
        assert not (found := differing(self.native, state(self.model))), (place, found)
        self.checks += 1
        if self.checks % 25 == 1:  # the same objects compute the same, so a few passes suffice
            assert torch.equal(logits(self.model, tokens(1, 12)), self.logits), place

    def check_native_or_patched(self, place: str) -> None:
        """Check that the model is native or completely patched."""
        patch = find_patch(self.model)
        if patch is None:
            self.check_native(place)
        else:
            assert patch.whole and outline(self.model) == self.patched, place

    def unpatch_and_check(self, place: str) -> None:
        try:
            unpatch_model(self.model)
        except PePatchError as error:
            assert "no patch" in str(error), place
        self.check_native(place)


@pytest.fixture(params=CASES, ids=" ".join)
def interrupted(request) -> InterruptedModel:
    return InterruptedModel(*request.param)


@pytest.mark.parametrize("interrupted", [*CASES, BY_LOSS], ids=" ".join, indirect=True)
def test_an_interrupt_while_patching_leaves_a_native_or_a_patched_model(interrupted, request):
    total = count(interrupted.patch)
    unpatch_model(interrupted.model)
    for stop in lines_to_interrupt(total, request):
        lines = Lines(stop)
        run(interrupted.patch, lines)
        assert lines.place
        interrupted.check_native_or_patched(lines.place)
        interrupted.unpatch_and_check(lines.place)


def test_an_interrupt_while_unpatching_leaves_a_native_or_a_patched_model(interrupted, request):
    interrupted.patch()
    for stop in lines_to_interrupt(count(lambda: unpatch_model(interrupted.model)), request):
        lines = Lines(stop)
        interrupted.patch()
        run(lambda: unpatch_model(interrupted.model), lines)
        interrupted.check_native_or_patched(lines.place)
        interrupted.unpatch_and_check(lines.place)


def test_an_interrupt_while_replacing_leaves_the_earlier_or_the_later_patch(interrupted, request):
    """The earlier patch is restored with the same objects, or the later one is complete."""

    def replace() -> None:
        interrupted.patch(on_existing="replace")

    def begin() -> dict[str, Any]:
        patch_model(interrupted.model, **interrupted.earlier)
        return state(interrupted.model)

    begin()
    total = count(replace)
    for stop in lines_to_interrupt(total, request):
        interrupted.unpatch_and_check("before")
        lines, before = Lines(stop), begin()
        earlier = find_patch(interrupted.model)
        run(replace, lines)
        if find_patch(interrupted.model) is earlier:
            assert not (found := differing(before, state(interrupted.model))), (lines.place, found)
        else:
            interrupted.check_native_or_patched(lines.place)
        interrupted.unpatch_and_check(lines.place)


@pytest.mark.parametrize(
    "interrupted", [("llama", "yarn"), ("gpt2", "learned"), ("bloom", "yarn")], ids=" ".join, indirect=True
)
@pytest.mark.parametrize("replaces", [False, True])
def test_an_interrupt_while_a_failed_patch_is_undone_can_be_finished_by_unpatching(
    interrupted, request, monkeypatch, replaces
):
    """Two faults happen in one call; one more `unpatch_model` finishes the undo."""

    def fail(*_: Any, **__: Any) -> None:
        raise NoEffectError("as if a layer had not been reached")

    def work() -> None:
        with monkeypatch.context() as context:
            context.setattr(patching, "_verify", fail)
            interrupted.patch(on_existing="replace")

    if replaces:
        patch_model(interrupted.model, **interrupted.earlier)
    total = count(work)
    for stop in lines_to_interrupt(total, request):
        interrupted.unpatch_and_check("before")
        if replaces:
            patch_model(interrupted.model, **interrupted.earlier)
        lines = Lines(stop)
        assert run(work, lines) is not None
        interrupted.unpatch_and_check(lines.place)


@contextmanager
def writes_fail(attribute: str) -> Iterator[None]:
    """Make every write of one attribute fail."""
    put = Swap.put

    def refuse(swap: Swap, value: Any) -> None:
        if swap.attribute == attribute:
            raise RuntimeError(f"no writing of {attribute}")
        put(swap, value)

    with pytest.MonkeyPatch.context() as context:
        context.setattr(Swap, "put", refuse)
        yield


@pytest.mark.parametrize("attribute", ["rotary_emb", "pe_runtime", "forward", "pe_patch", "config"])
def test_a_failed_undo_is_finished_by_the_next(attribute):
    """An undo restores all that it can. `describe` refuses the rest, and the next undo restores it."""
    interrupted = InterruptedModel("llama", "yarn")
    interrupted.patch()
    patch = find_patch(interrupted.model)
    assert patch is not None
    with writes_fail(attribute):
        if any(swap.attribute == attribute for swap in patch.swaps):
            with pytest.raises(RuntimeError, match=f"no writing of {attribute}"):
                unpatch_model(interrupted.model)
            left = [s for s in patch.swaps if s.current() is not s.original and s.attribute != attribute]
            assert find_patch(interrupted.model) is patch and not patch.whole
            assert all(isinstance(swap.current(), str | int) for swap in left)
            with pytest.raises(PePatchError, match="unpatch_model"):
                describe(interrupted.model)
            with pytest.raises(RuntimeError):
                unpatch_model(interrupted.model)
    unpatch_model(interrupted.model)
    interrupted.check_native(attribute)


def test_patching_after_a_failed_undo_starts_from_the_native_model():
    interrupted = InterruptedModel("llama", "alibi")
    interrupted.patch()
    with writes_fail("rotary_emb"), pytest.raises(RuntimeError):
        unpatch_model(interrupted.model)
    patch_model(interrupted.model, "linear", factor=2.0)  # without on_existing, because the earlier patch is gone
    assert describe(interrupted.model).scheme == "linear"
    unpatch_model(interrupted.model)
    interrupted.check_native("after both")


@pytest.mark.parametrize("step", ["_verify", "_announce", "logger", "release_originals", "wrapper_swaps"])
@pytest.mark.parametrize("replaces", [False, True])
def test_a_failing_step_leaves_the_model_unchanged(monkeypatch, step, replaces):
    interrupted = InterruptedModel("llama", "alibi")
    if replaces:
        patch_model(interrupted.model, **interrupted.earlier)
        interrupted.model.set_attn_implementation("eager")  # what the user chose under the earlier patch comes back too
        interrupted.model.config.use_cache = False
    before, earlier = state(interrupted.model), find_patch(interrupted.model)

    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as context:
        if step == "logger":
            for level in ("info", "warning"):
                context.setattr(patching.logger, level, fail)
        else:
            context.setattr(Patch if step == "release_originals" else patching, step, fail)
        with pytest.raises(ZeroDivisionError):
            interrupted.patch(on_existing="replace")
    assert find_patch(interrupted.model) is earlier
    assert not (found := differing(before, state(interrupted.model))), found


def test_original_weights_are_discarded_last():
    """Until then the patch can be undone; afterwards the model stays completely patched."""
    arguments = {**patch_arguments("llama", "mla"), "keep_original": False}
    total = count(lambda: patch_model(tiny_model("llama"), **arguments))

    def stays_patched(stop: int) -> bool:
        model, lines = tiny_model("llama"), Lines(stop)
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
    assert not stays_patched(low) and stays_patched(high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if stays_patched(middle) else (middle, high)
    assert not any(stays_patched(stop) for stop in range(max(1, low - 3), low)) and all(
        stays_patched(high + n) for n in range(1, 4)
    )


def test_patched_undoes_the_patch_wherever_it_is_interrupted(request):
    interrupted = InterruptedModel("llama", "yarn")

    def work() -> None:
        with patched(interrupted.model, **interrupted.arguments):
            pass

    total = count(work)
    for stop in [*range(1, 12), *lines_to_interrupt(total, request), *range(total - 12, total + 1)]:
        lines = Lines(stop)
        run(work, lines)
        interrupted.check_native(lines.place)


def test_an_interrupt_leaves_shifted_attention_on_or_off(request):
    interrupted = InterruptedModel("llama", "yarn")
    interrupted.patch()
    patch = find_patch(interrupted.model)
    assert patch is not None
    before, swaps = state(interrupted.model), len(patch.swaps)
    lines = Lines()
    run(lambda: shift_attention(interrupted.model, 2), lines)
    with_shift = outline(interrupted.model)
    unshift_attention(interrupted.model)
    undo = count(lambda: (shift_attention(interrupted.model, 2), unshift_attention(interrupted.model)))
    for stop in range(1, undo + 1):
        run(lambda: (shift_attention(interrupted.model, 2), unshift_attention(interrupted.model)), Lines(stop))
        patch = find_patch(interrupted.model)
        assert patch is not None and patch.whole
        if len(patch.swaps) > swaps:
            assert outline(interrupted.model) == with_shift
            unshift_attention(interrupted.model)
        assert not (found := differing(before, state(interrupted.model))), found
    unpatch_model(interrupted.model)
    interrupted.check_native("at the end")
