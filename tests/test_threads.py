"""Several threads: a patched model computes for each what it computes for one, and only one may patch it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from pe_patch import AlreadyPatchedError, NoEffectError, PePatchError, patch_model, unpatch_model
from pe_patch.patching import api as patching

from . import families
from .interrupts import differing, state
from .models import build, logits, put, tokens


@pytest.fixture(autouse=True)
def frequent_switches() -> Iterator[None]:
    before, threads = sys.getswitchinterval(), torch.get_num_threads()
    sys.setswitchinterval(1e-5)
    torch.set_num_threads(1)
    yield
    sys.setswitchinterval(before)
    torch.set_num_threads(threads)


def together(works: list[Callable[[], Any]]) -> list[BaseException | None]:
    """Run each in a thread, and return what each raised."""
    raised: list[BaseException | None] = [None] * len(works)
    barrier = threading.Barrier(len(works))

    def run(index: int) -> None:
        barrier.wait()
        try:
            works[index]()
        except BaseException as error:
            raised[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def request(number: int) -> dict[str, Any]:
    """Inputs whose length, rows, padding and position ids differ from those of their neighbours."""
    length, rows = 5 + number * 7 % 23, 1 + number % 3
    inputs: dict[str, Any] = {"input_ids": tokens(rows, length, seed=number)}
    if number % 4:
        inputs["attention_mask"] = torch.ones(rows, length, dtype=torch.long)
    if number % 4 == 1:
        inputs["attention_mask"][0, :3] = 0
    if number % 4 == 2:
        inputs["position_ids"] = (torch.arange(length) + number % 9)[None].expand(rows, -1)
    return inputs


FORWARDS = [("bloom", "alibi"), ("bloom", "yarn"), ("bloom", "t5"), ("bloom", "learned"), ("bloom", "dynamic_ntk"),
            ("llama", "yarn"), ("llama", "self_extend"), ("llama", "dynamic_ntk"), ("llama", "mla"),
            ("gpt2", "learned"), ("gpt2", "t5"), ("gpt_neox", "alibi"), ("opt", "kerple")]  # fmt: skip


@pytest.mark.parametrize(("family", "name"), FORWARDS)
def test_concurrent_forwards_are_those_of_one_thread(family, name):
    model = families.build("opt") if family == "opt" else build(family, num_hidden_layers=1)
    if family == "opt":
        patch_model(model, name)
    else:
        put(model, name)
    works, count = 6, 360 if family == "bloom" else 120
    inputs = [request(number) for number in range(count)]

    def forward(number: int) -> torch.Tensor:
        with torch.no_grad():
            return model(**inputs[number], use_cache=False).logits

    expected = [forward(number) for number in range(count)]
    wrong: list[int] = []

    def work(first: int) -> Callable[[], None]:
        def forwards() -> None:
            wrong.extend(n for n in range(first, count, works) if not torch.equal(forward(n), expected[n]))

        return forwards

    assert together([work(first) for first in range(works)]) == [None] * works
    assert wrong == []


@pytest.mark.parametrize("name", ["alibi", "yarn"])
def test_no_forward_leaves_anything_on_a_bloom(name):
    model = put(build("bloom"), name)
    model(tokens(1, 9))  # schemes make their tables in a first pass
    before = state(model)
    model(tokens(1, 9), position_ids=torch.arange(9)[None])
    with pytest.raises(IndexError):
        model(torch.full((1, 4), 1000))
    assert not differing(before, state(model))


def test_two_threads_that_patch_one_model():
    """One of them patches it, the other gets an error that says why; in no interleaving is the model anything else."""
    model, ids = build("llama"), tokens(1, 40)
    native = state(model)
    expected = {}
    for name in ("linear", "alibi"):
        expected[name] = logits(put(model, name), ids)
        unpatch_model(model)
    for _ in range(40):
        raised = together([lambda: patch_model(model, "linear", factor=2.0), lambda: patch_model(model, "alibi")])
        errors = [error for error in raised if error is not None]
        assert len(errors) == 1 and isinstance(errors[0], AlreadyPatchedError)
        assert torch.equal(logits(model, ids), expected["alibi" if raised[0] else "linear"])
        raised = together([lambda: unpatch_model(model)] * 2)
        assert all(isinstance(error, PePatchError) for error in raised if error) and None in raised
        assert not differing(native, state(model))


def test_a_thread_that_comes_while_another_is_at_work(monkeypatch):
    """Also through another module of the same model; afterwards the way is free again."""
    model = build("llama")
    native = state(model)
    inside, go = threading.Event(), threading.Event()

    def wait(*_: Any, **__: Any) -> None:
        inside.set()
        assert go.wait(60)

    with monkeypatch.context() as context:
        context.setattr(patching, "_verify", wait)
        thread = threading.Thread(target=lambda: patch_model(model, "alibi"))
        thread.start()
        assert inside.wait(60)
        for call in (
            lambda: patch_model(model, "linear", factor=2.0, on_existing="replace"),
            lambda: patch_model(model.model, "linear", factor=2.0, on_existing="replace"),
            lambda: unpatch_model(model),
        ):
            with pytest.raises(AlreadyPatchedError, match="Another thread"):
                call()
        go.set()
        thread.join()
    unpatch_model(model)
    assert not differing(native, state(model))


def test_a_thread_that_failed_does_not_keep_the_model(monkeypatch):
    model = build("llama")
    native = state(model)

    def fail(*_: Any, **__: Any) -> None:
        raise NoEffectError

    with monkeypatch.context() as context:
        context.setattr(patching, "_verify", fail)
        raised = together([lambda: patch_model(model, "alibi")])
    assert isinstance(raised[0], NoEffectError) and not differing(native, state(model))
    patch_model(model, "alibi")
    unpatch_model(model)
    assert not differing(native, state(model))
