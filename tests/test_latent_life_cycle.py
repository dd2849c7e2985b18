"""A converted model from the patch to its end: saved, loaded elsewhere, trained, copied, described, undone, refused."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
from transformers import DynamicCache

from pe_patch import PePatchError, describe, load_adapter, load_patched, patch_model, patched, unpatch_model
from pe_patch.errors import CheckpointError

from .families import build as native
from .models import build, error, logits, snapshot, tokens, unchanged

SEEN = tokens(8, 24, seed=5)
SMALL = {"kv_rank": 12, "rope_dim": 8, "calibration": SEEN}
OPTIONS = {
    "transmla": SMALL,
    "freed": {**SMALL, "keep_original": False},
    "svd": {**SMALL, "method": "svd", "latent_norm": True},
    "mha2mla": {**SMALL, "method": "mha2mla", "rope_dim": 4},
    "high": {"kv_rank": 12, "rope_dim": 4, "method": "mha2mla", "select": "high", "svd": "split"},
    "searched": {"max_loss": 0.5, "rope_dim": 8, "calibration": SEEN},
    "ratio": {"cache_ratio": 0.4, "calibration": SEEN},
    "longer": {**SMALL, "factor": 2.0},
}
SAVED = [
    *(("llama", name, {}) for name in OPTIONS),
    *((family, name, {}) for family in ("gpt_neox", "qwen3") for name in ("transmla", "mha2mla", "freed", "longer")),
    ("llama", "transmla", {"max_shard_size": "20KB"}),
]
READER = """
import sys, torch
from transformers import AutoModelForCausalLM
from pe_patch import load_patched
root, ids = sys.argv[1], torch.load(sys.argv[1] + "/ids.pt")
found = {}
for folder in sys.argv[2:]:
    with torch.no_grad():
        model = load_patched(root + "/" + folder).eval()
        found[folder] = model(ids, use_cache=False).logits
        again = AutoModelForCausalLM.from_pretrained(root + "/" + folder)
        assert torch.equal(again(ids, use_cache=False).logits, found[folder])
    try:
        type(model).from_pretrained(root + "/" + folder)
        found[folder + " plain"] = "loaded"
    except Exception as error:
        found[folder + " plain"] = str(error)
