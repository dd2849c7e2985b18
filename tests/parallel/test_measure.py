"""Processes that measure a sharded model together run the same passes, and wait for the one that measures alone."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import torch

from pe_patch.evaluation import model as evaluated
from pe_patch.training.guard import EvaluationError
from pe_patch.training.launch import WAIT, Launch
from pe_patch.training.measure import Measure
from pe_patch.training.recipe import Evaluation, Phase, Recipe

from ..evaluation_doubles import make_text, make_tokenizer, tiny_llama
from .launch import on_processes


def measured(free: list[int]) -> dict[str, Any]:
    """Return the planned and the executed passes of each process, with different free memory on each."""
    recipe = Recipe(
        output="/nowhere", phases=[Phase(length=256, batch=2)], dry_run=True,
        evaluation=Evaluation(every=1, tasks=["perplexity"], lengths=[128, 256], samples=4),
    )  # fmt: skip
    launch, tokenizer = Launch(recipe), make_tokenizer()
    torch.manual_seed(0)
    model = tiny_llama(len(tokenizer)).eval()
    measure = Measure(recipe, launch, tokenizer, lambda: [make_text(6000)])
    measure.everywhere = True
    measure.check(model)
    memory = free[launch.rank]
    evaluated.free_bytes = lambda device: memory
    passes: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(
        lambda module, arguments, named: passes.append(tuple(named["input_ids"].shape)), with_kwargs=True
    )
    written: list[Any] = []
    log: Any = SimpleNamespace(
        write=lambda event, row: written.append(row["score"]), evaluated=lambda done, total: None
    )
    try:
        measure.during(model, log, 1)
    except EvaluationError as error:
        return {"error": str(error), "passes": passes}
    return {"batch": measure.batch_size, "passes": passes, "scores": written}


def test_all_run_the_passes_that_fit_on_the_smallest():
    one, other = on_processes(2, measured, free=[2**34, 40 * 2**20])
    assert "error" not in one, (one, other)
    assert one["batch"] == other["batch"] and one["passes"] == other["passes"] and one["scores"] == other["scores"]
    alone, _ = on_processes(2, measured, free=[2**34, 2**34])
    assert alone["batch"] > one["batch"]  # otherwise the smaller memory would not have mattered


def test_no_room_on_one_process_ends_all():
    one, other = on_processes(2, measured, free=[2**34, 1])
    assert "another process" in one["error"] and "GiB are free" in other["error"]


def waited() -> float:
    launch = Launch(Recipe(output="/nowhere", phases=[Phase(length=8, batch=2)], dry_run=True))
    started = time.monotonic()
    if launch.is_main:
        time.sleep(1.5)
    assert launch.failed_anywhere(False) is False and launch.failed_anywhere(launch.is_main) is True
    assert launch.least(3 + launch.rank) == 3
    return time.monotonic() - started


def test_processes_wait_for_the_main_one_longer_than_for_a_step():
    assert min(on_processes(2, waited)) > 1.4
    assert WAIT.total_seconds() > 24 * 3600
