"""The loss that never holds the logits is Transformers' own, for every family, adapter and way to spread a step."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

from pe_patch.training import memory
from pe_patch.training.chunked import Scorer
from pe_patch.training.data.sequences import LEARN_FROM
from pe_patch.training.loss import next_token_score
from pe_patch.training.recipe import Distill, Loss, RecipeError

from ..families import VOCABULARY, build

CHUNKED, WHOLE = Loss(chunk=7), Loss(chunk=0)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {}, "gpt_neox": {}, "bloom": {}, "opt": {}, "gemma2": {"final_logit_softcapping": 2.0},
    "cohere": {"logit_scale": 0.3}, "granite": {"logits_scaling": 3.0}, "qwen2": {"tie_word_embeddings": True},
}  # fmt: skip
"""With an output layer of each name, tied and not, biased and not, and logits that are capped, scaled and neither."""


def batch(rows: int = 2, length: int = 21) -> tuple[dict[str, Any], Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    labels = ids.clone()
    labels[:, ::4] = -100
    labels[0, 12:] = -100
    return {"input_ids": ids, "use_cache": False}, labels


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def scored(model: Any, loss: Loss = CHUNKED, scale: float = 1.0, **options: Any) -> tuple[Tensor, Any, dict[str, Any]]:
    inputs, labels = batch()
    model.zero_grad()
    distill = {name: options.pop(name) for name in ("distill", "teacher") if name in options}
    objective, score = Scorer(model, loss, **distill)(model, inputs, labels, **options)
    (scale * objective).backward()
    return objective.detach(), score, gradients(model)


def transformers_loss(model: Any, scale: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum over targets of what the family's own forward gives for labels, and its gradient."""
    inputs, labels = batch()
    model.zero_grad()
    loss = model(**inputs, labels=labels).loss * (labels[:, 1:] != -100).sum()
    (scale * loss).backward()
    return loss.detach(), gradients(model)


def assert_same(mine: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert mine.keys() == theirs.keys() and theirs
    largest = max(float(value.abs().max()) for value in theirs.values())
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, rtol=tolerance, atol=tolerance * largest, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_and_its_gradient_are_transformers_own(family: str) -> None:
    model = build(family, **FAMILIES[family])
    mine, score, found = scored(model, scale=0.5)
    theirs, expected = transformers_loss(model, scale=0.5)
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=0)
    assert_same(found, expected)
    assert torch.equal(score.loss, mine) and float(score.correct) == float(score.divergence) == 0


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation has made."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = result if isinstance(result, tuple | list) else [result]
        self.size = max([self.size, *(one.numel() for one in made if isinstance(one, Tensor))])
        return result


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_no_more_than_a_chunk_of_logits_ever_exists(family: str) -> None:
    model = build(family, vocab_size=5000, hidden_size=8, num_hidden_layers=1, intermediate_size=16)
    scorer, (inputs, labels) = Scorer(model, CHUNKED), batch()
    scorer.learn(model)
    sizes = []
    for one in (scorer, Scorer(model, WHOLE)):
        with Largest() as largest:
            one(model, inputs, labels)[0].backward()
        sizes.append(largest.size)
    assert sizes == [max(7 * 5000, 8 * 5000), 2 * 21 * 5000]


def test_labels_shifted_beforehand_are_the_same_targets() -> None:
    model, (inputs, labels) = build("llama"), batch()
    ahead = F.pad(labels[:, 1:], (0, 1), value=-100)
    ours = [
        float(Scorer(model, loss)(model, inputs, given, shifted=shifted)[0].detach())
        for loss in (CHUNKED, WHOLE)
        for given, shifted in ((labels, False), (ahead, True))
    ]
    assert ours == pytest.approx([float(transformers_loss(model)[0])] * 4, rel=1e-6)


def test_a_part_of_the_vocabulary_and_the_hits_are_those_of_whole_logits() -> None:
    model, (inputs, labels) = build("gemma2", std=0.4), batch()
    labels[labels < 40] = -100
    options: dict[str, Any] = {"vocabulary": (40, 97), "accuracy": True}
    logits = model(**inputs).logits
    labels[:, 1::3] = 40 + logits[:, :-1, 40:].argmax(-1)[:, ::3]  # so that some are right
    expected = next_token_score(logits, labels, **options)
    objective, score = Scorer(model, CHUNKED)(model, inputs, labels, **options)
    assert int(score.correct) == int(expected.correct) > 0
    torch.testing.assert_close(score.loss, expected.loss.detach(), rtol=1e-6, atol=0)
    (mine,), (theirs,) = (
        torch.autograd.grad(value, [model.get_output_embeddings().weight]) for value in (objective, expected.loss)
    )
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6 * float(theirs.abs().max()))


