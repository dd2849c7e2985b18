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
from peft import (
    AutoPeftModelForCausalLM,
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.integrations.peft import MIN_PEFT_VERSION

from pe_patch import PePatchError, load_adapter, load_patched, patch_model, unpatch_model
from pe_patch.errors import CacheError, CheckpointError, MismatchError, OptionError
from pe_patch.patching.peft import PendingSave
from pe_patch.patching.peft_record import TYPE, train_scheme

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
    assert (config["peft_type"], record["peft_type"]) == (TYPE, "LORA")
    assert TYPE.startswith("PE_PATCH")
    assert (record["scheme"], record["options"]) == ("yarn", {"factor": 4.0})
    assert record["native"]["rope_parameters"]["rope_theta"] == 10000.0
    assert len(record["digest"]) == 64


WAYS = {
    "load_adapter": load_adapter,
    "load_adapter into a PeftModel": lambda model, folder: _second(model, folder, load_adapter),
    "PeftModel.load_adapter, patched last": lambda model, folder: _second(model, folder, PeftModel.load_adapter),
    "attached PeftModel.load_adapter": lambda model, folder: _second(model, folder, _listed),
    "PreTrainedModel.load_adapter": lambda model, folder: (model.load_adapter(folder), model)[1],
}
SECOND = [way for name, way in WAYS.items() if "PeftModel" in name]
PLAIN = [way for name, way in WAYS.items() if not name.startswith("load_adapter")]
"""Methods of PEFT and Transformers, which know nothing of records on a model without a patch."""
ways = pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))


def _second(model: Any, folder: Path, load: Any) -> Any:
    """The adapter on a model that has one already, of nothing; `PeftModel.load_adapter` gets a model patched last."""
    config = lora(modules_to_save=["embed_tokens", "norm"])
    record = getattr(model.config, "pe_patch", None)
    if load is PeftModel.load_adapter and record is not None:
        model = get_peft_model(unpatch_model(model), config)
        patch_model(model, record["scheme"], layers=record.get("layers"), **record["options"])
        model.load_adapter(folder, "second")
    else:
        model = get_peft_model(model, config)
        load(model, folder, "second")
    model.set_adapter("second")
    return model


def _listed(model: Any, folder: Path, name: str) -> None:
    """An optimizer lists the parameters, and so attaches the model."""
    torch.optim.SGD(model.parameters())
    model.load_adapter(folder, name)


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
    if not wrong and way in PLAIN:
        with pytest.raises(KeyError, match=r"PE_PATCH.*pe_patch.load_adapter"):
            way(model, adapter)
    else:
        with pytest.raises(MismatchError, match=rf"yarn\(factor=4.0\).*{says}.*load_patched"):
            way(model, adapter)
    if way not in SECOND:  # which put an adapter of its own on before
        assert [name for name, _ in model.named_modules()] == names


@ways
def test_refuses_another_theta(way, adapter, tmp_path):
    build("llama", rope_parameters={"rope_type": "default", "rope_theta": 5e5}).save_pretrained(tmp_path)
    with pytest.raises(MismatchError, match=r"own rope_theta 10000.0 against 500000.0.*another base model"):
        way(loaded(tmp_path, **YARN), adapter)


def test_refuses_where_peft_loads_the_base_itself(adapter, base):
    for auto in (AutoPeftModelForCausalLM, AutoModelForCausalLM, PeftConfig, LoraConfig):
        with pytest.raises(KeyError, match=r"PE_PATCH.*pe_patch.load_adapter"):
            auto.from_pretrained(str(adapter))
    for model in (loaded(base), loaded(base, **YARN)):
        with pytest.raises(KeyError, match=r"PE_PATCH.*pe_patch.load_adapter"):
            PeftModel.from_pretrained(model, adapter)


