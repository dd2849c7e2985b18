"""What a patch reads of Transformers is there under a known name, or an error says so."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
import warnings
from importlib.metadata import version
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationMixin
from transformers.models.llama import modeling_llama

from pe_patch import NoEffectError, UnsupportedError, compat, describe, patch_model

from .models import build, cached_logits, error, logits, put, tokens
from .private_names import has, is_private, private_uses

pytestmark = pytest.mark.fast
STRANGE = "reminiscences"
"""A name for the cache argument that no version has."""


def renamed(forward):
    """A forward that takes its cache under the strange name, in signature and body."""
    native = compat.cache_argument(forward)

    def strange(self, *args, **kwargs):
        kwargs[native] = kwargs.pop(STRANGE, None)
        return forward(self, *args, **kwargs)

    parameters = [
        p.replace(name=STRANGE) if p.name == native else p for p in inspect.signature(forward).parameters.values()
    ]
    strange.__signature__ = inspect.Signature(parameters)
    return strange


@pytest.mark.parametrize("name", ("alibi", "yarn", "self_extend", "sinusoidal", "mla"))
def test_a_forward_whose_cache_argument_was_renamed_is_refused(name, monkeypatch):
    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", renamed(modeling_llama.LlamaModel.forward))
    with pytest.raises(UnsupportedError, match=r"takes no argument 'cache/past_key_values.*reminiscences"):
        put(build("llama"), name)


@pytest.mark.parametrize("name", ("alibi", "yarn", "self_extend", "sinusoidal", "mla"))
def test_a_cache_under_an_unknown_name_is_refused(name):
    """As it would come from an outer model that was renamed while the base model keeps `**kwargs`."""
    model, ids = put(build("llama"), name), tokens(1, 8)
    cache = DynamicCache(config=model.config)
    with pytest.raises(UnsupportedError, match=f"as '{STRANGE}'"):
        model.model(input_ids=ids, **{STRANGE: cache})


@pytest.mark.parametrize("name", ("alibi", "yarn", "self_extend", "mla"))
def test_a_cache_that_only_the_layers_see_is_refused(name):
    """Hand the layers a cache that the base model does not get: they see more keys than queries without a reason."""
    model, ids = put(build("llama"), name), tokens(1, 8)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids, **compat.cache_keyword(model, cache))
    hidden = compat.cache_argument(modeling_llama.LlamaAttention.forward)

    def hand_over(module, args, kwargs):
        return args, {**kwargs, hidden: cache}

    cache.pe_patch_record.open = True  # so that the attention itself must notice
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(hand_over, with_kwargs=True)
    with pytest.raises(NoEffectError, match="without a cache"):
        logits(model, ids[:, :1])


@pytest.mark.parametrize("lost", ("attention_mask", "position_ids", "inputs_embeds"))
def test_a_forward_that_lost_an_argument_is_refused(lost, monkeypatch):
    forward = modeling_llama.LlamaModel.forward
    parameters = [p for p in inspect.signature(forward).parameters.values() if p.name != lost]

    def shorter(self, *args, **kwargs):
        return forward(self, *args, **kwargs)

    shorter.__signature__ = inspect.Signature(parameters)
    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", shorter)
    with pytest.raises(UnsupportedError, match=f"takes no argument '{lost}'"):
        patch_model(build("llama"), "yarn", factor=2)


@pytest.mark.parametrize("family", ("llama", "bloom"))
def test_both_names_of_the_cache_reach_the_base_model(family):
    model, ids = put(build(family), "alibi"), tokens(1, 12)
    expected = logits(model, ids)
    for name in ("cache", "past_key_values"):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            hidden = model.base_model(input_ids=ids[:, :8], use_cache=True, **{name: cache}).last_hidden_state
            more = model.base_model(input_ids=ids[:, 8:], use_cache=True, **{name: cache}).last_hidden_state
        assert error(model.lm_head(torch.cat((hidden, more), 1)), expected) < 1e-5
    with pytest.raises(UnsupportedError, match="two caches"):
        model.base_model(input_ids=ids, cache=cache, past_key_values=DynamicCache(config=model.config))


NAMES = ("sinusoidal", "nope", "yarn", "dynamic_ntk", "alibi", "shaw", "self_extend")


@pytest.mark.parametrize(
    ("family", "name"),
    [*product(("llama", "gpt_neox", "bloom"), NAMES), ("llama", "mla"), ("gpt_neox", "mla")],
)
def test_greedy_text_is_the_same_with_and_without_a_cache(family, name):
    model, ids = put(build(family), name), tokens(2, 12)
    length = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    cached, uncached = (model.generate(ids, use_cache=use_cache, **length) for use_cache in (True, False))
    assert torch.equal(cached, uncached)
    assert error(cached_logits(model, cached, 12), logits(model, cached)) < 1e-5


def test_a_newer_version_gives_one_warning(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compat.warn_if_untested()
    monkeypatch.setattr(compat, "INSTALLED", compat.Version("5.24.7"))  # a patch release
    compat.warn_if_untested()
    monkeypatch.setattr(compat, "INSTALLED", compat.Version("99.1.0"))
    with pytest.warns(compat.UntestedVersionWarning, match=r"newer than every version.*5\.24\.0.*selftest"):
        compat.warn_if_untested()


def test_the_import_warns_once_about_a_newer_version():
    code = (
        "import transformers, warnings; transformers.__version__ = '99.0.0'\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always'); import pe_patch\n"
        "print([each.filename for each in seen if '99.0.0' in str(each.message)])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "['<string>']", run.stderr


def test_nothing_else_spells_the_cache_argument():
    """A name of the cache argument outside compat.py would be the next silent loss."""
    assert [file for file, text in sources().items() if file != COMPAT and "past_key_values" in text] == []


ROOT = Path(compat.__file__).parent.parent
COMPAT = "pe_patch/compat.py"
TRAINER = "pe_patch/training/trainer.py"


def sources() -> dict[str, str]:
    """The text of every Python file of the package and the recipes, by its path."""
    files = [path for folder in ("pe_patch", "recipes") for path in sorted((ROOT / folder).rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in files}


OPTIONAL = {"deepspeed", "lm_eval"}
"""Libraries of extras, which the environments of other Transformers versions leave out."""


def components(rows) -> set[str]:
    """The private components of the names of some rows."""
    return {part for row in rows for part in row.name.split(".") if is_private(part)}


def uses(text: str, row: compat.PrivateName) -> bool:
    """Return whether a file uses the entry of compat.py for a private name."""
    return re.search(rf"\bcompat\.{row.used_by}\b", text) is not None


def check_is_there(row: compat.PrivateName) -> None:
    """Fail, naming the name and where it is used, unless the installed version is like the one that was checked."""
    library = row.owner.split(".")[0]
    if find_spec(library) is None:
        assert library in OPTIONAL, f"{library} is required and not installed"
        pytest.skip(f"{library} is not installed")
    installed, checked = version(library).split("+")[0], compat.CHECKED_VERSIONS[library]
    newest_has_it = row.versions[-1] == checked[-1]
    expected = installed in row.versions if installed in checked else newest_has_it
    if has(row.owner, row.name) == expected:
        return
    users = ", ".join(file for file, text in sources().items() if uses(text, row))
    pytest.fail(
        f"{library} {installed} {'lacks' if expected else 'has'} {row.owner}.{row.name} (checked: {library} "
        f"{', '.join(row.versions)} {'have' if expected else 'alone have'} it). compat.{row.used_by} uses it, for "
        f"{users}.",
        pytrace=False,
    )


@pytest.mark.parametrize("row", compat.PRIVATE_NAMES, ids=lambda row: f"{row.name}-{row.used_by}")
def test_every_private_name_is_in_the_installed_version(row):
    check_is_there(row)


def test_a_private_name_that_is_gone_is_named(monkeypatch):
    monkeypatch.delattr(GenerationMixin, "_prefill")
    row = next(row for row in compat.PRIVATE_NAMES if row.used_by == "PREFILL")
    message = (
        rf"transformers {version('transformers')} lacks transformers.GenerationMixin._prefill .*5\.24\.0.*"
        r"compat\.PREFILL uses it, for pe_patch/patching/plan\.py"
    )
    with pytest.raises(pytest.fail.Exception, match=message):
        check_is_there(row)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        ("transformers.PreTrainedModel", "_gone"),  # of a class
        ("torch.cpu", "_gone"),  # of a module
        ("torch", "_gone.tree_map"),  # a module
        ("torch.utils", "_pytree._gone"),
        ("accelerate.hooks.add_hook_to_module", "_gone"),  # stored by a function, or its keyword
        ("transformers.PreTrainedConfig", "_gone"),  # stored by a class
        ("transformers.gone", "_prefill"),  # its owner is gone
    ],
)
def test_what_no_version_has_is_missing(owner, name):
    assert not has(owner, name)


def test_only_compat_uses_private_names_of_other_libraries():
    """If not: move the use into a function of compat.py under `uses(...)`, and look it up in the versions there."""
    trees = {file: ast.parse(text) for file, text in sources().items() if file != COMPAT}
    found = private_uses(trees, components(compat.PRIVATE_NAMES))
    # The one class that overrides methods of Transformers' Trainer; `compat.check_trainer` names one that is gone.
    overrides = [(TRAINER, name) for name in compat.TRAINER_METHODS]
    assert [use for use in found if (use[0], use[2]) not in overrides] == []


def test_every_use_in_compat_has_its_row_and_every_row_its_use():
    text = sources()
    tree = ast.parse(text.pop(COMPAT))
    foreign = components(compat.PRIVATE_NAMES)
    for node in tree.body:
        label = getattr(node, "name", None)
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            node.decorator_list = []
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            label = ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
        rows = [row for row in compat.PRIVATE_NAMES if row.used_by == label]
        listed = components(rows) | {part for row in rows for part in row.owner.split(".")}
        assert {name for _, _, name in private_uses({COMPAT: node}, foreign)} <= listed, label
    for row in compat.PRIVATE_NAMES:
        assert any(uses(each, row) for each in text.values()), row


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("import torch._dynamo", "_dynamo"),
        ("def f():\n    from torch._higher_order_ops import associative_scan", "_higher_order_ops"),
        ("from transformers.models.llama.modeling_llama import _repeat", "_repeat"),
        ("from torch import nn, _C", "_C"),
        ("torch._C.DisableTorchFunctionSubclass()", "_C"),
        ("model._hf_peft_config_loaded", "_hf_peft_config_loaded"),
        ("model.config._attn_implementation = 'sdpa'", "_attn_implementation"),
        ("del module._hf_hook", "_hf_hook"),
        ("class Ours(nn.Module):\n    def f(self):\n        return self._modules", "_modules"),
        ("class Ours(nn.Module):\n    def f(self):\n        self._modules = {}", "_modules"),
        ("class Ours(HFLM):\n    def f(self):\n        return super()._encode_pair()", "_encode_pair"),
        ("getattr(model, '_hf_hook', None)", "_hf_hook"),
        ("hasattr(model, '_orig_mod')", "_orig_mod"),
        ("setattr(config, '_attn_implementation_internal', 1)", "_attn_implementation_internal"),
        ("vars(module)['_modules'] = {}", "_modules"),
        ("module.__dict__.get('_parameters')", "_parameters"),
        ("Swap.of(config, '_attn_implementation_internal', 1)", "_attn_implementation_internal"),
        ("bind(model, '_prefill', refuse)", "_prefill"),
        ("NAMES = ('_orig_mod', 'module')", "_orig_mod"),
        ("attrgetter('config._commit_hash')", "_commit_hash"),
        ("import_module('torch._inductor')", "_inductor"),
        (
            "cached_file(path, name, _raise_exceptions_for_missing_entries=False)",
            "_raise_exceptions_for_missing_entries",
        ),
        ("OPTIONS = {'_raise_exceptions_for_gated_repo': False}", "_raise_exceptions_for_gated_repo"),
        ("class Ours(PreTrainedModel):\n    _tied_weights_keys = []", "_tied_weights_keys"),
        ("class Ours(PreTrainedModel):\n    _supports_sdpa: bool = True", "_supports_sdpa"),
        ("class Ours(PreTrainedModel):\n    def _init_weights(self, module):\n        pass", "_init_weights"),
        ("class Ours:\n    def _reshape(self):\n        return self._reshape()", "_reshape"),  # a name of compat.py
    ],
)
def test_a_private_name_outside_compat_is_found_in_every_form(code, name):
    assert name in {
        found for _, _, found in private_uses({"wrong.py": ast.parse(code)}, components(compat.PRIVATE_NAMES))
    }


def test_our_own_private_names_are_not_those_of_other_libraries():
    code = """