def test_a_teacher_of_another_family_is_scored_in_chunks_as_it_is_whole() -> None:
    model, teacher = build("llama"), build("gemma2", final_logit_softcapping=2.0).requires_grad_(False)
    options = {"distill": Distill(weight=3.0, temperature=2.0), "teacher": teacher}
    inputs, labels = batch()
    chosen = labels[:, 1:] != -100
    wanted = (teacher(**inputs).logits[:, :-1][chosen].double() / 2).softmax(-1)
    ours = (model(**inputs).logits[:, :-1][chosen].double() / 2).log_softmax(-1)
    apart = 4 * (wanted * (wanted.log() - ours)).sum()
    plain = transformers_loss(model)[0]
    model.zero_grad()
    (apart * 3 + F.cross_entropy(model(**inputs).logits[:, :-1][chosen], labels[:, 1:][chosen], reduction="sum")
     ).backward()  # fmt: skip
    expected = {name: value.clone() for name, value in gradients(model).items()}
    apart = apart.detach()
    for loss in (CHUNKED, WHOLE):
        objective, score, found = scored(model, loss, **options)
        assert float(score.divergence) == pytest.approx(float(apart), rel=1e-6) and float(apart) > 1
        assert float(score.loss) == pytest.approx(float(plain), rel=1e-6)
        assert float(objective) == pytest.approx(float(plain + 3 * apart), rel=1e-6)
        assert_same(found, expected, 2e-6)


@pytest.mark.parametrize("numbers", [(1, 2), (2, 0), (0, 1), (1, 1), (2, 2)])
@pytest.mark.parametrize("loss", [CHUNKED, WHOLE])
def test_rows_learn_from_the_text_from_the_teacher_or_from_both(loss: Loss, numbers: tuple[int, int]) -> None:
    model, teacher = build("llama"), build("gemma2", final_logit_softcapping=2.0).requires_grad_(False)
    inputs, labels = batch()
    model.zero_grad()
    objective, text, apart, taught = torch.zeros(()), 0.0, 0.0, 0
    for row, number in enumerate(numbers):
        one, chosen = {**inputs, "input_ids": inputs["input_ids"][row][None]}, labels[row, 1:] != -100
        logits = model(**one).logits[0, :-1][chosen]
        entropy = F.cross_entropy(logits, labels[row, 1:][chosen], reduction="sum")
        wanted = (teacher(**one).logits[0, :-1][chosen] / 2).softmax(-1)
        kl = 4 * F.kl_div((logits / 2).log_softmax(-1), wanted, reduction="sum")
        text += float(entropy.detach())
        objective = objective + (entropy if LEARN_FROM[number] != "teacher" else 0)
        if LEARN_FROM[number] != "text":
            objective, apart, taught = objective + 3 * kl, apart + float(kl.detach()), taught + int(chosen.sum())
    objective.backward()
    expected = {name: value.clone() for name, value in gradients(model).items()}
    options = {"distill": Distill(weight=3.0, temperature=2.0), "teacher": teacher}
    _, score, found = scored(model, loss, learn_from=torch.tensor(numbers), **options)
    assert_same(found, expected, 2e-6)
    assert float(score.loss) == pytest.approx(text, rel=1e-6) and int(score.taught) == taught
    assert float(score.divergence) == pytest.approx(apart, rel=1e-5)


@pytest.mark.parametrize(
    "adapter",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"]},
    ],
    ids=["on the layer", "whole layer", "layer frozen"],
)
def test_an_adapter_on_the_output_layer_is_trained(adapter: dict[str, Any]) -> None:
    model: Any = get_peft_model(build("llama"), LoraConfig(r=4, init_lora_weights=False, **adapter))
    mine, _, found = scored(model)
    theirs, expected = transformers_loss(model)
    assert float(mine) == pytest.approx(float(theirs), rel=1e-6)
    assert_same(found, expected)
    assert any("lm_head" in name for name in found) == (adapter != {"target_modules": ["q_proj"]})


def test_autocast_leaves_the_softmax_in_float32() -> None:
    model = build("llama")
    expected = transformers_loss(model)[1]
    with torch.autocast("cpu", torch.bfloat16):
        theirs, rounded = transformers_loss(model)
        mine, score, found = scored(model)
    assert mine.dtype == score.loss.dtype == torch.float32
    assert float(mine) == pytest.approx(float(theirs), rel=1e-4)

    def error(given: dict[str, Tensor]) -> float:
        return sum(float((given[name] - value).norm() / value.norm()) for name, value in expected.items())

    assert error(found) < 1.2 * error(rounded)


