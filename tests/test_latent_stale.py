"""Decoding over latents multiplies by the weights of the moment, whatever has become of them since the last step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pe_patch import patch_model

from .families import build as family
from .models import build, cached_logits, error, logits, tokens

peft = pytest.importorskip("peft")

TOLERANCE = 1e-5
IDS = tokens(2, 12)
KINDS = pytest.mark.parametrize("kind", ["native", "converted", "converted, own rotary keys", "converted, norms"])


def model_of(kind: str) -> tuple[Any, list[str]]:
    """A patched model of one layer, so that no cache depends on the weights that expand it; and their names."""
    if kind == "native":
        model = family("deepseek_v3", num_hidden_layers=1, first_k_dense_replace=1)
        return patch_model(model, "mla"), ["kv_b_proj"]
    model = build("qwen3" if "norms" in kind else "llama", num_hidden_layers=1)
    method = {"method": "mha2mla", "svd": "split", "rope_dim": 4} if "own" in kind else {}
    return patch_model(model, "mla", kv_rank=20, calibration=tokens(4, 64), **method), ["k_b_proj", "v_b_proj"]


def projections(model: Any) -> list[nn.Module]:
    names = ("kv_b_proj", "k_b_proj", "v_b_proj")
    return [module for name, module in model.named_modules() if name.split(".")[-1] in names]


@torch.no_grad()
def prompt(model: Any) -> Any:
    """A cache with all but the last token."""
    return model(input_ids=IDS[:, :-1], use_cache=True).past_key_values


@torch.no_grad()
def step(model: Any, cache: Any) -> Tensor:
    """Logits of the last token; the cache stays as it is."""
    return model(input_ids=IDS[:, -1:], past_key_values=copy.deepcopy(cache), use_cache=True).logits


def follows(model: Any, change: Callable[[], Any], moves: bool = True, tolerance: float = TOLERANCE) -> None:
    """A step before and one after `change`, on one cache with no pass between them that would drop anything, is a full
    pass, which expands."""
    cache = prompt(model)
    before = step(model, cache)
    assert error(before, logits(model, IDS)[:, -1:]) < tolerance
    cache = prompt(model)
    step(model, cache)
    change()
    found = step(model, cache)
    assert error(found, logits(model, IDS)[:, -1:]) < tolerance
    assert (error(found, before) > 1e-2) == moves


def adapted(model: Any, targets: list[str], **options: Any) -> Any:
    """With LoRA whose weights are random on the projections that expand latents, and a second adapter."""
    torch.manual_seed(3)
    given = {"r": 4, "lora_alpha": 16, "target_modules": targets, "init_lora_weights": False, **options}
    made = peft.get_peft_model(model, peft.LoraConfig(**given))
    made.add_adapter("second", peft.LoraConfig(**given))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name and name.endswith("bias"):
                parameter.normal_()
    return made.eval()


def stepped(model: Any) -> None:
    """One step of an optimiser on the projections."""
    parameters = [one for module in projections(model) for one in module.parameters()]
    for one in parameters:
        one.requires_grad_()
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def other_state(model: Any) -> dict[str, Tensor]:
    names = ("kv_b_proj", "k_b_proj", "v_b_proj")
    chosen = {k: v for k, v in model.state_dict().items() if any(name in k for name in names)}
    return {name: torch.randn_like(tensor) * 0.3 for name, tensor in chosen.items()}


def replaced(model: Any) -> None:
    for module in projections(model):
        for parameter in module.parameters():
            parameter.data = torch.randn_like(parameter) * 0.3


def scaled_in_place(model: Any) -> None:
    with torch.no_grad():
        for module in projections(model):
            for parameter in module.parameters():
                parameter.mul_(1.5)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "optimiser": stepped,
    "load_state_dict": lambda model: model.load_state_dict(other_state(model), strict=False),
    "data": replaced,
    "in place": scaled_in_place,
}


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("change", CHANGES)
@KINDS
def test_changed_weights(kind, change, wrapped):
    model, targets = model_of(kind)
    if wrapped:
        model = adapted(model, targets)
    follows(model, lambda: CHANGES[change](model))
    with torch.inference_mode():
        assert error(step(model, prompt(model)), logits(model, IDS)[:, -1:]) < TOLERANCE


@KINDS
def test_changed_in_inference_mode(kind):
    model, targets = model_of(kind)
    model = adapted(model, targets)
    with torch.inference_mode():
        follows(model, lambda: scaled_in_place(model))


@KINDS
def test_data_changed_in_place_shows_at_once_or_with_the_next_prompt(kind):
    model, targets = model_of(kind)
    follows(model, lambda: [one.weight.data.mul_(1.5) for one in projections(model)])
    model = adapted(model, targets)
    cache = prompt(model)
    step(model, cache)
    for module in projections(model):
        for parameter in module.parameters():
            parameter.data.mul_(1.5)
    cache = prompt(model)
    assert error(step(model, cache), logits(model, IDS)[:, -1:]) < TOLERANCE


@pytest.mark.parametrize("options", [{}, {"lora_bias": True}, {"use_dora": True}], ids=["plain", "bias", "dora"])
@KINDS
def test_lora(kind, options):
    model, targets = model_of(kind)
    plain = step(model, prompt(model))
    model = adapted(model, targets, **options)
    active = step(model, prompt(model))
    assert error(active, plain) > 1e-2

    def disabled() -> None:
        with model.disable_adapter():
            assert error(step(model, cache), plain) < TOLERANCE

    cache = prompt(model)
    follows(model, disabled, moves=False)
    follows(model, lambda: model.set_adapter("second"))
    if not options.get("use_dora"):
        follows(model, lambda: [one.set_scale("second", 3.0) for one in projections(model)])
    model.set_adapter("default")
    if options.get("lora_bias"):
        return  # PEFT merges it into layers that have a bias only
    follows(model, model.merge_adapter, moves=False)
    assert error(step(model, cache), active) < 1e-4
    follows(model, model.unmerge_adapter, moves=False)
    assert error(step(model, cache), active) < 1e-4
    whole = model.merge_and_unload()
    assert all(type(one) is nn.Linear for one in projections(whole))
    assert error(step(whole, cache), active) < 1e-4


def test_lora_under_a_patch_is_lora_over_it():
    above, targets = model_of("native")
    above = adapted(above, targets)
    below = family("deepseek_v3", num_hidden_layers=1, first_k_dense_replace=1)
    below = patch_model(adapted(below, targets), "mla")
    assert error(step(below, prompt(below)), step(above, prompt(above))) < TOLERANCE


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 1e-2), (torch.bfloat16, 6e-2), (torch.float64, 1e-6)])
@KINDS
def test_another_dtype(kind, dtype, tolerance):
    """Sixteen bits against a full pass in the same dtype."""
    model, targets = model_of(kind)
    for one in (model, adapted(copy.deepcopy(model), targets)):
        step(one, prompt(one))
        one.to(dtype)
        found, expected = step(one, prompt(one)), logits(one, IDS)[:, -1:]
        assert found.dtype == dtype and error(found.double(), expected.double()) < tolerance


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen2", "qwen3", "gpt_neox"])
def test_weights_that_are_offloaded(name):
    """accelerate brings them in around the forward of the module that holds them, and away again."""
    accelerate = pytest.importorskip("accelerate")
    model = family(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    given = {} if name == "deepseek_v3" else {"kv_rank": 12, "calibration": tokens(4, 64)}
    patch_model(model, "mla", **given)
    expected = logits(model, IDS)
    model = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(one.is_meta for one in model.parameters())
    assert error(logits(model, IDS), expected) < TOLERANCE
    assert error(cached_logits(model, IDS, 8), expected) < TOLERANCE


def test_lora_in_one_compiled_graph():
    model, targets = model_of("converted")
    model = adapted(model, targets, lora_bias=True)
    cache = prompt(model)
    expected = logits(model, IDS)[:, -1:]
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
        found = compiled(input_ids=IDS[:, -1:], past_key_values=cache, use_cache=True).logits
    assert error(found, expected) < TOLERANCE
