"""Schemes and families of a user's own: typed, registered, found by name in a fresh process and on the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from pe_patch import (
    ADAPTERS,
    SCHEMES,
    Adapter,
    ALiBi,
    OptionError,
    OptionValueError,
    Rotary,
    Scheme,
    YaRN,
    describe,
    patch_model,
    register_adapter,
    register_scheme,
    unpatch_model,
)

from .models import build, case, logits, tokens

ROOT = Path(__file__).parent
PLUGIN = ROOT / "plugin"


def fresh(code: str, tmp_path: Path, *arguments: str) -> str:
    """Run code in a new process that finds the example package, installed by its metadata alone."""
    site = tmp_path / "site"
    metadata = site / "pe_patch_ripple-1.0.dist-info"
    if not metadata.exists():
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: pe-patch-ripple\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(
            "[pe_patch.schemes]\nripple = pe_patch_ripple:Ripple\n\n"
            "[pe_patch.adapters]\nripple = pe_patch_ripple.families\n"
        )
        (site / "pe_patch_ripple").symlink_to(PLUGIN / "pe_patch_ripple")
    done = subprocess.run(
        [sys.executable, *(["-c", code] if code else []), *arguments],
        capture_output=True, text=True, check=False, cwd=tmp_path,
        env={
            "PYTHONPATH": f"{site}:{ROOT.parent}", "PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1",
            "HOME": str(tmp_path),
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_entry_points_of_the_example_are_those_of_its_pyproject(tmp_path):
    text = (PLUGIN / "pyproject.toml").read_text()
    assert 'ripple = "pe_patch_ripple:Ripple"' in text and 'ripple = "pe_patch_ripple.families"' in text


@pytest.mark.parametrize("name", [name for name in SCHEMES if name not in ("mla", "rope_2d", "alibi_2d")])
def test_a_scheme_object_is_the_same_as_its_name(name):
    family, (name, options) = "llama", case("llama", name)
    torch.manual_seed(0)
    by_name = patch_model(build(family), name, **options)
    torch.manual_seed(0)
    by_object = patch_model(build(family), SCHEMES[name](**options))
    ids = tokens(2, 40)
    assert torch.equal(logits(by_name, ids), logits(by_object, ids))
    assert describe(by_name) == describe(by_object)
    assert by_name.config.pe_patch == by_object.config.pe_patch


def test_a_scheme_object_holds_options_until_a_model_is_patched():
    scheme = YaRN(factor=4, beta_fast=16)
    assert repr(scheme) == "YaRN(factor=4, beta_fast=16)" and not scheme.is_built
    model = patch_model(build("llama"), scheme)
    assert not scheme.is_built and model.config.pe_patch["options"] == {"factor": 4, "beta_fast": 16}
    unpatch_model(model)
    with pytest.raises(OptionError, match="given twice"):
        patch_model(model, scheme, factor=2)
    unchecked: Any = YaRN  # a type checker sees these mistakes too
    with pytest.raises(OptionError, match="Did you mean 'factor'"):
        unchecked(factr=4)
    with pytest.raises(OptionError, match="by name"):
        unchecked(4)
    with pytest.raises(OptionError, match="needs the option 'factor', for example factor=4"):
        unchecked()
    built = YaRN(ADAPTERS["llama"].shape(model.model, model.config), factor=4)
    assert built.is_built
    with pytest.raises(OptionError, match="built for an attention"):
        patch_model(model, built)
    with pytest.raises(OptionValueError, match="factor='x'"):
        patch_model(model, unchecked(factor="x"))


def test_a_registered_scheme_needs_a_name_of_its_own():
    @dataclass
    class Nameless(Rotary):
        pass

    with pytest.raises(OptionValueError, match="no name"):
        register_scheme(Nameless)

    class Fake(ALiBi):
        name = "yarn"

    with pytest.raises(OptionValueError, match="name of a scheme of pe_patch"):
        register_scheme(Fake)
    for _ in range(2):  # a cell of a notebook runs twice
        register_scheme(type("Mine", (ALiBi,), {"name": "mine_alone", "__module__": "mine"}))
    with pytest.raises(OptionValueError, match="'mine_alone' is the name of a scheme of mine"):
        register_scheme(type("Theirs", (ALiBi,), {"name": "mine_alone", "__module__": "theirs"}))
    SCHEMES.remove("mine_alone")
    with pytest.raises(OptionValueError, match="subclass of Scheme"):
        register_scheme(cast(Any, YaRN(factor=4)))


def test_a_registered_family_is_checked():
    with pytest.raises(OptionValueError, match="has an adapter for 'llama'"):
        register_adapter("llama", Adapter())
    with pytest.raises(OptionValueError, match=r"takes a pe_patch\.Adapter"):
        register_adapter("mine", cast(Any, "llama"))


def test_a_plain_dataclass_is_a_scheme():
    @dataclass
    class Half(Rotary):
        name = "half_speed"
        speed: float = 0.5

        def frequencies(self, length: int | None = None) -> tuple[Tensor, float]:
            return self.speed * self.plain_frequencies(), 1.0

    ids = tokens(1, 30)
    expected = logits(patch_model(build("llama"), "linear", factor=2.0), ids)
    assert torch.equal(logits(patch_model(build("llama"), Half()), ids), expected)
    assert isinstance(hash(Half()), int) and Half() != Half()
    assert isinstance(Half(), Scheme)


PATCH = """
import sys, torch
from transformers import AutoModelForCausalLM
import pe_patch
torch.manual_seed(0)
folder = sys.argv[1]
if "ripple_llama" in sys.argv:
    list(pe_patch.ADAPTERS)
    from pe_patch_ripple.families import RippleConfig as Config