def test_a_weight_in_bfloat16_gets_the_sum_over_chunks_rounded_once() -> None:
    """With one target in a chunk: summed in bfloat16, 2000 small gradients would be lost."""
    torch.manual_seed(0)
    model = build("llama", num_hidden_layers=1).to(torch.bfloat16)
    inputs = {"input_ids": torch.full((1, 2001), 5), "use_cache": False}
    Scorer(model, Loss(chunk=1))(model, inputs, inputs["input_ids"])[0].backward()
    weight = model.get_output_embeddings().weight
    hidden = model.model(**inputs).last_hidden_state[:, :-1][0].double()
    exact = weight.detach().double().requires_grad_()
    F.cross_entropy(hidden.detach() @ exact.T, inputs["input_ids"][0, 1:], reduction="sum").backward()
    assert exact.grad is not None
    assert float((weight.grad.double() - exact.grad).norm() / exact.grad.norm()) < 4e-3  # half a unit of bfloat16


def test_without_targets_the_loss_is_zero_and_still_reaches_every_parameter() -> None:
    model, (inputs, labels) = build("llama"), batch()
    objective, score = Scorer(model, CHUNKED)(model, inputs, torch.full_like(labels, -100), accuracy=True)
    objective.backward()
    assert float(objective.detach()) == float(score.loss) == float(score.correct) == 0
    assert gradients(model).keys() == dict(model.named_parameters()).keys()
    assert not any(value.any() for value in gradients(model).values())


def test_the_model_is_left_as_it_was_and_random_numbers_go_on() -> None:
    model, (inputs, labels) = build("opt", dropout=0.5).train(), batch()
    before, state = {name: vars(module).copy() for name, module in model.named_modules()}, torch.get_rng_state()
    scorer = Scorer(model, CHUNKED)
    scorer.learn(model)
    assert torch.equal(torch.get_rng_state(), state)
    objective = scorer(model, inputs, labels)[0]
    with pytest.raises(IndexError):
        scorer(model, {**inputs, "input_ids": inputs["input_ids"] + VOCABULARY}, labels)
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name].keys() and not module._forward_hooks
    objective.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute the loss again"):
        objective.backward()
    with torch.no_grad():
        assert not scorer(model, inputs, labels)[0].requires_grad


def strange(change: Callable[[Any, Tensor], Any]) -> Any:
    class Strange(LlamaForCausalLM):
        def forward(self, *args: Any, **named: Any) -> Any:
            output = super().forward(*args, **named)
            output.logits = change(self, output.logits)
            return output

    model: Any = Strange(build("llama").config)
    model.gain = nn.Parameter(torch.full((), 2.0))
    return model


def test_a_family_whose_logits_are_more_than_rows_of_its_output_layer_is_refused_by_name() -> None:
    mixing = (lambda model, logits: logits.cumsum(1), "other logits for a chunk")
    trained = (lambda model, logits: logits * model.gain, "trains parameters behind")
    elsewhere = (
        lambda model, logits: torch.zeros(logits.shape),
        "more than its output layer",
    )
    for change, said in (mixing, trained, elsewhere):
        model = strange(change)
        with pytest.raises(RecipeError, match=f"Strange.*{said}.*loss.chunk to 0"):
            Scorer(model, CHUNKED).learn(model)
    fine = strange(lambda model, logits: logits.mul_(3).tanh() + logits)
    assert_same(scored(fine)[2], scored(fine, WHOLE)[2])
    model = build("llama")
    model.get_output_embeddings = lambda: None
    with pytest.raises(RecipeError, match="has no output layer"):
        Scorer(model, CHUNKED)


SPREAD = Path(__file__).with_name("spread_loss.py")


def test_two_processes_have_the_gradient_of_one() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(SPREAD)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=SPREAD.parents[2], check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {way: (float(loss), float(gradient)) for way, loss, gradient in map(str.split, done.stdout.splitlines())}
    assert found.keys() == {"ddp", "fsdp"}
    assert max(map(max, found.values())) < 1e-6


@pytest.mark.parametrize("checkpointing", [False, True])
def test_offloaded_activations_give_the_same_gradient_and_leave_weights_where_they_are(
    monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    model: Any = build("llama").train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    expected = {name: value.clone() for name, value in scored(model)[2].items()}
    moved: list[Tensor] = []

    class Away(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self, pin_memory: bool) -> None:
            super().__init__(self.pack, lambda packed: packed[0])

        def pack(self, tensor: Tensor) -> tuple[Tensor]:
            moved.append(tensor)
            return (tensor.clone(),)

    monkeypatch.setattr(memory, "save_on_cpu", Away)
    inputs, labels = batch()
    model.zero_grad()
    with memory.offload_activations(least=512):
        objective, _ = Scorer(model, CHUNKED)(model, inputs, labels)
    objective.backward()
    assert all(torch.equal(value, expected[name]) for name, value in gradients(model).items())
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert not any(one.untyped_storage().data_ptr() in weights or one.nbytes < 512 for one in moved)
    layers = [one for one in moved if one.shape == (2, 21, 64)]
    assert len(layers) >= 2 and not any(VOCABULARY in one.shape for one in moved)
    assert (len(moved) < 12) == checkpointing
