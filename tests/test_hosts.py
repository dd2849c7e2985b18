"""Test patched models that are compiled, offloaded, cast, or switched to another attention."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from transformers import StaticCache

from pe_patch import NoEffectError, UnsupportedError, patch_model, unpatch_model

from . import oracles
from .models import BACKENDS, FAMILIES, PAIRS, WINDOW, build, case, error, logits, put, tokens, wearing

NAMES = ("yarn", "dynamic_ntk", "alibi", "sinusoidal")
cells = pytest.mark.parametrize(("family", "name"), [(family, name) for family in FAMILIES for name in NAMES])


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


COMPILED = [
    ("llama", "yarn"),
    pytest.param("llama", "alibi", marks=pytest.mark.thorough),
    pytest.param("gpt_neox", "dynamic_ntk", marks=pytest.mark.thorough),
    ("bloom", "sinusoidal"),
]
"""Each mechanism and each family once, because compiling takes seconds."""


@pytest.mark.parametrize(("family", "name"), COMPILED)
def test_a_model_compiled_before_the_patch_follows_patch_and_undo(family, name, fresh_dynamo):
    """The patched model must not reuse the graph of the unpatched one, nor the other way round after the undo."""
    model, ids = build(family, num_hidden_layers=1), tokens(1, 40)
    native = logits(model, ids)
    with wearing(model, name):
        expected = logits(model, ids)
    assert error(expected, native) > 1e-3
    compiled = torch.compile(model, backend="eager")
    scheme, options = case(family, name)
    assert error(logits(compiled, ids), native) < 1e-6
    patch_model(compiled, scheme, **options)
    assert error(logits(compiled, ids), expected) < 1e-6
    unpatch_model(compiled)
    assert error(logits(compiled, ids), native) < 1e-6


@pytest.mark.parametrize(("name", "other"), [("yarn", {"factor": 8.0}), ("alibi", {"slopes": [0.1, 0.2, 0.3, 0.4]})])
def test_compiled_layers_follow_a_patch_with_other_options(name, other, fresh_dynamo):
    model, plain, ids = build("llama"), build("llama"), tokens(1, 40)
    for layer in model.model.layers:
        layer.compile(backend="eager")
    for options in (case("llama", name)[1], other):
        for each in (model, plain):
            patch_model(each, name, on_existing="replace", **options)
        assert error(logits(model, ids), logits(plain, ids)) < 1e-5
    unpatch_model(model)
    assert error(logits(model, ids), logits(unpatch_model(plain), ids)) < 1e-5


@pytest.mark.parametrize("other_family", ("llama", "gpt_neox"))
def test_a_patch_keeps_the_compiled_graphs_of_other_models(other_family, fresh_dynamo):
    graphs, other, ids = [], build(other_family, num_hidden_layers=1), tokens(1, 40)

    def count(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(other, backend=count)
    expected, made = logits(compiled, ids), len(graphs)
    model = patch_model(build("llama"), "alibi")
    logits(model, ids)
    unpatch_model(model)
    assert made > 0 and torch.equal(logits(compiled, ids), expected) and len(graphs) == made


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "yarn"),
        pytest.param("llama", "alibi", marks=pytest.mark.thorough),
        ("llama", "dynamic_ntk"),
        pytest.param("gpt_neox", "yarn", marks=pytest.mark.thorough),
        ("bloom", "alibi"),
    ],
)
def test_decoding_fifty_tokens_compiles_two_graphs_at_most(family, name, fresh_dynamo):
    model, ids = put(build(family), name), tokens(1, 62)
    graphs = []

    def count(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    def decode(step) -> torch.Tensor:
        past = StaticCache(config=model.config, max_cache_len=64)
        with torch.no_grad():
            model(ids[:, :12], past_key_values=past)
            found = [
                step(input_ids=ids[:, n : n + 1], position_ids=torch.tensor([[n]]), past_key_values=past).logits
                for n in range(12, 62)
            ]
        return torch.cat(found, 1)

    expected = decode(model)
    found = decode(torch.compile(model, backend=count))
    assert error(found, expected) < 1e-5
    assert 1 <= len(graphs) <= 2


@cells
def test_set_attn_implementation_works_after_the_patch(family, name):
    model, ids = put(build(family), name), tokens(1, 40)
    found = {}
    for backend in BACKENDS:
        model.set_attn_implementation(backend)
        assert model.config._attn_implementation == f"pe_{backend}"
        found[backend] = logits(model, ids)
    assert error(found["eager"], found["sdpa"]) < 1e-5
    before = model.config._attn_implementation
    model.config._attn_implementation = "sdpa"
    with pytest.raises(NoEffectError, match="set_attn_implementation"):
        logits(model, ids)
    model.config._attn_implementation = before
    assert torch.equal(logits(model, ids), found[BACKENDS[-1]])


@cells
def test_paged_generation_is_refused_and_names_the_remedy(family, name):
    model, prompt = put(build(family), name), tokens(1, 8)
    with pytest.raises(UnsupportedError, match=r"generate\(\)"):
        model.generate_batch(prompt.tolist(), max_new_tokens=2, progress_bar=False)
    assert model.config._attn_implementation == "pe_sdpa"
    assert model.generate(prompt, max_new_tokens=2).shape == (1, 10)


LAYERS = {"llama": "model.layers", "gpt_neox": "gpt_neox.layers", "bloom": "transformer.h"}


def offload_to_cpu(model, folder):
    cpu_offload(model, execution_device=torch.device("cpu"))


def offload_to_disk(model, folder):
    disk_offload(model, folder, execution_device=torch.device("cpu"))


def dispatch(model, folder):
    """Dispatch the model with the first layer in memory and the second on disk."""
    layers = LAYERS[model.config.model_type]
    names = [name for name, module in model.named_modules() if name and not list(module.children())]
    device_map = {name: "cpu" for name in names if not name.startswith(layers)}
    device_map |= {f"{layers}.0": "cpu", f"{layers}.1": "disk"}
    device_map |= {n.rpartition(".")[0]: "cpu" for n, _ in model.named_parameters() if "position_schemes" in n}
    dispatch_model(model, device_map, main_device="cpu", offload_dir=folder, force_hooks=True)


@pytest.mark.parametrize("name", [*NAMES, "learned"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("order", ["patch first", "offload first"])
@pytest.mark.parametrize("offload", [offload_to_cpu, offload_to_disk, dispatch])
def test_offloaded_weights_give_the_same_logits(family, name, order, offload, tmp_path):
    ids = tokens(2, 40)
    model = build(family)
    native = logits(model, ids)
    with wearing(model, name):
        expected = logits(model, ids)
    steps = [lambda: put(model, name), lambda: offload(model, tmp_path)]
    for step in steps if order == "patch first" else reversed(steps):
        step()
    assert any(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(logits(model, ids), expected)
    if order == "offload first":
        unpatch_model(model)
        assert torch.equal(logits(model, ids), native)


@cells
def test_eager_returns_causal_attention_weights_that_sum_to_one(family, name):
    model, ids = put(build(family), name, backend="eager"), tokens(2, 40)
    with torch.no_grad():
        output = model(ids, output_attentions=True)
    assert len(output.attentions) == model.config.num_hidden_layers
    for weights in output.attentions:
        assert weights.shape == (2, 4, 40, 40)
        assert torch.allclose(weights.sum(-1), torch.ones(2, 4, 40), atol=1e-6)
        assert weights.triu(1).abs().max() == 0
    assert torch.equal(output.logits, logits(model, ids))


@cells
def test_tables_of_a_scheme_stay_float32_in_a_bfloat16_model(family, name):
    """Casting the model after the patch must not round the tables of the scheme."""
    ids = tokens(1, 48)
    cast_after = put(build(family), name, backend="eager").to(torch.bfloat16)
    cast_before = put(build(family).to(torch.bfloat16), name, backend="eager")
    assert torch.equal(logits(cast_after, ids), logits(cast_before, ids))
    scheme = cast_after.base_model.position_schemes.scheme[0]
    tables = [table for pair in getattr(scheme, "_tables", {}).values() for table in pair]
    numbers = [*scheme._constants.values(), *tables]
    assert (numbers or name == "dynamic_ntk") and all(number.dtype == torch.float32 for number in numbers)
    if name == "yarn":
        expected = oracles.yarn_frequencies(2 * PAIRS[family], 10000.0, 2.0, WINDOW, beta_fast=4)
        assert torch.allclose(scheme.inv_freq.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("cast", ["autocast", "bfloat16"])
def test_rope_in_low_precision_equals_the_native_rotation(family, cast, tmp_path):
    """Transformers computes angles in float32 there, unless `to` casts its table; a patch must do the same."""
    model, ids = build(family), tokens(1, 300)
    if cast == "bfloat16":
        model.save_pretrained(tmp_path)
        model = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16).eval()

    def run() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=cast == "autocast"):
            return logits(model, ids)

    native = run()
    for name in ("rope", "linear"):
        scheme, options = case(family, name)
        patch_model(model, scheme, **{**options, "factor": 1.0} if "factor" in options else options)
        assert torch.equal(run(), native), name
        unpatch_model(model)


@cells
def test_loading_through_the_meta_device_leaves_no_uninitialised_table(family, name, monkeypatch):
    """Sharded and low-memory loading build a model on the meta device and allocate it by `to_empty`."""
    ids, real = tokens(1, 40), build(family)
    weights = real.state_dict()
    expected = logits(put(real, name), ids)
    with torch.device("meta"):
        model = put(build(family), name)
    poison = float("nan")
    monkeypatch.setattr(torch, "empty_like", lambda t, **_: torch.full(t.shape, poison, dtype=t.dtype, device="cpu"))
    model.to_empty(device="cpu")
    monkeypatch.undo()
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    assert torch.equal(logits(model, ids), expected)