from .other import _helper
class Ours(NamedTuple):
    def __init__(self, _given):
        self._kept, self.__dict__["_kept"] = _given, 1
    def _method(self):
        return self._kept, self._method(), self._replace(kept=1), name.endswith("_2d"), f"{name}_hash", name + "_e"
def _function(ours):
    os._exit(1)
    return ours._kept, _helper, vars(ours)["_kept"], "a sentence with _other", "__doc__", _function(_given=1)
"""
    assert private_uses({"right.py": ast.parse(code)}, components(compat.PRIVATE_NAMES)) == []


def test_a_trainer_without_a_method_that_training_replaces_is_refused():
    methods = dict.fromkeys(compat.TRAINER_METHODS)
    compat.check_trainer(type("Trainer", (), methods), compat.TRAINER_METHODS)
    del methods["_save_checkpoint"]
    with pytest.raises(UnsupportedError, match=r"has no '_save_checkpoint'.*pip install 'transformers=="):
        compat.check_trainer(type("Trainer", (), methods), compat.TRAINER_METHODS)


def test_auto_classes_read_a_patched_folder(tmp_path):
    """Transformers 5.17 does not register a config class whose module is in Transformers."""
    model = build("llama")
    patch_model(model, "ntk_by_parts", factor=4)
    model.save_pretrained(tmp_path)
    for again in (
        AutoModelForCausalLM.from_pretrained(tmp_path).eval(),
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)),
    ):
        assert describe(again).scheme == "ntk_by_parts"
