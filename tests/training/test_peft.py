"""An adapter knows the scheme it was trained under: saved with it, asked for on loading, kept by a merge."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from packaging.version import Version
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, PromptTuningConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.integrations.peft import MIN_PEFT_VERSION

from pe_patch import PePatchError, load_patched, patch_model, unpatch_model
from pe_patch.errors import CheckpointError, MismatchError, OptionError
from pe_patch.patching.peft_record import train_scheme

from ..models import VOCABULARY, build, tokens

TARGETS = {"llama": ["q_proj", "v_proj"], "bloom": ["query_key_value"]}
YARN = {"scheme": "yarn", "factor": 4.0}
IDS = tokens(2, 40)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    build("llama").save_pretrained(folder)
    return folder


def loaded(base: Path, scheme: str | None = None, **options: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base)
    return model if scheme is None else patch_model(model, scheme, **options)


def lora(family: str = "llama", **options: Any) -> LoraConfig:
    return LoraConfig(r=4, target_modules=TARGETS[family], task_type="CAUSAL_LM", **options)


def shaken(model: Any) -> Any:
    """Every weight that trains moved, as training would."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def stored(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.fixture(scope="module")
def trained(base: Path) -> Any:
    return shaken(get_peft_model(loaded(base, **YARN), lora(modules_to_save=["embed_tokens", "norm"])))


@pytest.fixture(scope="module")
def adapter(trained: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    trained.save_pretrained(folder)
    return folder


def test_the_adapter_says_its_scheme(adapter):
    config = stored(adapter)
    record = config["pe_patch"]
    assert (config["peft_type"], record["peft_type"]) == ("PE_PATCH", "LORA")
    assert (record["scheme"], record["options"]) == ("yarn", {"factor": 4.0})
    assert record["native"]["rope_parameters"]["rope_theta"] == 10000.0
    assert len(record["digest"]) == 64


WAYS = {
    "PeftModel.from_pretrained": PeftModel.from_pretrained,
    "PeftModel.load_adapter": lambda model, folder: _second(model, folder),
    "PreTrainedModel.load_adapter": lambda model, folder: (model.load_adapter(folder), model)[1],
}
ways = pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))


def _second(model: Any, folder: Path) -> Any:
    """The adapter on a model that has one already, of nothing."""
    model = get_peft_model(model, lora(modules_to_save=["embed_tokens", "norm"]))
    model.load_adapter(folder, "second")
    model.set_adapter("second")
    return model


@ways
def test_loads_on_the_same_scheme(way, base, adapter, trained):
    model = way(loaded(base, "yarn", factor=4), adapter).eval()
    assert torch.equal(logits(model), logits(trained))


@ways
@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({}, "not patched"),
        ({"scheme": "yarn", "factor": 8}, "factor 4.0 against 8.0"),
        ({"scheme": "pi", "factor": 4}, "scheme yarn against linear"),
        ({"scheme": "alibi"}, r"alibi\(\)"),
        ({**YARN, "layers": [0]}, "layers None against"),
    ],
)
def test_refuses_another_scheme(way, wrong, says, base, adapter):
    model = loaded(base, **wrong)
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(MismatchError, match=rf"yarn\(factor=4.0\).*{says}.*load_patched"):
        way(model, adapter)
    if way is not WAYS["PeftModel.load_adapter"]:  # which put an adapter of its own on before
        assert [name for name, _ in model.named_modules()] == names


@ways
def test_refuses_another_theta(way, adapter, tmp_path):
    build("llama", rope_parameters={"rope_type": "default", "rope_theta": 5e5}).save_pretrained(tmp_path)
    with pytest.raises(MismatchError, match=r"own rope_theta 10000.0 against 500000.0.*another base model"):
        way(loaded(tmp_path, **YARN), adapter)


def test_refuses_where_peft_loads_the_base_itself(adapter, base):
    for auto in (AutoPeftModelForCausalLM, AutoModelForCausalLM):
        with pytest.raises(MismatchError, match="not patched"):
            auto.from_pretrained(adapter)
    with pytest.raises(MismatchError, match="not patched"):
        get_peft_model(loaded(base), PeftConfig.from_pretrained(str(adapter)))


def test_a_further_load_into_an_adapter_asks_too(base, adapter):
    model = get_peft_model(loaded(base, "pi", factor=4), lora(modules_to_save=["embed_tokens", "norm"]))
    with pytest.raises(MismatchError, match="yarn"):
        model.load_adapter(adapter, "default")


def test_load_patched_builds_all_of_it(adapter, trained):
    model = load_patched(adapter)
    assert isinstance(model, PeftModel)
    assert torch.equal(logits(model), logits(trained))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    again = load_patched(adapter, is_trainable=True, dtype=torch.bfloat16)
    assert again.get_base_model().lm_head.weight.dtype == torch.bfloat16
    assert any(parameter.requires_grad for parameter in again.parameters())


