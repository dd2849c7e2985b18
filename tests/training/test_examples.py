"""Trainers that are not ours: a patched model trains, is saved and resumed in them, and packed documents stay apart."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorWithFlattening, Trainer, TrainingArguments

from pe_patch import load_adapter, load_patched, patch_model
from pe_patch.errors import MismatchError
from recipes.examples import transformers_trainer

from ..models import VOCABULARY, build, tokens

SCHEMES: dict[str, dict[str, Any]] = {
    "yarn": {"factor": 4.0},
    "alibi": {},
    "t5": {},
    "self_extend": {"group": 4, "window": 8},
}
LENGTHS = (9, 30, 17, 24)


def arguments(text: Path, model: Path, output: Path, steps: int = 2) -> list[str]:
    given = {"text": text, "model": model, "output": output, "steps": steps, "length": 64}
    return [word for key, value in given.items() for word in (f"--{key}", str(value))]


def test_transformers_trainer_saves_the_scheme_and_resumes(text, model, tmp_path):
    words = arguments(text, model, tmp_path, steps=4)
    straight = transformers_trainer.main(words)
    weights = {name: tensor.clone() for name, tensor in straight.model.state_dict().items()}
    for folder in (tmp_path, tmp_path / "checkpoint-2"):
        assert json.loads((folder / "config.json").read_text())["pe_patch"]["scheme"] == "yarn"
    shutil.rmtree(tmp_path / "checkpoint-4")
    resumed = transformers_trainer.main([*words, "--resume"])
    assert resumed.state.global_step == 4
    again = load_patched(tmp_path).state_dict()
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, weights[name]) and torch.equal(tensor, again[name]), name
    start = AutoModelForCausalLM.from_pretrained(model).state_dict()
    assert not torch.equal(start["model.embed_tokens.weight"], weights["model.embed_tokens.weight"])


def test_trl_saves_an_adapter_that_knows_the_scheme(text, model, tmp_path):
    pytest.importorskip("trl")
    from recipes.examples import trl_sft

    trainer = trl_sft.main(arguments(text, model, tmp_path))
    assert trainer.state.global_step == 2
    for folder in (tmp_path, tmp_path / "checkpoint-2"):
        assert json.loads((folder / "adapter_config.json").read_text())["pe_patch"]["options"] == {"factor": 4.0}
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        assert torch.equal(load_patched(tmp_path)(ids).logits, trainer.model.eval()(ids).logits)
    with pytest.raises(MismatchError, match="not patched"):
        load_adapter(AutoModelForCausalLM.from_pretrained(model), tmp_path)
    with pytest.raises(KeyError, match=r"pe_patch.load_adapter"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), tmp_path)


def test_trainer_resumes_an_adapter(model, tmp_path):
    """And asks, when it does, whether the scheme is the one that the checkpoint was trained under."""

    def trainer(scheme: str) -> Trainer:
        torch.manual_seed(0)
        patched = patch_model(AutoModelForCausalLM.from_pretrained(model, attention_dropout=0.0), scheme, factor=4)
        patched = get_peft_model(patched, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        settings = TrainingArguments(str(tmp_path), max_steps=2, save_steps=1, report_to="none", use_cpu=True)
        rows = Dataset.from_dict({"input_ids": tokens(8, 20).tolist()})
        return Trainer(patched, settings, train_dataset=rows, data_collator=DataCollatorWithFlattening())

    first = trainer("yarn")
    first.train()
    shutil.rmtree(tmp_path / "checkpoint-2")
    second = trainer("yarn")
    second.train(resume_from_checkpoint=True)
    for (name, ours), theirs in zip(second.model.named_parameters(), first.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    with pytest.raises(MismatchError, match="yarn"):
        trainer("pi").train(resume_from_checkpoint=True)


@pytest.fixture(params=SCHEMES)
def patched(request: Any) -> Any:
    return patch_model(build("llama", max_position_embeddings=16), request.param, **SCHEMES[request.param])


@pytest.fixture
def documents() -> list[list[int]]:
    return [tokens(1, length, seed=length)[0].tolist() for length in LENGTHS]


def separately(model: Any, documents: list[list[int]]) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean loss of the targets and its gradient, each document by itself and by Transformers' own loss."""
    targets = sum(len(document) - 1 for document in documents)
    total = 0.0
    for document in documents:
        ids = torch.tensor([document])
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss * (len(document) - 1) / targets
        loss.backward()
        total += float(loss.detach())
    return total, gradients(model)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return found


def check(found: tuple[float, dict[str, torch.Tensor]], expected: tuple[float, dict[str, torch.Tensor]]) -> None:
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert torch.allclose(found[1][name], gradient, atol=1e-5), name


def sft(model: Any, documents: list[list[int]], tokenizer: Any, output: Path, **options: Any) -> Any:
    trl = pytest.importorskip("trl")
    settings = trl.SFTConfig(str(output), report_to="none", bf16=False, gradient_checkpointing=False, **options)
    rows = Dataset.from_dict({"input_ids": documents})
    return trl.SFTTrainer(model, settings, train_dataset=rows, processing_class=tokenizer)


@pytest.mark.parametrize(
    "options", [{"packing": True, "max_length": 64}, {"padding_free": True, "max_length": None}, {}]
)
def test_trl_keeps_packed_documents_apart(options, patched, documents, model, tmp_path):
    expected = separately(patched, documents)
    trainer = sft(patched, documents, AutoTokenizer.from_pretrained(model), tmp_path, **options)
    batch = trainer.data_collator(list(trainer.train_dataset))
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    check((float(loss.detach()), gradients(patched)), expected)


def test_trl_on_a_family_without_position_ids(documents, model, tmp_path):
    """BLOOM's own forward takes none; the patched one does, also past the head that TRL leaves out."""
    patched = patch_model(build("bloom"), "rope", original_max_position_embeddings=64)
    expected = separately(patched, documents)
    trainer = sft(patched, documents, AutoTokenizer.from_pretrained(model), tmp_path, packing=True, max_length=64)
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(list(trainer.train_dataset)))
    loss.backward()
    check((float(loss.detach()), gradients(patched)), expected)


def test_flattened_documents_stay_apart(patched, documents):
    expected = separately(patched, documents)
    batch = DataCollatorWithFlattening()([{"input_ids": document} for document in documents])
    assert batch["input_ids"].shape == (1, sum(LENGTHS)) and max(map(max, documents)) < VOCABULARY
    loss = patched(**batch, use_cache=False).loss
    loss.backward()
    check((float(loss.detach()), gradients(patched)), expected)