def test_a_further_load_into_an_adapter_asks_too(base, adapter):
    def fresh() -> Any:
        return get_peft_model(loaded(base, "pi", factor=4), lora(modules_to_save=["embed_tokens", "norm"]))

    with pytest.raises(MismatchError, match="yarn"):
        load_adapter(fresh(), adapter, "default")
    model = fresh()
    list(model.modules())
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
    assert torch.allclose(logits(load_adapter(plain, adapter)), logits(trained), atol=1e-5)


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
    again = load_adapter(loaded(base, **YARN), tmp_path)
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
    with pytest.raises(KeyError, match=r"PE_PATCH.*pe_patch.load_adapter"):
        loaded(base).load_adapter(tmp_path)
    with pytest.raises(MismatchError, match="not patched"):
        load_adapter(loaded(base), tmp_path)


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
        for load in (PeftModel.from_pretrained, load_adapter):
            load(loaded(base), tmp_path)
        assert not caplog.records
        load_adapter(loaded(base, **YARN), tmp_path)
        assert not [record for record in caplog.records if "could not check" in record.getMessage()]
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
    for again in (load_patched(tmp_path), load_adapter(loaded(base, "t5"), tmp_path)):
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
    torch.optim.SGD(model.parameters())  # a trainer makes its optimizer before it saves
    model.save_pretrained(tmp_path, state_dict=whole)
    assert bool((load_file(tmp_path / "position_schemes.safetensors")["0.table"] == 7).all())


@pytest.mark.parametrize("name", ["scheme", "position_schemes", "position_schemes.scheme.0"])
def test_a_copy_of_the_scheme_is_refused(name, base):
    with pytest.raises((OptionError, TypeError), match=r"train_scheme|modules_to_save cannot be applied to modules of"):
        get_peft_model(loaded(base, "t5"), lora(modules_to_save=[name]))


def test_there_must_be_weights_to_train(base):
    with pytest.raises(OptionError, match="'yarn' has no weights"):
        train_scheme(get_peft_model(loaded(base, **YARN), lora()))
    with pytest.raises(PePatchError, match="no patch"):
        train_scheme(loaded(base))


@pytest.mark.parametrize(
    "config",
    [
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ],
    ids=lambda config: str(config.peft_type.value),
)
def test_every_kind_of_adapter_carries_it(config, base, tmp_path):
    """Prompts put nothing into the model, so there is only the wrapper to ask."""
    model = get_peft_model(loaded(base, **YARN), copy.deepcopy(config)).eval()
    model.save_pretrained(tmp_path)  # by PEFT's own method, which lists the modules while it runs
    assert torch.equal(logits(load_patched(tmp_path)), logits(model))
    with pytest.raises(KeyError, match=r"PE_PATCH.*pe_patch.load_adapter"):
        PeftModel.from_pretrained(loaded(base), tmp_path)
    with pytest.raises(MismatchError, match="not patched"):
        load_adapter(loaded(base), tmp_path)
    model.load_adapter(tmp_path, "default")
    with pytest.raises(MismatchError, match="not patched"):
        load_adapter(unpatch_model(model), tmp_path, "default")


def test_prefix_tuning_that_was_not_attached_says_what_to_do(base):
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(CacheError, match="prefix tuning filled it, call get_peft_model before patch_model"):
        logits(get_peft_model(loaded(base, **YARN), config).eval())
    logits(patch_model(get_peft_model(loaded(base), config).eval(), **YARN))


def test_a_load_that_began_before_the_model_was_attached_warns(base, adapter, tmp_path, caplog):
    model = get_peft_model(loaded(base, "pi", factor=4), lora(modules_to_save=["embed_tokens", "norm"]))
    model.load_adapter(adapter, "default")
    warnings = [record.getMessage() for record in caplog.records if "could not check" in record.getMessage()]
    assert len(warnings) == 1 and "linear(factor=4)" in warnings[0] and "pe_patch.load_adapter" in warnings[0]
    with pytest.raises(MismatchError, match="yarn"):
        model.load_adapter(adapter, "default")


def test_what_a_running_save_needs_goes_with_the_next_one(base, tmp_path):
    """And a config that PEFT copies meanwhile does not copy the model."""
    model = get_peft_model(loaded(base, "t5"), lora())
    list(model.parameters())
    config = model.peft_config["default"]
    assert isinstance(vars(config)["save_pretrained"], PendingSave)
    assert vars(copy.deepcopy(config))["save_pretrained"].model is model.get_base_model()
    twin = copy.deepcopy(model)
    assert vars(twin.peft_config["default"])["save_pretrained"].model is twin.get_base_model()
    assert "save_pretrained" not in config.to_dict() and repr(config) == repr(lora_of(config))
    model.save_pretrained(tmp_path)
    assert "save_pretrained" not in vars(config) and "load_state_dict" not in vars(model)
    assert stored(tmp_path)["pe_patch"]["scheme"] == "t5"


def lora_of(config: LoraConfig) -> LoraConfig:
    """The same config without the attributes of this instance."""
    bare = copy.copy(config)
    bare.__dict__.pop("save_pretrained", None)
    return bare