def test_load_patched_on_a_base_that_was_saved_patched(base, tmp_path):
    folder = tmp_path / "base"
    loaded(base, "alibi").save_pretrained(folder)  # which plain Transformers refuses
    model = shaken(get_peft_model(load_patched(folder), lora()))
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(load_patched(tmp_path / "adapter")), logits(model))


def test_a_scheme_that_transformers_knows_needs_no_patch(base, adapter, trained, tmp_path):
    loaded(base, **YARN).save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.allclose(logits(PeftModel.from_pretrained(plain, adapter)), logits(trained), atol=1e-5)


def test_merging_keeps_the_scheme(adapter, trained, tmp_path):
    merged = load_patched(adapter).merge_and_unload().eval()
    assert merged.config.pe_patch["scheme"] == "yarn"
    assert error(merged, trained) < 1e-5
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(load_patched(tmp_path).eval()), logits(merged))
    assert not (tmp_path / "adapter_config.json").exists()
    assert torch.allclose(logits(unpatch_model(merged)), logits(unpatch_model(load_patched(adapter))), atol=1e-4)


def error(model: Any, other: Any) -> float:
    """Greatest difference of logits, relative to the greatest logit."""
    ours, theirs = logits(model), logits(other)
    return float((ours - theirs).abs().max() / theirs.abs().max())


def test_patching_an_adapted_model_then_saving(base, tmp_path):
    model = shaken(get_peft_model(loaded(base), lora()))
    model.save_pretrained(tmp_path)
    assert stored(tmp_path)["peft_type"] == "LORA" and "pe_patch" not in stored(tmp_path)
    patch_model(model, **YARN).save_pretrained(tmp_path)
    assert stored(tmp_path)["pe_patch"]["scheme"] == "yarn"
    assert torch.equal(logits(load_patched(tmp_path)), logits(model))
    patch_model(model, "t5", on_existing="replace").save_pretrained(tmp_path)
    assert stored(tmp_path)["pe_patch"]["scheme"] == "t5" and (tmp_path / "position_schemes.safetensors").exists()
    unpatch_model(model).save_pretrained(tmp_path)
    assert stored(tmp_path)["peft_type"] == "LORA" and "pe_patch" not in stored(tmp_path)
    assert not (tmp_path / "position_schemes.safetensors").exists()
    assert torch.equal(logits(PeftModel.from_pretrained(loaded(base), tmp_path)), logits(model))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_save_their_own(duplicate, trained, tmp_path):
    twin = duplicate(trained)
    unpatch_model(twin).save_pretrained(tmp_path / "twin")
    trained.save_pretrained(tmp_path / "one")
    assert stored(tmp_path / "twin")["peft_type"] == "LORA"
    assert stored(tmp_path / "one")["pe_patch"]["scheme"] == "yarn"


def test_several_adapters(base, tmp_path):
    model = get_peft_model(loaded(base, **YARN), lora())
    model.add_adapter("second", lora())
    model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "mixed", combination_type="linear")
    shaken(model).save_pretrained(tmp_path, selected_adapters=["default", "mixed"])
    assert stored(tmp_path)["pe_patch"] == stored(tmp_path / "mixed")["pe_patch"]
    assert not (tmp_path / "second").exists()
    again = PeftModel.from_pretrained(loaded(base, **YARN), tmp_path)
    again.load_adapter(tmp_path / "mixed", "mixed")
    for name in ("default", "mixed"):
        model.set_adapter(name), again.set_adapter(name)
        assert torch.equal(logits(again), logits(model))


host_takes_this_peft = pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    reason=f"Transformers' own add_adapter wants PEFT {MIN_PEFT_VERSION}",
)


@host_takes_this_peft
def test_adapters_without_a_wrapper(base, tmp_path):
    model = loaded(base, **YARN)
    model.add_adapter(lora(), "default")
    shaken(model).save_pretrained(tmp_path)
    assert stored(tmp_path)["pe_patch"]["scheme"] == "yarn"
    assert torch.equal(logits(load_patched(tmp_path)), logits(model))
    with pytest.raises(MismatchError, match="not patched"):
        loaded(base).load_adapter(tmp_path)


@host_takes_this_peft
def test_the_family_without_rotation(tmp_path):
    build("bloom").save_pretrained(tmp_path / "base")
    model = loaded(tmp_path / "base", "rope", original_max_position_embeddings=64)
    model.add_adapter(lora("bloom"), "default")
    shaken(model).save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(load_patched(tmp_path / "adapter")), logits(model))


def test_an_adapter_that_says_nothing_is_taken_with_a_warning(base, tmp_path, caplog):
    shaken(get_peft_model(loaded(base), lora())).save_pretrained(tmp_path)
    with caplog.at_level("WARNING", "pe_patch"):
        PeftModel.from_pretrained(loaded(base), tmp_path)
        assert not caplog.records
        PeftModel.from_pretrained(loaded(base, **YARN), tmp_path)
    assert [record.getMessage() for record in caplog.records if "has no record of a scheme" in record.getMessage()]
    with pytest.raises(CheckpointError, match="AutoPeftModelForCausalLM"):
        load_patched(tmp_path)