torch.save(found, root + "/found.pt")
"""


def converted(family="llama", name="transmla", dtype=None):
    return patch_model(narrow(build(family), dtype), "mla", **OPTIONS[name])


def narrow(model, dtype):
    """As loaded in this dtype: `to` would also round the model's own frequencies."""
    frequencies = model.model.rotary_emb.inv_freq if dtype else None
    model.to(dtype)
    if dtype:
        model.model.rotary_emb.inv_freq = frequencies.float()
    return model


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """Converted models, saved, and what a fresh process makes of them."""
    root, ids, expected, folders = tmp_path_factory.mktemp("saved"), tokens(2, 30), {}, []
    torch.save(ids, root / "ids.pt")
    for index, (family, name, how) in enumerate(SAVED):
        model = converted(family, name, **({"dtype": torch.bfloat16} if name == "ratio" else {}))
        folders.append(f"{index}")
        model.save_pretrained(root / folders[-1], **how)
        expected[folders[-1]] = logits(model, ids)
    done = subprocess.run([sys.executable, "-c", READER, root, *folders], capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    return root, expected, torch.load(root / "found.pt"), done.stderr + done.stdout


@pytest.mark.parametrize("index", range(len(SAVED)), ids=[f"{family}-{name}" for family, name, _ in SAVED])
def test_a_fresh_process_loads_the_same_bits(index, read):
    root, expected, found, _ = read
    assert torch.equal(found[f"{index}"], expected[f"{index}"])
    assert "pe_patch" in found[f"{index} plain"]
    record = json.loads((root / f"{index}" / "config.json").read_text())["pe_patch"]["options"]
    assert not {"calibration", "cache_ratio", "max_loss"} & record.keys()
    assert record["kv_rank"] >= 1 and record["rope_dim"] >= 2


def test_loading_says_little(read):
    """No list of weights that were missing or not expected."""
    assert "self_attn" not in read[3] and "position_schemes" not in read[3]


@pytest.mark.parametrize(
    ("lost", "named"),
    [
        ("model.layers.1.self_attn.mla.k_b_proj.weight", "mla.k_b_proj"),
        ("model.position_schemes.original.layers_0_q_proj.weight", "layers_0_q_proj"),
        ("model.norm.weight", "model.norm.weight"),
    ],
)
def test_a_weight_that_a_checkpoint_lacks_is_named(lost, named, tmp_path):
    model = converted()
    model.save_pretrained(tmp_path, state_dict={name: t for name, t in model.state_dict().items() if name != lost})
    with pytest.raises(CheckpointError, match=named):
        load_patched(tmp_path)


def everything(model):
    """A snapshot, and the orders that an optimiser and a checkpoint go by."""
    orders = {
        "state": list(model.state_dict()),
        "parameters": [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
        "modules": [(name, id(module)) for name, module in model.named_modules()],
        "dict": {name: set(module.__dict__) for name, module in model.named_modules()},
    }
    return snapshot(model), orders


def same(before, after):
    return unchanged(before[0], after[0]) and before[1] == after[1]


def train(model, steps=2, rate=1e-2):
    model.train()
    ids, losses = tokens(4, 24), []
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(steps):
        optimiser.zero_grad()
        losses.append(model(input_ids=ids, labels=ids, use_cache=False).loss)
        losses[-1].backward()
        optimiser.step()
    model.eval()
    return [float(one.detach()) for one in losses]


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen3", "mistral"])
@pytest.mark.parametrize("name", ["transmla", "high", "searched", "longer"])
def test_undo_gives_every_bit_back(family, name):
    model = build(family)
    next(model.parameters()).requires_grad_(False)
    before = everything(model)
    patch_model(model, "mla", **OPTIONS[name])
    logits(model, tokens(1, 8))
    assert same(before, everything(unpatch_model(model)))
    with pytest.raises(ZeroDivisionError), patched(model, "mla", **OPTIONS[name]) as inside:
        assert logits(inside, tokens(1, 8)).isfinite().all()
        raise ZeroDivisionError
    assert same(before, everything(model))


def test_undo_after_training_gives_back_the_attention():
    model = build("llama")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    patch_model(model, "mla", **SMALL)
    taken = [p for name, p in model.named_parameters() if "position_schemes.original" in name]
    kept = [p.clone() for p in taken]
    train(model)
    assert len(taken) == 6 and all(p.grad is None and not p.requires_grad for p in taken)
    assert all(torch.equal(one, other) for one, other in zip(taken, kept, strict=True))
    unpatch_model(model)
    after = model.state_dict()
    assert list(after) == list(before) and all(p.requires_grad for p in model.parameters())
    stayed = [name for name in before if any(part in name for part in ("q_proj", "k_proj", "v_proj"))]
    assert len(stayed) == 6 and all(torch.equal(after[name], before[name]) for name in stayed)


def test_undo_after_loading_gives_the_original(tmp_path):
    model, ids = build("qwen3"), tokens(2, 20)
    expected = logits(model, ids)
    patch_model(model, "mla", **SMALL).save_pretrained(tmp_path)
    loaded = unpatch_model(load_patched(tmp_path))
    assert torch.equal(logits(loaded, ids), expected)
    assert list(loaded.state_dict()) == list(build("qwen3").state_dict())


def test_originals_that_are_not_kept_are_freed_and_cannot_be_put_back():
    model = build("llama")
    weights = [weakref.ref(getattr(layer.self_attn, f"{x}_proj").weight) for layer in model.model.layers for x in "qkv"]
    patch_model(model, "mla", **OPTIONS["freed"])
    gc.collect()
    assert [one() for one in weights] == [None] * 6
    before = everything(model)
    for again in (unpatch_model, lambda m: patch_model(m, "mla", on_existing="replace", **SMALL)):
        with pytest.raises(PePatchError, match=r"keep_original=False.*load the original model"):
            again(model)
        assert same(before, everything(model))


def test_some_layers_alone():
    model, ids = build("llama"), tokens(2, 20)
    native = logits(model, ids)
    patch_model(model, "mla", layers=[1], kv_rank=56, rope_dim=8, method="svd", calibration=SEEN)
    assert not hasattr(model.model.layers[0].self_attn, "mla") and hasattr(model.model.layers[1].self_attn, "mla")
    assert 1e-4 < error(logits(model, ids), native)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    assert [tuple(layer.keys.shape[1::2]) for layer in cache.layers] == [(2, 16), (1, 56)]


def test_copies_and_pickles_and_casts():
    model, ids = converted(), tokens(2, 20)
    expected = logits(model, ids)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other, ids), expected)
        assert torch.equal(logits(unpatch_model(other), ids), logits(build("llama"), ids))
    assert torch.equal(logits(model, ids), expected)
    wide = converted(dtype=torch.float64).double()
    half = model.to(torch.bfloat16)
    assert logits(half, ids).dtype == torch.bfloat16 and error(logits(half, ids).double(), logits(wide, ids)) < 0.1


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen3"])
@pytest.mark.parametrize("name", ["transmla", "svd", "mha2mla"])
def test_training_reaches_every_new_weight(family, name):
    model = converted(family, name)
    parameters = list(model.parameters())
    assert len({id(p) for p in parameters}) == len(parameters)
    losses = train(model, 4, 3e-3)
    assert losses[-1] < losses[0]
    new = {name: p for name, p in model.named_parameters() if ".mla." in name}
    assert len(new) >= 8 and all(p.grad is not None and p.grad.abs().max() > 0 for p in new.values())


