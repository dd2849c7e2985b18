"""Frozen weights in 4 bits, and an optimiser whose moments have 8."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from pe_patch import load_patched, patch_model
from pe_patch.patching.peft_record import train_scheme
from pe_patch.training import launch, quantise
from pe_patch.training.launch import Launch
from pe_patch.training.quantise import merge_saved, prepare_quantised, quantisation_config
from pe_patch.training.recipe import Lora, Loss, Model, Optimizer, Recipe, RecipeError
from pe_patch.training.trainer import RecipeTrainer

from ..models import build, tokens
from .cases import phase

IDS = tokens(4, 30)


def recipe(**options: Any) -> Recipe:
    fields = {"version": 1, "output": "run", "model": Model(source="some", quantization="nf4"), "lora": Lora()}
    return Recipe(**{**fields, "phases": [phase()], **options})


def optimizer_of(model: Any, wanted: Optimizer) -> Any:
    """The optimiser that a recipe's trainer gives a model."""
    small = Recipe(output="", optimizer=wanted, phases=[phase()], loss=Loss(chunk=0), dry_run=True)
    return RecipeTrainer(model, Launch(small), small, lambda number, step: iter(())).create_optimizer()


def test_nothing_is_asked_for():
    assert quantisation_config(recipe(model=Model(source="some"))) is None


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lora": None}, "lora: section"),
        ({"model": Model(config={"model_type": "llama"}, quantization="nf4")}, r"model\.source"),
    ],
)
def test_refused(options, says):
    with pytest.raises(RecipeError, match=says):
        quantisation_config(recipe(**options))


def test_without_bitsandbytes(monkeypatch):
    for module in (quantise, launch):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"pe_patch\[qlora\]"):
        quantisation_config(recipe())
    with pytest.raises(RecipeError, match=r"pe_patch\[qlora\]"):
        Launch(recipe(optimizer=Optimizer(name="adamw_8bit")))


def test_adamw_is_torchs_own():
    model = build("llama")
    optimizer = optimizer_of(model, Optimizer(betas=(0.8, 0.9), weight_decay=0.1))
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["fused"]
    matrices, vectors = optimizer.param_groups
    assert matrices["betas"] == (0.8, 0.9) and (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    assert {parameter.ndim for parameter in matrices["params"]} == {2}
    assert {parameter.ndim for parameter in vectors["params"]} == {1}
    assert len(matrices["params"]) + len(vectors["params"]) == len(list(model.parameters()))


needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


@needs_bitsandbytes
def test_the_settings_are_the_papers():
    config: Any = quantisation_config(recipe(mixed_precision="bf16"))
    assert (config.load_in_4bit, config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == (True, "nf4", True)
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    plain: Any = quantisation_config(recipe())
    assert plain.bnb_4bit_compute_dtype == torch.float32


@needs_bitsandbytes
def test_qlora_on_a_patched_model(tmp_path: Path):
    build("llama").save_pretrained(tmp_path / "base")
    wanted = recipe(model=Model(source=str(tmp_path / "base"), quantization="nf4"))
    config = quantisation_config(wanted)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config)
    model = prepare_quantised(patch_model(model, "t5"), wanted)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.model.layers[0].self_attn.q_proj.weight.dtype == torch.uint8
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")).train()
    assert train_scheme(model) == ["0.table"]
    optimizer = optimizer_of(model, wanted.optimizer)
    table = model.get_base_model().model.position_schemes.scheme[0].table.clone()
    losses = []
    for _ in range(2):
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 1e-2
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[1] < losses[0]
    assert not torch.equal(table, model.get_base_model().model.position_schemes.scheme[0].table)
    model.save_pretrained(tmp_path / "adapter")
    again = load_patched(tmp_path / "adapter", is_trainable=True, quantization_config=config).train()
    with torch.no_grad():  # in training mode: in the other one bitsandbytes multiplies in bfloat16 on some CPUs
        assert torch.allclose(again(IDS).logits, model(IDS).logits, atol=1e-5)
    merged = merge_saved(tmp_path / "adapter", torch.float32)
    expected = load_patched(tmp_path / "adapter", dtype=torch.float32)
    assert merged.config.pe_patch["scheme"] == "t5" and not hasattr(merged.config, "quantization_config")
    with torch.no_grad():
        assert torch.allclose(merged.eval()(IDS).logits, expected(IDS).logits, atol=1e-4)


@needs_bitsandbytes
def test_eight_bits_need_a_quarter_and_resume_exactly():
    def make() -> tuple[torch.nn.Parameter, Any]:
        model = build("llama", hidden_size=128, num_hidden_layers=1)
        weight = model.model.layers[0].self_attn.q_proj.weight
        with torch.no_grad():
            weight.copy_(torch.linspace(-1, 1, weight.numel()).view_as(weight))
        optimizer = optimizer_of(model, Optimizer(name="adamw_8bit", weight_decay=0.1))
        optimizer.param_groups[0]["lr"] = 1e-3
        return weight, optimizer

    def step(weight: torch.nn.Parameter, optimizer: Any, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()

    weight, optimizer = make()
    exact = torch.nn.Parameter(weight.detach().clone())
    reference = torch.optim.AdamW([exact], lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    for number in range(3):
        step(weight, optimizer, number), step(exact, reference, number)
    size = sum(value.nbytes for value in optimizer.state[weight].values() if isinstance(value, torch.Tensor))
    assert size < 0.3 * 8 * weight.numel()
    assert float((weight - exact).detach().abs().max()) < 1e-3  # a third of what three steps can move it
    assert float((weight - exact).detach().abs().mean()) < 1e-4
    other, resumed = make()
    other.data.copy_(weight.data)
    resumed.load_state_dict(optimizer.state_dict())
    for one, its in ((weight, optimizer), (other, resumed)):
        step(one, its, 3)
    assert torch.equal(weight, other)


@needs_bitsandbytes
def test_eight_bits_are_not_sharded():
    wanted = recipe(optimizer=Optimizer(name="adamw_8bit"), model=Model(source="some"))
    one = Launch(wanted)
    one.uses_fsdp = True
    with pytest.raises(RecipeError, match="FSDP2"):
        one.refuse(wanted, build("llama"))
