"""Raise an error that names each feature that a launch would drop, before training starts."""

from __future__ import annotations

import os
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pe_patch import patch_model
from pe_patch.attention.parallel import ulysses_of
from pe_patch.errors import NoEffectError, UnsupportedError
from pe_patch.training.launch import Launch, refuse_under_context_parallel, refuse_under_ulysses, set_rows
from pe_patch.training.recipe import Data, Distill, Model, Phase, Pose, Recipe, RecipeError

from ..models import build
from .launch import on_processes

RECIPE = Recipe(output="x", phases=[Phase(length=64, batch=2)])


def patched(scheme: str = "alibi", family: str = "llama", **options: Any) -> Any:
    return patch_model(build(family), scheme, **options)


@pytest.mark.parametrize(
    ("recipe", "parts", "told"),
    [
        (RECIPE, 3, "4 heads among 3"),
        (replace(RECIPE, distill=Distill()), 2, "distill"),
        (replace(RECIPE, phases=[Phase(length=65, batch=2)]), 2, r"length=65"),
        (replace(RECIPE, model=Model(shifted_groups=4)), 2, "shifted_groups"),
    ],
)
def test_under_ulysses(recipe, parts, told):
    with pytest.raises(RecipeError, match=told):
        refuse_under_ulysses(recipe, patched(), parts)


def test_models_that_ulysses_does_not_support():
    with pytest.raises(RecipeError, match=r"scheme: \{name: rope\}"):
        refuse_under_ulysses(RECIPE, build("llama"), 2)
    with pytest.raises(RecipeError, match="interface, which Ulysses replaces"):
        refuse_under_ulysses(RECIPE, patched("alibi", "bloom"), 2)
    with pytest.raises(RecipeError, match="neither eager nor flex"):
        refuse_under_ulysses(RECIPE, patched("alibi", backend="eager"), 2)
    ids = torch.randint(1, 90, (4, 32))
    with pytest.raises(RecipeError, match="latents"):
        refuse_under_ulysses(RECIPE, patched("mla", kv_rank=16, calibration=ids), 2)
    refuse_under_ulysses(RECIPE, patched(), 4)


CP = replace(RECIPE, data=Data(boundaries=False))


@pytest.mark.parametrize(
    ("scheme", "options", "recipe", "told"),
    [
        ("alibi", {}, CP, "alibi acts at the scores"),
        ("dynamic_ntk", {}, CP, "dynamic_ntk acts at the scores"),
        ("self_extend", {"group": 2, "window": 4}, CP, "self_extend acts at the scores"),
        ("yarn", {"factor": 2.0}, RECIPE, "data.boundaries"),
        ("yarn", {"factor": 2.0}, replace(CP, distill=Distill()), "distill"),
        ("yarn", {"factor": 2.0}, replace(CP, phases=[Phase(length=64, batch=2, pose=Pose(target=128))]), "pose"),
        ("yarn", {"factor": 2.0}, replace(CP, phases=[Phase(length=66, batch=2)]), "a multiple of 4"),
        ("yarn", {"factor": 2.0, "backend": "eager"}, CP, "only sdpa"),
    ],
)
def test_under_context_parallelism(scheme, options, recipe, told):
    with pytest.raises(RecipeError, match=told):
        refuse_under_context_parallel(recipe, patched(scheme, **options), 2)


def test_context_parallelism_takes_static_rotations():
    refuse_under_context_parallel(CP, patched("yarn", factor=2.0), 2)
    refuse_under_context_parallel(CP, build("llama"), 2)


def as_if(**changes: Any) -> Launch:
    """The launch of one process, changed into what only several processes are."""
    launch = Launch(RECIPE)
    for name, value in changes.items():
        setattr(launch, name, value)
    return launch


def test_combinations_that_shard_nothing_right():
    quantised, bf16 = replace(RECIPE, model=Model(quantization="nf4")), replace(RECIPE, mixed_precision="bf16")
    with pytest.raises(RecipeError, match="FSDP2 cannot shard 4-bit"):
        as_if(uses_fsdp=True).refuse(quantised, build("llama"))
    with pytest.raises(RecipeError, match="ZeRO-3 cannot shard 4-bit"):
        as_if(deepspeed={}, stage=3).refuse(quantised, build("llama"))
    with pytest.raises(RecipeError, match="zero_stage to 1"):
        as_if(deepspeed={}, stage=0).refuse(bf16, build("llama"))
    as_if(deepspeed={}, stage=1).refuse(bf16, build("llama"))


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_USE_CPU": "true"}, "use_cpu"),
        ({"ACCELERATE_USE_FSDP": "true"}, "one process"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"}, "tp_size"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_SP_SIZE": "2"}, "sp_size: Ulysses needs"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_CP_SIZE": "2"}, "cp_size.* needs FSDP2"),
    ],
)
def test_launches_that_are_refused(environment, told, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError, match=told):
        Launch(RECIPE)


def test_a_tracker_that_does_not_exist_is_named():
    with pytest.raises(RecipeError, match="trackers: 'tensorbord'"):
        Launch(replace(RECIPE, trackers=["tensorbord"]))


def test_rows_are_told_to_ulysses():
    shapes = {f"required_{name}_shape": torch.Size([1, 1, 4, 8]) for name in ("query", "key_value", "context")}
    ulysses = SimpleNamespace(batch_size=1, **shapes)
    set_rows(ulysses, 3)
    assert ulysses.batch_size == 3 and ulysses.required_key_value_shape == (1, 3, 4, 8)


def test_attention_that_something_unknown_stands_before(monkeypatch):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = patched()
    ids = torch.randint(1, 90, (1, 8))
    model(ids)
    assert ulysses_of("pe_sdpa") is None
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "pe_sdpa", lambda *a, **k: None)
    with pytest.raises(NoEffectError, match="Something other than DeepSpeed's Ulysses"):
        model(ids)


def test_attention_whose_masks_context_parallelism_takes_away():
    from accelerate.big_modeling import _attach_context_parallel_hooks

    model, rotary = patched("t5"), patched("yarn", factor=2.0)
    for one in (model, rotary):
        _attach_context_parallel_hooks(one)
    ids = torch.randint(1, 90, (1, 8))
    rotary(ids)
    with pytest.raises(UnsupportedError, match="Context parallelism"):
        model(ids)


def launched() -> str:
    try:
        return Launch(RECIPE).describe()
    except RecipeError as error:
        return str(error)


def in_parts() -> str:
    """With a model that DeepSpeed's configuration asks to load in parts."""
    os.environ["ACCELERATE_USE_CPU"] = "false"
    return launched()


def test_launches_are_recognised():
    # Plain torchrun, where accelerate would see no processes.
    assert all("2 x cpu" in one for one in on_processes(2, launched, {"ACCELERATE_USE_CPU": "false"}))
    found = on_processes(2, launched, {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"})
    assert all("FSDP does not run on CPUs" in one and "cpu_ddp.yaml" in one for one in found)
    zero3_init = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
                  "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true"}  # fmt: skip
    assert "zero3_init_flag" in on_processes(1, in_parts, zero3_init)[0]
