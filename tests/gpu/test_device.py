"""Every scheme on a GPU: each backend against eager, half precision, a compiled step, a training step.

`benchmarks/gpu.sh` runs these. PE_PATCH_DEVICE=cpu rehearses them on a CPU.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from pe_patch import unpatch_model
from pe_patch.errors import UnsupportedError
from tests.models import CASES, build, cached_logits, error, logits, put, tokens

DEVICE = os.environ.get("PE_PATCH_DEVICE", "cuda" if torch.cuda.is_available() else "")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not DEVICE, reason="needs a GPU, or PE_PATCH_DEVICE=cpu")]
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Of logits of about 1: a GPU multiplies float32 in TF32 or sums in another order."""


def on_device(name: str, backend: str, dtype: torch.dtype = torch.float32) -> Any:
    """A small Llama under a scheme, which is given its weights on the CPU."""
    model = build("llama")
    try:
        put(model, name, backend=backend)
    except UnsupportedError as refused:
        if backend in ("sdpa", "eager"):  # every scheme runs on these
            raise
        pytest.skip(str(refused)[:120])
    return model.to(DEVICE, dtype)


@pytest.mark.parametrize("backend", ["sdpa", "flex", "flash"])
@pytest.mark.parametrize("name", CASES)
def test_each_backend_equals_eager(name: str, backend: str) -> None:
    dtype = torch.bfloat16 if backend == "flash" else torch.float32
    expected = logits(on_device(name, "eager", dtype), tokens(2, 48).to(DEVICE))
    found = logits(on_device(name, backend, dtype), tokens(2, 48).to(DEVICE))
    assert error(found.float(), expected.float()) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", CASES)
def test_generation_equals_eager(name: str) -> None:
    ids = tokens(1, 44).to(DEVICE)
    expected, found = (cached_logits(on_device(name, backend), ids, 40) for backend in ("eager", "sdpa"))
    assert error(found, expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("name", CASES)
def test_half_precision_and_a_training_step(name: str) -> None:
    model = on_device(name, "sdpa", torch.bfloat16)
    if "mla" not in name:  # its projections are frozen in some modes
        model.train()
    ids = tokens(2, 40).to(DEVICE)
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert gradients and all(bool(gradient.isfinite().all()) for gradient in gradients) and bool(loss.isfinite())


@pytest.mark.parametrize("name", ["rope", "yarn", "dynamic_ntk", "alibi", "self_extend", "t5"])
def test_a_compiled_pass_equals_eager(name: str) -> None:
    model = on_device(name, "sdpa")
    ids = tokens(1, 40).to(DEVICE)
    expected = logits(model, ids)
    found = logits(torch.compile(model), ids)
    assert error(found, expected) < TOLERANCE[torch.float32]


def test_undo_on_the_device() -> None:
    model = build("llama").to(DEVICE)
    ids = tokens(1, 40).to(DEVICE)
    native = logits(model, ids)
    put(model, "self_extend")
    assert not torch.equal(logits(model, ids), native)
    unpatch_model(model)
    assert torch.equal(logits(model, ids), native)
