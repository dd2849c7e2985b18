"""Schemes under Transformers' tensor parallelism, on two processes over gloo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pe_patch import patch_model
from pe_patch.errors import UnsupportedError

from ..models import VOCABULARY, build, cached_logits
from .launch import on_processes

CASES: dict[str, dict[str, Any]] = {
    "yarn": {"factor": 4.0}, "self_extend": {"group": 2, "window": 4}, "dynamic_ntk": {}, "alibi": {}, "t5": {},
    "kerple": {}, "sandwich": {}, "fire": {}, "transformer_xl": {}, "shaw": {}, "cope": {}, "rope_alibi": {},
    "learned": {"max_positions": 64},
}  # fmt: skip
LENGTH = 40


def tokens() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(3))


def fill(model: Any) -> Any:
    """Random numbers, the same wherever it is called, in the scheme's own parameters."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.model.position_schemes.scheme.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.1)  # KERPLE's are positive
    return model


def measured(model: Any) -> dict[str, Any]:
    """Logits, also of single decoding steps, and the gradients of the scheme's parameters after two micro-batches."""
    ids = tokens()
    with torch.no_grad():
        logits = model.eval()(ids, use_cache=False).logits
        decoded = cached_logits(model, ids, LENGTH - 8)
        generated = model.generate(ids[:1, :12], max_new_tokens=6, do_sample=False, pad_token_id=0)
    model.train()
    for row in ids:
        model(row[None], labels=row[None], use_cache=False).loss.backward()
    parameters = model.model.position_schemes.scheme.named_parameters()
    gradients = {name: parameter.grad.clone() for name, parameter in parameters if parameter.requires_grad}
    return {"logits": logits, "decoded": decoded, "generated": generated, "gradients": gradients}


def split(folder: str) -> dict[str, Any]:
    """The same of the model whose heads two processes share."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    found: dict[str, Any] = {}
    for name, options in CASES.items():
        model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2))
        torch.manual_seed(torch.distributed.get_rank())
        patch_model(model, name, **options)
        started = [parameter.detach().clone() for parameter in model.model.position_schemes.parameters()]
        found[name] = {**measured(fill(model)), "started": started}
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2))
        patch_model(model, "mla", kv_rank=16, calibration=tokens())
    except UnsupportedError as error:
        found["mla"] = str(error)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("tensor_parallel")
    build("llama").save_pretrained(folder)
    return on_processes(2, split, folder=str(folder))


@pytest.mark.parametrize("name", sorted(CASES))
def test_two_processes_equal_one(found, name):
    wanted = measured(fill(patch_model(build("llama"), name, **CASES[name])))
    for one in found:
        got = one[name]
        torch.testing.assert_close(got["logits"], wanted["logits"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(got["decoded"], wanted["decoded"], atol=1e-5, rtol=1e-5)
        assert torch.equal(got["generated"], wanted["generated"])
        assert got["gradients"].keys() == wanted["gradients"].keys()
        assert not wanted["gradients"] or max(one.abs().max() for one in wanted["gradients"].values()) > 1e-2
        for parameter, gradient in wanted["gradients"].items():
            torch.testing.assert_close(got["gradients"][parameter], gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["kerple", "fire"])
def test_both_processes_start_from_the_same_random_numbers(found, name):
    first, second = (one[name]["started"] for one in found)
    assert first and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_weights_that_are_split_are_not_converted(found):
    assert all("Convert the model on one process" in one["mla"] for one in found)
