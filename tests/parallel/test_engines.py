"""The same three steps on one process and on several, under every engine that a CPU can run."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch

from . import steps
from .launch import on_processes
from .steps import MORE, SCHEMES

DEEPSPEED = {
    "ACCELERATE_USE_CPU": "false",
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
}
ULYSSES = {**DEEPSPEED, "ACCELERATE_USE_PARALLELISM_CONFIG": "true"}
LAUNCHES: dict[str, tuple[int, dict[str, str], dict[str, Any]]] = {
    "ddp": (2, {}, SCHEMES),
    "fully_shard": (2, {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, SCHEMES),
    "ulysses_2": (2, {**ULYSSES, "PARALLELISM_CONFIG_SP_SIZE": "2", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"},
                  {**SCHEMES, **MORE}),
    "ulysses_4": (4, {**ULYSSES, "PARALLELISM_CONFIG_SP_SIZE": "4", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, SCHEMES),
    "ulysses_2_zero3": (2, {**ULYSSES, "PARALLELISM_CONFIG_SP_SIZE": "2", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
                        {"t5": {}}),
}  # fmt: skip
"""Processes, what the launcher sets, and the schemes."""


@cache
def alone() -> dict[str, Any]:
    return on_processes(1, steps.run, schemes={**SCHEMES, **MORE})[0]


@cache
def together(launch: str, folder: str) -> list[dict[str, Any]]:
    world, environment, schemes = LAUNCHES[launch]
    return on_processes(world, steps.run, environment, schemes=schemes, folder=folder)


CASES = [(launch, scheme) for launch, (_, _, schemes) in LAUNCHES.items() for scheme in schemes]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tmp_path_factory.mktemp("engines")


@pytest.mark.parametrize(("launch", "scheme"), CASES, ids=["-".join(case) for case in CASES])
def test_several_processes_do_what_one_does(launch, scheme, folder):
    """Under t5 the first step goes through a checkpoint, between which and its loading all weights are changed."""
    wanted, found = alone()[scheme], together(launch, str(folder / launch))
    for rank, one in enumerate(found):
        got = one[scheme]
        assert got["losses"] == pytest.approx(wanted["losses"], abs=1e-5)
        assert got["norms"] == pytest.approx(wanted["norms"], abs=1e-5)
        if not got["weights"] and rank:  # gathered on the main process alone
            continue
        assert got["weights"].keys() == wanted["weights"].keys()
        for name, weight in wanted["weights"].items():
            torch.testing.assert_close(got["weights"][name], weight, atol=1e-4, rtol=0, msg=name)


def test_training_moves_the_weights():
    """What the comparison above would not see."""
    before = steps.model_under("t5", {}).state_dict()
    after = alone()["t5"]
    assert (
        after["weights"]["model.position_schemes.scheme.0.table"] - before["model.position_schemes.scheme.0.table"]
    ).abs().max() > 1e-3
    assert all(math.isfinite(loss) for loss in after["losses"]) and len(set(after["losses"])) == steps.STEPS


def test_each_launch_is_what_it_was_meant_to_be(folder):
    told = {launch: together(launch, str(folder / launch))[0]["t5"]["name"] for launch in LAUNCHES}
    assert "accelerate" in told["ddp"] and "fully_shard" in told["fully_shard"]
    assert "ZeRO-0, sequences in 2 parts" in told["ulysses_2"] and "ZeRO-1, sequences in 4" in told["ulysses_4"]
    assert "ZeRO-3, sequences in 2 parts" in told["ulysses_2_zero3"]
