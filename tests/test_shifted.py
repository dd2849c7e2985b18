"""Shifted sparse attention is the one of the paper, in training and nowhere else."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import pe_patch
from pe_patch import patch_model, unpatch_model
from pe_patch.attention.interface import BACKENDS, Engine
from pe_patch.attention.kernels.shifted import shifted
from pe_patch.errors import OptionError, PePatchError, UnsupportedError
from pe_patch.training.shifted_attention import Shift, shift_attention, unshift_attention

from .families import build

LENGTH, GROUPS = 48, 4


def seen(length: int, groups: int, heads: int, documents: Tensor | None = None) -> Tensor:
    """Which keys each query of each head sees, `[batch, heads, query, key]`, bool: the paper's section 3.2, token by
    token. Tokens belong to group floor(i / G), in the second half of the heads to floor((i + G / 2) / G), causally."""
    size = length // groups
    mask = torch.zeros(1 if documents is None else len(documents), heads, length, length, dtype=torch.bool)
    for head in range(heads):
        move = 0 if head < heads // 2 else size // 2
        for i in range(length):
            for j in range(i + 1):
                if (i + move) // size == (j + move) // size:
                    mask[:, head, i, j] = True
    return mask if documents is None else mask & (documents[:, None, :, None] == documents[:, None, None, :])


def dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Softmax attention from its formula, float64, `[batch, length, heads, head]`."""
    times = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    scores = torch.einsum("bhid,bhjd->bhij", query, key) / math.sqrt(query.shape[-1])
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return torch.einsum("bhij,bhjd->bihd", weights, value)


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_the_groups_are_those_of_the_paper(key_heads: int, masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, LENGTH, 8, generator=generator, dtype=torch.float64)
    key, value = (torch.randn(2, key_heads, LENGTH, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    documents = torch.tensor([[0] * 20 + [1] * 28, [0] * 31 + [1] * 17])
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    given = causal & (documents[:, None, :, None] == documents[:, None, None, :]) if masked else None

    def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        rows = query.shape[2]
        return dense(query, key, value, torch.ones(rows, rows, dtype=torch.bool).tril() if mask is None else mask)

    ours = shifted(attention, query, key, value, given, GROUPS)
    expected = dense(query, key, value, seen(LENGTH, GROUPS, 4, documents if masked else None))
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def oracle(model: Any, mask: Tensor) -> None:
    """Give every layer the mask of the paper instead of the causal one; the attention under it is Transformers'."""
    for layer in model.model.layers:
        module = layer.self_attn
        original = type(module).forward

        def attend(*given: Any, module: Any = module, original: Any = original, **named: Any) -> Any:
            return original(module, *given, **{**named, "attention_mask": mask})

        module.forward = attend


def packed(batch: int) -> tuple[dict[str, Any], Tensor]:
    starts = [[0, 20], [0, 31]]
    documents = torch.zeros(batch, LENGTH, dtype=torch.long)
    positions = torch.arange(LENGTH).repeat(batch, 1)
    for row in range(batch):
        documents[row, starts[row][1] :] = 1
        positions[row, starts[row][1] :] -= starts[row][1]
    ids = torch.randint(3, 97, (batch, LENGTH), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "position_ids": positions, "use_cache": False}, documents


@pytest.mark.parametrize("scheme", ["linear", "nope", "sinusoidal"])
@pytest.mark.parametrize(("attention", "key_heads"), [("sdpa", 2), ("eager", 2), ("sdpa", 1), ("eager", 1)])
@pytest.mark.parametrize("documents", [False, True])
def test_a_model_trains_under_the_papers_mask_and_reads_in_full(
    scheme: str, attention: str, key_heads: int, documents: bool
) -> None:
    options = {"factor": 4} if scheme == "linear" else {}
    model = patch_model(build("llama", attention, num_key_value_heads=key_heads).double(), scheme, **options)
    inputs, at = packed(2)
    if not documents:
        del inputs["position_ids"]
    with torch.no_grad():
        before = model(**inputs).logits
    shift_attention(model, GROUPS)
    with torch.no_grad():
        assert torch.equal(model.eval()(**inputs).logits, before)
    target = patch_model(build("llama", "sdpa", num_key_value_heads=key_heads).double(), scheme, **options).train()
    oracle(target, seen(LENGTH, GROUPS, 4, at if documents else None))
    gradients = []
    for one in (model.train(), target):
        one.gradient_checkpointing_enable()
        loss = one(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        gradients.append([loss.detach(), *(p.grad for p in one.parameters() if p.grad is not None)])
    assert float((model(**inputs).logits - before).abs().max()) > 1e-3
    for ours, theirs in zip(*gradients, strict=True):
        within = 1e-9 if attention == "sdpa" else 1e-5  # the family's eager softmax is in float32
        torch.testing.assert_close(ours, theirs, rtol=within, atol=within)


def test_no_token_sees_one_ahead_of_it() -> None:
    model = shift_attention(patch_model(build("llama"), "rope"), GROUPS).train()
    ids = torch.arange(3, 3 + LENGTH)[None]
    changed = ids.clone()
    changed[:, 30:] = 5
    with torch.no_grad():
        first, second = (model(one, use_cache=False).logits for one in (ids, changed))
    assert torch.equal(first[:, :30], second[:, :30]) and not torch.equal(first[:, 30:], second[:, 30:])


def test_nothing_stays_of_it(tmp_path: Any) -> None:
    plain = build("llama")
    keys = {name: set(vars(module)) for name, module in plain.named_modules()}
    model = patch_model(copy.deepcopy(plain), "linear", factor=4)
    config, patched_keys = model.config.to_dict(), {name: set(vars(module)) for name, module in model.named_modules()}
    shift_attention(shift_attention(model, 2), GROUPS)
    copied = copy.deepcopy(model).train()
    ids = torch.arange(3, 3 + LENGTH)[None]
    with torch.no_grad():
        assert torch.equal(copied(ids, use_cache=False).logits, model.train()(ids, use_cache=False).logits)
    assert model.config.to_dict() == config
    model.eval().save_pretrained(tmp_path)
    loaded = pe_patch.load_patched(tmp_path)
    assert not any("pe_shift" in vars(module) for module in loaded.modules())
    unshift_attention(model)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == patched_keys
    with pytest.raises(PePatchError, match="not shifted"):
        unshift_attention(model)
    unpatch_model(shift_attention(model, GROUPS))
    assert {name: set(vars(module)) for name, module in model.named_modules()} == keys


@pytest.mark.parametrize("scheme", ["alibi", "t5", "self_extend", "xpos", "cope", "rope_alibi", "dynamic_ntk", "mla"])
def test_what_acts_on_the_scores_is_refused_by_name(scheme: str) -> None:
    options: dict[str, dict[str, Any]] = {
        "self_extend": {"group": 4, "window": 16}, "dynamic_ntk": {"factor": 2},
        "mla": {"calibration": [list(range(3, 90))], "kv_rank": 16},
    }  # fmt: skip
    model = patch_model(build("llama"), scheme, **options.get(scheme, {}))
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    with pytest.raises(UnsupportedError, match=scheme if scheme != "mla" else "attend to latents"):
        shift_attention(model, GROUPS)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("family", ["gemma3_text", "gpt_oss", "deepseek_v3"])
def test_layers_of_another_kind_are_refused(family: str) -> None:
    with pytest.raises(UnsupportedError, match=family):
        shift_attention(patch_model(build(family), "rope", on_existing="replace"), GROUPS)


def test_a_family_of_its_own_bias_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="'alibi' under 'sinusoidal' acts on the scores of layer 0 of bloom"):
        shift_attention(patch_model(build("bloom"), "sinusoidal", keep_native=True), GROUPS)


def test_bad_input_is_named() -> None:
    with pytest.raises(PePatchError, match="is not patched"):
        shift_attention(build("llama"), GROUPS)
    model = patch_model(build("llama"), "rope")
    wrong: tuple[Any, ...] = (1, 0, True, 2.0, None)
    for groups in wrong:
        with pytest.raises(OptionError, match="at least 2"):
            shift_attention(model, groups)
    odd = patch_model(build("llama", hidden_size=48, num_attention_heads=3, num_key_value_heads=3), "rope")
    with pytest.raises(OptionError, match="has 3"):
        shift_attention(odd, GROUPS)
    shift_attention(model, GROUPS).train()
    ids = torch.arange(3, 3 + LENGTH)[None]
    with pytest.raises(UnsupportedError, match="multiple of 8"):
        model(ids[:, :44], use_cache=False)
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(UnsupportedError, match="whole sequences"):
        model(ids[:, :8], past_key_values=cache)
    core = Engine(model.model.layers[0].self_attn, None, 1.0, 0.0, BACKENDS["flash"], {})
    with pytest.raises(UnsupportedError, match="flash does not allow"):
        Shift(GROUPS, 4)(core, *[torch.zeros(1, 4, LENGTH, 16)] * 3, None)
    core.backend = BACKENDS["sdpa"]
    with pytest.raises(UnsupportedError, match="spread over processes"):
        Shift(GROUPS, 4)(core, *[torch.zeros(1, 2, LENGTH, 16)] * 3, None)
    with pytest.raises(UnsupportedError, match="flex does not allow"):
        shift_attention(patch_model(build("llama"), "rope", backend="flex"), GROUPS)