else:
    from transformers import LlamaConfig as Config
config = Config(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0)
model = pe_patch.patch_model(AutoModelForCausalLM.from_config(config).eval(), "ripple", speed=3.0)
model.save_pretrained(folder)
print("sum", float(model(torch.arange(30)[None]).logits.sum()))
"""

LOAD = """
import sys, torch, pe_patch
model = pe_patch.load_patched(sys.argv[1])
print("sum", float(model(torch.arange(30)[None]).logits.sum()))
"""


@pytest.mark.parametrize("family", ("llama", "ripple_llama"))
def test_an_installed_scheme_is_saved_and_loaded_in_a_fresh_process(family, tmp_path):
    before = fresh(PATCH, tmp_path, str(tmp_path / "saved"), family)
    after = fresh(LOAD, tmp_path, str(tmp_path / "saved"))
    assert before.split("sum ")[1] == after.split("sum ")[1]
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["pe_patch"]["options"] == {"speed": 3.0}


def test_an_installed_scheme_is_listed_and_runs_on_the_command_line(tmp_path):
    listed = json.loads(fresh("", tmp_path, "-m", "pe_patch", "list", "--json"))
    assert "ripple" in [entry["name"] for entry in listed["schemes"]]
    assert "ripple_llama" in [entry["name"] for entry in listed["families"]]
    demo = ROOT.parent / "pe_patch" / "assets" / "demo"
    (tmp_path / "text.txt").write_text(" ".join(f"word{i}" for i in range(3000)))
    words = ["evaluate", str(demo), "--scheme", "ripple", "--option", "speed=0.5", "--task", "perplexity"]
    words += ["--length", "256", "--text", str(tmp_path / "text.txt"), "--json"]
    found = json.loads(fresh("", tmp_path, "-m", "pe_patch", *words))
    assert found["rows"] and {row["scheme"] for row in found["rows"]} == {"ripple(speed=0.5)"}


def test_a_recipe_takes_an_installed_scheme(tmp_path):
    code = (
        "from pe_patch.training.run import load_recipe\n"
        "recipe = load_recipe('tiny_yarn', ['scheme={name: ripple, options: {speed: 0.5}}'])\n"
        "print(recipe.scheme.name)"
    )
    assert fresh(code, tmp_path).strip() == "ripple"


def test_a_type_checker_knows_the_options(tmp_path):
    """pyright in strict mode, on a user's file."""
    pyright = Path(sys.executable).with_name("pyright")
    file = tmp_path / "mine.py"
    file.write_text(
        "from transformers import LlamaForCausalLM\n"
        "from pe_patch import SelfExtend, YaRN, patch_model\n"
        "YaRN(factor=4, beta_fast=16.0, theta=10000.0)\n"
        "SelfExtend(group=4, window=64)\n"
        'YaRN(factor="x")\n'
        "YaRN(factr=4)\n"
        "YaRN()\n"
        "def patched(model: LlamaForCausalLM) -> LlamaForCausalLM:\n"
        '    return patch_model(model, YaRN(factor="auto"))\n'
    )
    (tmp_path / "pyrightconfig.json").write_text(
        json.dumps({"typeCheckingMode": "strict", "extraPaths": [str(ROOT.parent)], "include": ["mine.py"]})
    )
    done = subprocess.run(
        [pyright, "--outputjson", "--pythonpath", sys.executable, "-p", str(tmp_path)],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    found = json.loads(done.stdout)["generalDiagnostics"]
    assert sorted({entry["range"]["start"]["line"] + 1 for entry in found if entry["severity"] == "error"}) == [5, 6, 7]
