"""The same three steps on one process and on several, under every kind of parallelism that a CPU can run."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
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
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
LAUNCHES: dict[str, tuple[int, dict[str, str], dict[str, Any]]] = {
    "ddp": (2, {}, SCHEMES),
    "fsdp2": (2, FSDP2, SCHEMES),
    "zero3": (2, {**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, SCHEMES),
    "ulysses_2": (2, {**ULYSSES, "PARALLELISM_CONFIG_SP_SIZE": "2", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"},
                  {**SCHEMES, **MORE}),
    "ulysses_4": (4, {**ULYSSES, "PARALLELISM_CONFIG_SP_SIZE": "4", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, SCHEMES),
    "ulysses_2_zero3": (2, {**ULYSSES, "PARALLELISM_CONFIG_SP_SIZE": "2", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
                        {"t5": {}}),
}  # fmt: skip
"""Processes, what the launcher sets, and the schemes."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tmp_path_factory.mktemp("launches")


@cache
def alone(folder: Path) -> dict[str, Any]:
    return on_processes(1, steps.run, schemes={**SCHEMES, **MORE}, folder=str(folder / "alone"))[0]


@cache
def together(launch: str, folder: Path, resume: bool = False) -> list[dict[str, Any]]:
    world, environment, schemes = LAUNCHES[launch]
    function = steps.run_fsdp2 if launch == "fsdp2" else steps.run
    if resume:
        together(launch, folder)
        schemes = {"t5": {}}
    return on_processes(world, function, environment, schemes=schemes, folder=str(folder / launch), resume=resume)


MOST = ("ddp", "fsdp2", "zero3", "ulysses_2")
EACH = [pytest.param(launch, marks=[] if launch in MOST else [pytest.mark.thorough]) for launch in LAUNCHES]
CASES = [
    pytest.param(launch, scheme, id=f"{launch}-{scheme}", marks=[] if launch in MOST else [pytest.mark.thorough])
    for launch, (_, _, schemes) in LAUNCHES.items()
    for scheme in schemes
]


def assert_same(got: dict[str, Any], wanted: dict[str, Any], first: int = 0) -> None:
    assert got["losses"] == pytest.approx(wanted["losses"][first:], abs=1e-5)
    assert got["norms"] == pytest.approx(wanted["norms"][first:], abs=1e-5)
    assert got["targets"] == wanted["targets"][first:]
    if not got["weights"]:  # gathered on the main process alone
        return
    assert got["weights"].keys() == wanted["weights"].keys()
    for name, weight in wanted["weights"].items():
        torch.testing.assert_close(got["weights"][name], weight, atol=1e-4, rtol=0, msg=name)


@pytest.mark.parametrize(("launch", "scheme"), CASES)
def test_several_processes_do_what_one_does(launch, scheme, folder):
    found = [one[scheme] for one in together(launch, folder)]
    assert found[0]["weights"]
    for got in found:
        assert_same(got, alone(folder)[scheme])


@pytest.mark.parametrize("launch", EACH)
def test_a_checkpoint_of_several_processes_is_resumed(launch, folder):
    """From step 1, by new processes with a model that starts from other weights."""
    for got in together(launch, folder, resume=True):
        assert_same(got["t5"], alone(folder)["t5"], first=1)


def test_training_moves_the_weights(folder):
    """What the comparison above would not see."""
    before = steps.model_under("t5", {}).state_dict()
    after = alone(folder)["t5"]
    assert (
        after["weights"]["model.position_schemes.scheme.0.table"] - before["model.position_schemes.scheme.0.table"]
    ).abs().max() > 1e-3
    assert all(math.isfinite(loss) for loss in after["losses"]) and len(set(after["losses"])) == steps.STEPS


NAMES = {
    "ddp": "DDP", "fsdp2": "FSDP2", "zero3": "ZeRO-3", "ulysses_2": "ZeRO-0, sequences in 2 parts",
    "ulysses_4": "ZeRO-1, sequences in 4", "ulysses_2_zero3": "ZeRO-3, sequences in 2 parts",
}  # fmt: skip


@pytest.mark.parametrize("launch", EACH)
def test_each_launch_is_what_it_was_meant_to_be(launch, folder):
    assert NAMES[launch] in together(launch, folder)[0]["t5"]["name"]