def test_the_schemes_weights_travel(base, tmp_path):
    """Fresh ones are random, so without them the adapter would be worth nothing."""
    model = get_peft_model(loaded(base, "t5"), lora())
    frozen = tmp_path / "frozen"
    shaken(model).save_pretrained(frozen)
    assert train_scheme(model) == ["0.table"]
    shaken(model).save_pretrained(tmp_path)
    for again in (load_patched(tmp_path), PeftModel.from_pretrained(loaded(base, "t5"), tmp_path)):
        assert torch.equal(logits(again), logits(model))
        assert not any(parameter.requires_grad for parameter in again.parameters())
    for folder, trains in ((tmp_path, True), (frozen, False)):
        again = load_patched(folder, is_trainable=True)
        assert [p.requires_grad for n, p in again.named_parameters() if n.endswith("table")] == [trains]
    with pytest.raises(MismatchError, match="other weights for the scheme"):
        again.load_adapter(tmp_path, "second")
    again.load_adapter(frozen, "third")
    (tmp_path / "position_schemes.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks position_schemes.safetensors"):
        load_patched(tmp_path)


def test_the_schemes_weights_come_gathered(base, tmp_path):
    """Where a model is sharded, its trainer hands over the whole state."""
    model = get_peft_model(loaded(base, "t5"), lora())
    whole = {name: torch.full_like(tensor, 7.0) for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=whole)
    assert bool((load_file(tmp_path / "position_schemes.safetensors")["0.table"] == 7).all())


@pytest.mark.parametrize("name", ["scheme", "position_schemes", "position_schemes.scheme.0"])
def test_a_copy_of_the_scheme_is_refused(name, base):
    with pytest.raises(OptionError, match="train_scheme"):
        get_peft_model(loaded(base, "t5"), lora(modules_to_save=[name]))


def test_there_must_be_weights_to_train(base):
    with pytest.raises(OptionError, match="'yarn' has no weights"):
        train_scheme(get_peft_model(loaded(base, **YARN), lora()))
    with pytest.raises(PePatchError, match="no patch"):
        train_scheme(loaded(base))


def test_prompt_tuning_carries_it_too(base, tmp_path):
    """It puts nothing into the model, so there is only the wrapper to ask."""
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(loaded(base, **YARN), config).eval()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_patched(tmp_path)), logits(model))
    with pytest.raises(MismatchError, match="not patched"):
        PeftModel.from_pretrained(loaded(base), tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"options": {"factor": 8.0}}, "changed by hand"),
        ({"options": None}, "damaged"),
        ({"version": 99}, "newer"),
        ({"peft_type": None}, "KeyError|damaged|changed"),
    ],
)
def test_a_damaged_record(change, says, adapter, base, tmp_path):
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    config = stored(folder)
    config["pe_patch"] |= change
    if change.get("peft_type", 0) is None:
        del config["pe_patch"]["peft_type"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=says):
        load_patched(folder)
    with pytest.raises(CheckpointError, match=says):
        PeftModel.from_pretrained(loaded(base, **YARN), folder)


def test_without_pe_patch_it_fails_loudly(base, adapter, monkeypatch):
    monkeypatch.delitem(PEFT_TYPE_TO_CONFIG_MAPPING, "PE_PATCH")  # all that pe_patch adds to PEFT
    with pytest.raises(KeyError, match="PE_PATCH"):
        PeftModel.from_pretrained(loaded(base), adapter)
    with pytest.raises(KeyError, match="PE_PATCH"):
        loaded(base).load_adapter(adapter)


def test_peft_may_be_imported_last(base, adapter):
    code = f"""
import sys, pe_patch
from transformers import AutoModelForCausalLM
model = pe_patch.patch_model(AutoModelForCausalLM.from_pretrained({str(base)!r}), "yarn", factor=4)
assert "peft" not in sys.modules
import peft
assert "pe_patch" not in type(peft.__spec__.loader).__module__ + type(peft.__loader__).__module__
assert peft.PeftModel.save_pretrained.__module__ == peft.PeftModel.load_adapter.__module__ == "peft.peft_model"
peft.PeftModel.from_pretrained(model, {str(adapter)!r})
try:
    peft.AutoPeftModelForCausalLM.from_pretrained({str(adapter)!r})
except pe_patch.PePatchError as error:
    print("refused")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stdout.endswith("refused\n"), done.stderr


def test_other_modules_are_none_of_our_business(tmp_path):
    """PEFT adapts what is no Transformers model, and models without a patch."""
    plain = torch.nn.Sequential(torch.nn.Linear(VOCABULARY, 4), torch.nn.Linear(4, 4))
    model = get_peft_model(plain, LoraConfig(r=2, target_modules=["0"]))
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "default")
    assert stored(tmp_path)["peft_type"] == "LORA"
