"""Positions added to the embeddings, against the host itself: it is handed the sums, or a table lengthened by hand."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from pe_patch import SCHEMES, AttentionShape, PePatchError, patch_model, unpatch_model
from pe_patch.errors import BeyondWindowError, OptionError

from .models import WINDOW, build, cached_logits, error, logits, snapshot, tokens, unchanged

SHAPE = AttentionShape(
    hidden_size=6, num_heads=2, num_key_value_heads=2, head_dim=3, rotary_dim=2, rotary_start=0, rope_theta=10000.0,
    trained_length=WINDOW, num_layers=2,
)  # fmt: skip
ROWS = 48


def with_table(family: str, rows: int = WINDOW):
    """GPT-2 or OPT with a table of `rows` positions, every weight but the table the same for any number of rows."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "num_hidden_layers": 2, "num_attention_heads": 4, "bos_token_id": 1, "pad_token_id": 0}
    if family == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_positions=rows, eos_token_id=None, **sizes)).eval()
        table = model.transformer.wpe.weight
    else:
        config = OPTConfig(
            hidden_size=64, ffn_dim=128, max_position_embeddings=rows, word_embed_proj_dim=64, eos_token_id=None,
            **sizes,
        )  # fmt: skip
        model = OPTForCausalLM(config).eval()
        table = model.model.decoder.embed_positions.weight
    for index, (_, parameter) in enumerate(sorted(model.named_parameters())):
        if parameter is not table and parameter.ndim > 1:
            parameter.data = 0.15 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
    own = torch.randn(WINDOW + 2, 64, generator=torch.Generator().manual_seed(99))
    table.data[: WINDOW + 2] = own[: table.shape[0]]
    return model, table


def lengthened(known: torch.Tensor, extend: str) -> torch.Tensor:
    """`ROWS` rows from `WINDOW`, one row at a time in float64."""
    known, rows = known.double(), []
    basis = [(row - 0.4 * known[0]) / 0.6 for row in known]
    for position in range(ROWS):
        if extend == "hierarchical":
            coarse, fine = divmod(position, len(known))
            rows.append(0.4 * basis[coarse] + 0.6 * basis[fine])
        else:
            place = position * (len(known) - 1) / (ROWS - 1)
            low = min(int(place), len(known) - 2)
            rows.append(known[low] + (place - low) * (known[low + 1] - known[low]))
    return torch.stack(rows)


@pytest.mark.parametrize("extend", ["hierarchical", "interpolate"])
@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_a_lengthened_table_is_the_host_with_a_longer_one(family, extend):
    offset = 2 if family == "opt" else 0
    model, table = with_table(family)
    host, longer = with_table(family, ROWS)
    with torch.no_grad():
        longer[offset:] = lengthened(table.detach()[offset : offset + WINDOW], extend).float()
    before = snapshot(model)
    patch_model(model, "learned", max_positions=ROWS, extend=extend)
    ids = tokens(2, ROWS)
    expected = logits(host, ids)
    assert error(logits(model, ids), expected) < 1e-5
    assert error(cached_logits(model, ids, 40), expected) < 1e-5
    assert model.config.max_position_embeddings == ROWS
    with pytest.raises(PePatchError, match=f"beyond the {ROWS}"):
        logits(model, tokens(1, ROWS + 1))
    unpatch_model(model)
    assert unchanged(before, snapshot(model))
    if family == "gpt2":
        with pytest.raises(IndexError):
            logits(model, ids)


def test_a_shorter_table_is_cut():
    model, _ = with_table("gpt2")
    ids = tokens(1, 16)
    native = logits(model, ids)
    patch_model(model, "learned", max_positions=16)
    assert torch.equal(logits(model, ids), native)
    with pytest.raises(PePatchError, match="beyond the 16"):
        logits(model, tokens(1, 17))


def by_hand(name: str, weight: torch.Tensor, position: int) -> torch.Tensor:
    """What stands for one position, by the definition in float64."""
    if name == "integer":
        return 1.5 * position / WINDOW * weight.double()
    one_hot = torch.zeros(weight.shape[0] if name == "learned" else weight.shape[1], dtype=torch.float64)
    one_hot[position] = 1
    return weight.double().T @ one_hot if name == "learned" else weight.double() @ one_hot


ADDED = {"integer": {"scale": 1.5}, "one_hot": {"max_positions": ROWS}, "learned": {"max_positions": ROWS}}


