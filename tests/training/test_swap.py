"""A change of the family of scheme starts at what the model's own positions did to its attention."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.t5.modeling_t5 import T5Attention

from pe_patch import PePatchError, load_patched, patch_model, unpatch_model
from pe_patch.data.packaged import DEMO_MODEL
from pe_patch.errors import OptionError
from pe_patch.training.warm_start import warm_start

LENGTH, QUERIES = 24, 64  # more queries than there are tokens: all of them are compared


def build(model_type: str, **fields: Any) -> Any:
    """A small model whose attention is far from uniform."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes, **fields))
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "embed" not in name:
            torch.nn.init.normal_(parameter, 0, 0.3)
    return model.eval()


def llama() -> Any:
    sizes = {"num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64}
    return build("llama", initializer_range=1.0, **sizes)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(2, 64, (6, LENGTH), generator=torch.Generator().manual_seed(1))


def scheme_of(model: Any) -> Any:
    return model.base_model.pe_patch.scheme


def watched(model: Any, ids: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Scaled scores without positions and the native attention of each layer, in float64, by Transformers alone."""
    model = copy.deepcopy(model).double()
    model.set_attn_implementation("eager")
    projected: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "k_proj")):
            module.register_forward_hook(lambda _, __, output, name=name: projected.__setitem__(name, output))
    with torch.no_grad():
        native = model(input_ids=ids, output_attentions=True, use_cache=False).attentions
    scores = []
    for layer in range(2):
        query, key = (projected[f"model.layers.{layer}.self_attn.{kind}_proj"] for kind in "qk")
        query, key = (one.view(*ids.shape, -1, 8).transpose(1, 2) for one in (query, key))
        scores.append(query @ key.repeat_interleave(2, 1).mT / 8**0.5)
    return scores, list(native)


def divergence(table: Tensor, scores: list[Tensor], native: list[Tensor]) -> Tensor:
    """The mean KL over all queries but the first of each row; the buckets are those of Transformers' T5."""
    at = torch.arange(LENGTH)
    buckets = T5Attention._relative_position_bucket(at - at[:, None], bidirectional=False)
    ahead = at > at[:, None]
    found = []
    for own, theirs in zip(scores, native, strict=True):
        ours = (own + table[buckets].permute(2, 0, 1)).masked_fill(ahead, -torch.inf).log_softmax(-1)
        terms = torch.where(theirs > 0, theirs * (theirs.log() - ours), 0)
        found.append(terms.sum(-1)[:, :, 1:].mean())
    return torch.stack(found).mean()


def test_t5_starts_at_the_optimum(ids):
    """The divergence is convex in the table, so that where its gradient vanishes is the best there is."""
    model = llama()
    scores, native = watched(model, ids)
    patch_model(model, "t5")
    report = warm_start(model, ids, queries=QUERIES, by="attention")
    table = scheme_of(model).table.detach().double().requires_grad_()
    best = divergence(table, scores, native)
    (slope,) = torch.autograd.grad(best, table)
    start = divergence(torch.zeros_like(table), scores, native)
    assert report.before == pytest.approx(start.item(), rel=1e-4)
    assert report.after == pytest.approx(best.item(), rel=1e-4)
    assert report.after < 0.99 * report.before
    assert slope.abs().max() < 1e-5
    assert report.fitted == ("table",)


def test_blooms_own_slopes_are_found(ids):
    """What they are is the paper's rule for four heads."""
    model = build("bloom")
    patch_model(model, "alibi", slopes=[0.1, 0.1, 0.1, 0.1])
    report = warm_start(model, ids, queries=QUERIES, by="attention")
    expected = [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8]
    assert scheme_of(model).head_slopes == pytest.approx(expected, rel=1e-2)
    assert report.before > 1e-2 and report.after < 1e-6
    assert model.config.pe_patch["options"]["slopes"] == scheme_of(model).head_slopes


def test_a_slope_keeps_above_its_bound(ids):
    model = build("bloom")
    patch_model(model, "alibi", slopes=[0.1, 0.1, 0.1, 0.1])
    warm_start(model, ids, queries=QUERIES, by="attention", least_slope=0.05)
    assert scheme_of(model).head_slopes[2:] == [0.05, 0.05]


@pytest.mark.parametrize(
    ("scheme", "fitted"),
    [
        ("kerple", ("a", "p")),
        ("fire", ("c", "multiplier", "weight_in", "bias_in", "weight_out", "bias_out")),
        ("transformer_xl", ("u", "v", "projection")),
        ("shaw", ("keys",)),
    ],
)
def test_whatever_changes_the_scores_is_fitted(ids, scheme, fitted):
    """In eager, weight by weight: the attention of the patched model came nearer to the native one in each layer."""
    model = llama()
    native = watched(model, ids)[1]
    torch.manual_seed(2)
    options: dict[str, Any] = {"threshold": LENGTH} if scheme == "fire" else {}
    patch_model(model, scheme, layers=[0], **options)

    def away() -> float:
        model.set_attn_implementation("eager")
        with torch.no_grad():
            ours = model(input_ids=ids, output_attentions=True, use_cache=False).attentions[0].double()
        return float(torch.where(native[0] > 0, native[0] * (native[0] / ours).log(), 0).sum(-1)[:, :, 1:].mean())

    before = away()
    report = warm_start(model, ids, queries=QUERIES, by="attention")
    assert report.before == pytest.approx(before, rel=1e-3)
    assert report.after == pytest.approx(away(), rel=1e-3)
    assert report.after < 0.99 * report.before
    assert report.fitted == fitted


def test_the_model_itself_stays_as_it_was(ids):
    model = llama()
    before, state = model(ids).logits, copy.deepcopy(model.state_dict())
    gradients = {name: one.requires_grad for name, one in model.named_parameters()}
    attention = model.config._attn_implementation
    patch_model(model, "t5")
    patched = model.config._attn_implementation
    warm_start(model, ids, by="attention")
    assert model.config._attn_implementation == patched
    assert all(one.grad is None for one in model.parameters())
    assert all(one.requires_grad for one in scheme_of(model).parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    unpatch_model(model)
    assert model.config._attn_implementation == attention
    assert {name: one.requires_grad for name, one in model.named_parameters()} == gradients
    assert all(torch.equal(state[name], one) for name, one in model.state_dict().items())
    assert torch.equal(model(ids).logits, before)


def test_it_is_saved_with_the_model(ids, tmp_path):
    for scheme in ("alibi", "t5"):
        model = llama()
        patch_model(model, scheme)
        warm_start(model, ids, by="attention")
        model.save_pretrained(tmp_path / scheme)
        with torch.no_grad():
            assert torch.equal(load_patched(tmp_path / scheme).eval()(ids).logits, model(ids).logits)


@pytest.mark.parametrize("scheme", ["alibi", "t5", "kerple"])
def test_the_loss_chooses(scheme):
    """On text as the demo model itself writes it: never more than the plain patch, and what the model then has."""
    model: Any = AutoModelForCausalLM.from_pretrained(DEMO_MODEL).eval()
    start = torch.randint(300, 900, (4, 4), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        rows = model.generate(start, max_new_tokens=60, do_sample=False, pad_token_id=0)
    torch.manual_seed(0)
    patch_model(model, scheme)

    def measured() -> float:
        with torch.no_grad():
            return float(model(rows, labels=rows, use_cache=False).loss)

    plain = measured()
    report = warm_start(model, rows, queries=16)
    assert report.loss_before == pytest.approx(plain, rel=1e-4)
    assert report.loss_after == pytest.approx(measured(), rel=1e-4)
    assert measured() < plain - 0.1 and report.chosen != "start"


def test_nothing_better_leaves_the_start(ids):
    """BLOOM with its own slopes: on random weights nothing is nearer to it, nor is its loss smaller than itself."""
    model = build("bloom")
    slopes = [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8]
    patch_model(model, "alibi", slopes=slopes)
    report = warm_start(model, ids, queries=QUERIES)
    assert report.before == pytest.approx(0, abs=1e-6)
    assert report.loss_after is not None and report.loss_before is not None
    assert report.loss_after <= report.loss_before
    assert scheme_of(model).head_slopes == pytest.approx(slopes, rel=1e-2)


@pytest.mark.parametrize("scheme", ["nope", "rope", "sinusoidal", "learned"])
def test_nothing_to_fit_is_an_error(ids, scheme):
    model = llama()
    options: dict[str, Any] = {"max_positions": 64} if scheme == "learned" else {}
    patch_model(model, scheme, **options)
    with pytest.raises(OptionError, match="nothing to fit"):
        warm_start(model, ids)


def test_bad_input(ids):
    model = llama()
    with pytest.raises(PePatchError, match="patch_model"):
        warm_start(model, ids)
    patch_model(model, "t5")
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"limit": 0}, "limit=0"),
        ({"queries": 2.5}, r"queries=2\.5"),
        ({"least_slope": -1}, "least_slope=-1"),
        ({"by": "los"}, "Did you mean 'loss'"),
    )
    for options, message in cases:
        with pytest.raises(OptionError, match=message):
            warm_start(model, ids, **options)
    with pytest.raises(OptionError, match="two tokens"):
        warm_start(model, ids[:, :1])
    assert scheme_of(model).table.abs().sum() == 0
    base = model.model
    unpatch_model(model)
    patch_model(base, "t5")
    with pytest.raises(OptionError, match="by='attention'"):
        warm_start(base, ids)