def test_undo_leaves_nothing_on_the_wrapper(base):
    for model in (
        get_peft_model(loaded(base, **YARN), lora()),
        patch_model(get_peft_model(loaded(base), lora()), **YARN),
    ):
        plain = set(vars(get_peft_model(loaded(base), lora())))
        list(model.modules())
        assert {"save_pretrained", "load_adapter"} <= set(vars(model)) - plain
        unpatch_model(model)
        assert set(vars(model)) == plain
        assert "named_modules" not in vars(model.get_base_model())
        assert "save_pretrained" not in vars(model.peft_config["default"])


def test_only_the_peft_model_around_a_model_is_attached(base):
    """A traversal also passes modules that stand beside it."""
    other, ours = get_peft_model(loaded(base), lora()), get_peft_model(loaded(base, **YARN), lora())
    both = torch.nn.ModuleList([other, ours])
    assert [name for name, _ in both.named_modules()][:2] == ["", "0"]
    assert "save_pretrained" not in vars(other) and "save_pretrained" in vars(ours)


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
        load_adapter(loaded(base, **YARN), folder)


def test_an_adapter_that_was_saved_with_the_short_type(base, adapter, trained, tmp_path):
    """`peft_type` was "PE_PATCH" alone before it named the remedy."""
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    (folder / "adapter_config.json").write_text(json.dumps({**stored(folder), "peft_type": "PE_PATCH"}))
    assert torch.equal(logits(load_adapter(loaded(base, **YARN), folder)), logits(trained))


IMPORTS = (
    "import peft; before = tables(); import pe_patch; assert tables() == before",
    "import pe_patch; assert 'peft' not in sys.modules; import peft",
)
IMPORTING = """
import sys, torch, transformers
from torch.nn.modules import module

def tables():
    import peft.mapping
    found = {name: table for name, table in vars(peft.mapping).items() if isinstance(table, dict) and name[0] == "P"}
    return [(name, str(key), repr(value)) for name, table in found.items() for key, value in table.items()]

def global_hooks():
    names = [name for name in vars(module) if name.startswith("_global_") and hasattr(getattr(module, name), "items")]
    assert len(names) >= 8 and "_global_module_registration_hooks" in names
    return [name for name in names if getattr(module, name)]

finders = list(sys.meta_path)
{imports}
from transformers import AutoModelForCausalLM

def base():
    return AutoModelForCausalLM.from_pretrained({base!r})

assert sys.meta_path == finders and not global_hooks()
model = pe_patch.patch_model(base(), "yarn", factor=4)
model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
model.save_pretrained({adapter!r})
pe_patch.load_adapter(pe_patch.patch_model(base(), "yarn", factor=4), {adapter!r})
for load, error in ((pe_patch.load_adapter, pe_patch.MismatchError), (peft.PeftModel.from_pretrained, KeyError)):
    try:
        load(base(), {adapter!r})
    except error as refusal:
        assert "pe_patch.load_" in str(refusal), refusal
    else:
        raise AssertionError("the base without a patch took the adapter")
for cls in (peft.PeftModel, peft.PeftConfig, peft.LoraConfig, peft.LoraModel, torch.nn.Module):
    names = {value.__module__.partition(".")[0] for value in vars(cls).values() if hasattr(value, "__code__")}
    assert "pe_patch" not in names
assert sys.meta_path == finders and not global_hooks()
print(tables())
"""


def test_importing_changes_nothing_of_peft_or_torch(base, tmp_path):
    """In either order: no import hook, no hook of torch, no entry in a table of PEFT, no method of a class."""
    printed = []
    for imports in IMPORTS:
        code = IMPORTING
        for field, value in (("imports", imports), ("base!r", repr(str(base))), ("adapter!r", repr(str(tmp_path)))):
            code = code.replace(f"{{{field}}}", value)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)
    assert "LORA" in printed[0] and "PE_PATCH" not in printed[0]
    assert printed[0] == printed[1]


def test_other_modules_are_none_of_our_business(tmp_path):
    """PEFT adapts what is no Transformers model, and models without a patch."""
    plain = torch.nn.Sequential(torch.nn.Linear(VOCABULARY, 4), torch.nn.Linear(4, 4))
    model = get_peft_model(plain, LoraConfig(r=2, target_modules=["0"]))
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "default")
    assert stored(tmp_path)["peft_type"] == "LORA"