@pytest.mark.parametrize("name", ADDED)
def test_added_to_a_rotary_model_is_the_host_given_the_sums(name):
    """Forward, and the gradient of the scheme's own weights, with positions that do not begin at zero."""
    model, ids = build("llama"), tokens(2, 20)
    position_ids = torch.arange(20)[None].expand(2, -1) + torch.tensor([[0], [11]])
    embeddings = model.get_input_embeddings()(ids).detach()
    host_weight = torch.randn(patched_weight(model, name).shape, generator=torch.Generator().manual_seed(5))
    unpatch_model(model)
    host_weight.requires_grad_()
    table = torch.stack([by_hand(name, host_weight, position) for position in range(31)])
    sums = embeddings + table[position_ids].float()
    expected = model(inputs_embeds=sums, position_ids=position_ids, labels=ids, use_cache=False)
    expected.loss.backward()
    ours = patched_weight(model, name)
    ours.data = host_weight.detach().clone()
    found = model(input_ids=ids, position_ids=position_ids, labels=ids, use_cache=False)
    found.loss.backward()
    assert error(found.logits.detach(), expected.logits.detach()) < 1e-5
    assert host_weight.grad.abs().max() > 1e-3
    torch.testing.assert_close(ours.grad, host_weight.grad, rtol=1e-4, atol=1e-6)


def patched_weight(model, name):
    """Patch beside the native rotation and return the scheme's own weight."""
    patch_model(model, name, keep_native=True, **ADDED[name])
    (weight,) = [p for n, p in model.named_parameters() if "position_schemes.scheme" in n]
    return weight


@pytest.mark.parametrize("name", ADDED)
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_untrained_it_is_nope(family, name):
    model, ids = build(family), tokens(2, 20)
    patch_model(model, "nope")
    expected = logits(model, ids)
    patch_model(model, name, on_existing="replace", **ADDED[name])
    assert torch.equal(logits(model, ids), expected)


def test_one_hot_takes_over_no_table_and_may_stand_beside_one():
    model, table = with_table("gpt2")
    native = logits(model, tokens(1, 20))
    patch_model(model, "one_hot")
    own = model.transformer.position_schemes.scheme[0].weight
    assert own.shape == (64, WINDOW) and not own.any()
    assert not table.requires_grad
    patch_model(model, "one_hot", on_existing="replace", keep_native=True)
    assert torch.equal(logits(model, tokens(1, 20)), native)
    patch_model(model, "nope", on_existing="replace")
    bare = logits(model, tokens(1, 20))
    patch_model(model, "one_hot", on_existing="replace")
    model.transformer.position_schemes.scheme[0].weight.data = table.detach().T.clone()
    assert error(logits(model, tokens(1, 20)), native) < 1e-5 < error(bare, native)


@pytest.mark.parametrize("family", ("gpt2", "opt"))
def test_a_table_that_stays_beside_a_scheme_bounds_the_length(family):
    """Beyond its table the native model fails too, with an IndexError that names nothing."""
    model, _ = with_table(family)
    patch_model(model, "integer", keep_native=True)
    logits(model, tokens(1, WINDOW))
    with pytest.raises(BeyondWindowError, match=f"{WINDOW + 1} tokens .* {WINDOW} positions .* keep_native"):
        model(tokens(1, WINDOW + 1))


@pytest.mark.parametrize("name", ["integer", "one_hot"])
def test_weights_start_at_zero_in_the_model_s_own_dtype(name):
    model = build("llama").to(torch.bfloat16)
    patch_model(model, name)
    (weight,) = [p for n, p in model.named_parameters() if "position_schemes.scheme" in n]
    assert weight.dtype == torch.bfloat16 and not weight.any()


def test_the_integer_is_not_rounded_in_half_precision():
    """Positions above 256 are not exact in bfloat16; shares of the window are computed in float32."""
    scheme = SCHEMES["integer"](AttentionShape(**{**SHAPE.__dict__, "trained_length": 4096})).to(torch.bfloat16)
    scheme.direction.data.fill_(1.0)
    places = torch.tensor([[0, 257, 4095]])
    found = scheme.embed(torch.zeros(1, 3, 6, dtype=torch.float64), places)[0, :, 0]
    assert found.tolist() == pytest.approx([0, 257 / 4096, 4095 / 4096], abs=1e-6)


def test_options_are_checked():
    for scale in (0, float("inf"), "2", True):
        with pytest.raises(OptionError, match="scale="):
            SCHEMES["integer"](SHAPE, scale=scale)
    windowless = AttentionShape(**{**SHAPE.__dict__, "trained_length": 0})
    with pytest.raises(OptionError, match="original_max_position_embeddings=<tokens>"):
        SCHEMES["integer"](windowless)
    for options, said in (({}, "max_positions=<tokens>"), ({"max_positions": 0}, "at least 1")):
        with pytest.raises(OptionError, match=said):
            SCHEMES["one_hot"](windowless, **options)