def test_prepared_by_accelerate():
    from accelerate import Accelerator

    model, ids = converted(), tokens(2, 20)
    expected = logits(model, ids)
    accelerator = Accelerator(cpu=True)
    model, optimiser = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert error(logits(model, ids), expected) < 1e-6
    accelerator.backward(model(input_ids=ids, labels=ids, use_cache=False).loss)
    optimiser.step()
    assert error(logits(model, ids), expected) > 1e-4


def test_lora_on_top(tmp_path):
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "kv_a_proj_with_mqa", "k_b_proj", "v_b_proj", "o_proj"]
    wrapped = get_peft_model(converted(), LoraConfig(target_modules=targets, r=4, task_type="CAUSAL_LM"))
    losses, ids = train(wrapped, 4, 1e-2), tokens(2, 20)
    assert losses[-1] < losses[0]
    expected = logits(wrapped, ids)
    wrapped.save_pretrained(tmp_path)
    again = load_adapter(converted(), tmp_path).eval()
    assert torch.equal(logits(again, ids), expected)
    assert error(logits(wrapped.merge_and_unload(), ids), expected) < 1e-5


def cache_bytes(model, length):
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=tokens(1, length), past_key_values=cache, use_cache=True)
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.85])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_ratio_is_a_share_of_bytes_and_what_is_described_is_what_is_held(ratio, dtype):
    model = build("llama").to(dtype)
    before = cache_bytes(model, 20)
    patch_model(model, "mla", cache_ratio=ratio, calibration=SEEN)
    after = cache_bytes(model, 20)
    assert 0.8 * ratio * before < after <= ratio * before
    told = describe(model).effective
    assert told["cache_bytes_per_token"] == f"{after // 20:,} (was {before // 20:,})"
    assert told["effective_window"] == model.config.max_position_embeddings == 32
    assert "unbounded" not in str(describe(model))


@pytest.mark.parametrize("layers", [None, [1]])
def test_a_native_model_is_described_by_what_it_holds(layers):
    model = patch_model(native("deepseek_v3"), "mla", layers=layers)
    width = model.config.kv_lora_rank + model.config.qk_rope_head_dim
    told, size = describe(model).effective, 4 * width * (len(layers) if layers else model.config.num_hidden_layers)
    assert told["cache_bytes_per_token"] == f"{size:,} (was {size:,})"
    assert layers or size == cache_bytes(model, 20) // 20
    assert told["effective_window"] == model.config.max_position_embeddings
