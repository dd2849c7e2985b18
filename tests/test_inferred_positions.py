"""Families without a rotary module for all layers: tables, none at all, and attentions outside the interface."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pe_patch import ADAPTERS, UnsupportedError, compat, describe, load_patched, patch_model, unpatch_model
from pe_patch.adapters.inferred import INFERRED
from pe_patch.errors import BeyondWindowError, OptionError

from .model_types.tiny import VOCABULARY, WINDOW, tiny, tiny_config, with_random_weights

LONG = 150
IDS = torch.randint(4, VOCABULARY - 1, (2, LONG), generator=torch.Generator().manual_seed(5))
TABLES = ["bert", "roberta", "xlm-roberta", "electra", "distilbert", "whisper", "bart", "marian", "gpt_neo", "xglm"]
ENCODERS = ["bert", "roberta", "xlm-roberta", "electra", "distilbert", "ernie"]


@torch.no_grad()
def output(model, length=20, **given):
    return model(input_ids=IDS[:, :length], **given)[0]


def encoder(family, **settings):
    """A tiny bidirectional model without a head."""
    torch.manual_seed(0)
    return with_random_weights(AutoModel.from_config(tiny_config(family, **settings)).eval())


# Tables of positions.


@pytest.mark.parametrize("family", ENCODERS)
def test_an_encoder_keeps_every_bit_under_its_own_table(family):
    assert family not in ADAPTERS
    model = encoder(family)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, 15:] = 0
    before, padded = output(model), output(model, attention_mask=mask)
    patch_model(model, "learned")
    assert torch.equal(output(model), before)
    assert torch.equal(output(model, attention_mask=mask)[mask == 1], padded[mask == 1])
    unpatch_model(model)
    patch_model(model, "nope")
    assert float((output(model) - before).abs().max()) > 1e-2
    unpatch_model(model)
    assert torch.equal(output(model), before)


def hierarchical(rows, count, alpha):
    """Su 2020: with U = (E - alpha E[0]) / (1 - alpha), row n i + j is alpha U[i] + (1 - alpha) U[j]."""
    rows = rows.double()
    basis = (rows - alpha * rows[:1]) / (1 - alpha)
    index = torch.arange(count)
    extended = alpha * basis[index // len(rows)] + (1 - alpha) * basis[index % len(rows)]
    return torch.cat((rows, extended[len(rows) :])).float()


def stretched(rows, count):
    """Linear interpolation between neighbouring rows, both ends kept."""
    at = torch.linspace(0, len(rows) - 1, count, dtype=torch.float64)
    low = at.floor().long().clamp(max=len(rows) - 2)
    weight = (at - low)[:, None]
    return ((1 - weight) * rows.double()[low] + weight * rows.double()[low + 1]).float()


@pytest.mark.parametrize("extend", ["hierarchical", "interpolate"])
@pytest.mark.parametrize(("family", "offset"), [("bert", 0), ("xlm-roberta", 1), ("distilbert", 0), ("mpnet", 2)])
def test_an_encoder_reads_beyond_its_table_as_one_with_a_longer_table(family, offset, extend):
    """The expected model is Transformers' own with a table of that length. RoBERTa's begins behind its padding row,
    MPNet's behind two."""
    model = encoder(family)
    native = encoder(family)
    patch_model(model, "learned", max_positions=LONG, extend=extend)
    name = ADAPTERS[family].learned if family in ADAPTERS else INFERRED[model].learned
    rows = native.get_parameter(f"{name}.weight").detach()
    longer = encoder(family, max_position_embeddings=LONG + offset)
    longer.load_state_dict({key: value for key, value in native.state_dict().items() if key != f"{name}.weight"}, False)
    own = rows[offset:]
    made = hierarchical(own, LONG, 0.4) if extend == "hierarchical" else stretched(own, LONG)
    with torch.no_grad():
        longer.get_parameter(f"{name}.weight").copy_(torch.cat((rows[:offset], made)))
    torch.testing.assert_close(output(model, LONG), output(longer, LONG), rtol=0, atol=2e-5)


def test_a_table_that_is_not_extended_ends():
    model = encoder("bert")
    patch_model(model, "learned")
    with pytest.raises(BeyondWindowError, match=f"beyond the {WINDOW}"):
        output(model, WINDOW + 1)


def test_a_longer_encoder_is_saved_and_loaded(tmp_path):
    model = encoder("bert")
    patch_model(model, "learned", max_positions=LONG, extend="hierarchical")
    before = output(model, LONG)
    model.save_pretrained(tmp_path)
    again = load_patched(tmp_path).eval()
    assert torch.equal(output(again, LONG), before)
    unpatch_model(again)
    assert again.config.max_position_embeddings == WINDOW


def test_a_renamed_window_is_restored(tmp_path):
    """GPT-2 calls its window `n_positions`; a window that grows with every reload would be silent."""
    model = tiny("gpt2")
    native = output(model)
    patch_model(model, "learned", max_positions=LONG, extend="interpolate")
    before = output(model, LONG)
    model.save_pretrained(tmp_path)
    again = load_patched(tmp_path).eval()
    assert torch.equal(output(again, LONG), before)
    unpatch_model(again)
    assert again.config.n_positions == WINDOW and torch.equal(output(again), native)


def test_roberta_generates_what_a_full_pass_gives():
    """Transformers counts positions in generation from 0, and RoBERTa's table begins at 2."""
    model = tiny("xlm-roberta")
    patch_model(model, "learned")
    prompt = IDS[:1, :12]
    written = model.generate(prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        full = model(input_ids=written, use_cache=False).logits.argmax(-1)
    assert torch.equal(full[:, 11:-1], written[:, 12:])


def test_two_tables_are_refused():
    model = encoder("bert")
    embeddings = model.embeddings

    class Twice(nn.Module):
        """Adds a second table to what the first gives."""

        def __init__(self):
            super().__init__()
            self.first, self.second = embeddings.position_embeddings, copy.deepcopy(embeddings.position_embeddings)

        def forward(self, ids):
            return self.first(ids) + self.second(ids)

    embeddings.position_embeddings = Twice()
    model.config.model_type = "bert_of_a_stranger"
    with pytest.raises(UnsupportedError, match="several modules return a row for each position"):
        patch_model(model, "learned")


def test_a_second_source_of_positions_in_the_attention_is_refused():
    """MPNet adds a bias by distance to its scores, beside its table."""
    model = encoder("mpnet")
    model.config.model_type = "mpnet_of_a_stranger"
    with pytest.raises(UnsupportedError, match="depends on the order of tokens as it attends"):
        patch_model(model, "nope")


def test_the_table_of_mpnet_is_extended_and_its_bias_stays(tmp_path):
    model = encoder("mpnet")
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, 15:] = 0
    before = output(model, attention_mask=mask)
    patch_model(model, "learned")
    assert torch.equal(output(model, attention_mask=mask)[mask == 1], before[mask == 1])
    unpatch_model(model)
    assert torch.equal(output(model, attention_mask=mask), before)
    for name, options in (("nope", {}), ("alibi", {}), ("sinusoidal", {}), ("one_hot", {"keep_native": True})):
        with pytest.raises(UnsupportedError, match="would stand beside the relative bias of MPNetModel"):
            patch_model(model, name, **options)
    patch_model(model, "learned", max_positions=LONG, extend="interpolate")
    longer = output(model, LONG)
    model.save_pretrained(tmp_path)
    assert torch.equal(output(load_patched(tmp_path).eval(), LONG), longer)


@pytest.mark.parametrize("family", ["xlm-roberta", "mpnet"])
def test_rows_that_are_no_positions_are_not_a_window_that_was_raised(family, caplog):
    patch_model(encoder(family), "learned")
    assert "written into the config" not in caplog.text


def table_rows_of(model):
    """Positions of XLM-R's table, which begins behind the row of padding, 0 in these models."""
    return model.embeddings.position_embeddings.num_embeddings - 1


def test_keep_native_keeps_the_positions_of_roberta():
    """`one_hot` starts at zero, so that nothing may change."""
    model = encoder("xlm-roberta")
    mask = torch.ones(2, 15, dtype=torch.long)
    mask[0, 4:6] = 0
    ids = IDS[:, :15].masked_fill(mask == 0, model.config.pad_token_id)
    before = model(input_ids=ids, attention_mask=mask)[0]
    patch_model(model, "one_hot", keep_native=True)
    after = model(input_ids=ids, attention_mask=mask)[0]
    torch.testing.assert_close(after[mask == 1], before[mask == 1], rtol=0, atol=1e-5)


def test_roberta_reads_its_whole_table_by_explicit_position_ids():
    model = encoder("xlm-roberta")
    rows = table_rows_of(model)
    before = output(model, rows, position_ids=torch.arange(1, rows + 1)[None])
    patch_model(model, "learned")
    assert torch.equal(output(model, rows, position_ids=torch.arange(1, rows + 1)[None]), before)


@pytest.mark.parametrize("family", ["bart", "marian"])
def test_a_decoder_with_cross_attention(family):
    """A pass as in training, with a source longer than the target, and one that opens the cache; and generation."""
    model = AutoModelForSeq2SeqLM.from_config(tiny_config(family, decoder_start_token_id=2)).eval()
    with_random_weights(model)
    source, target = IDS[:, :15], IDS[:, 20:32]

    def runs():
        with torch.no_grad():
            return [
                model(input_ids=source, decoder_input_ids=target).logits,
                model(input_ids=source, decoder_input_ids=target, use_cache=False).logits,
                model.generate(source, max_new_tokens=6, min_new_tokens=6, do_sample=False),
            ]

    before = runs()
    patch_model(model, "learned", submodule="decoder")
    for found, expected in zip(runs(), before, strict=True):
        assert torch.equal(found, expected)
    unpatch_model(model)
    patch_model(model, "alibi", submodule="decoder")
    full, plain, tokens = runs()
    assert torch.equal(full, plain) and float((full - before[0]).abs().max()) > 1e-3
    assert tokens.shape == before[2].shape


def test_positions_that_begin_again_in_a_table_are_refused():
    model = AutoModel.from_config(tiny_config("tapas")).eval()
    with pytest.raises(UnsupportedError, match="its positions begin again in each cell of a table"):
        patch_model(model, "learned")


def test_looking_changes_no_module():
    """BigBird replaces its sparse attention when it reads a short text."""
    model = AutoModel.from_config(tiny_config("big_bird", is_decoder=False)).eval()
    kinds = [type(module).__name__ for module in model.modules()]
    assert model.attention_type == "block_sparse"
    with pytest.raises(UnsupportedError):
        patch_model(model, "alibi")
    assert model.attention_type == "block_sparse"
    assert [type(module).__name__ for module in model.modules()] == kinds


# No positions.


@pytest.mark.parametrize("family", ["jamba", "kimi_linear"])
def test_a_hybrid_without_positions_gets_some(family):
    model = tiny(family)
    before = output(model)
    patch_model(model, "nope")
    assert torch.equal(output(model), before)
    described = describe(model)
    assert "unpositioned=True" in str(described.inferred_row)
    unpatch_model(model)
    patch_model(model, "alibi")
    assert float((output(model) - before).abs().max()) > 1e-3
    unpatch_model(model)
    assert torch.equal(output(model), before)


# Attentions outside the interface.


@pytest.mark.parametrize("family", ["falcon", "gpt_neox_japanese"])
def test_a_static_rotation_needs_no_interface(family):
    """Transformers' own YaRN is the expected value where the family reads it from its config."""
    model = tiny(family)
    before = output(model)
    patch_model(model, "yarn", factor=4.0)
    patched = output(model)
    unpatch_model(model)
    assert torch.equal(output(model), before)
    theta = model.config.rope_parameters["rope_theta"]
    share = model.config.rope_parameters.get("partial_rotary_factor")
    parameters = {
        "rope_type": "yarn", "rope_theta": theta, "factor": 4.0, "original_max_position_embeddings": WINDOW,
        **({} if share is None else {"partial_rotary_factor": share}),
    }  # fmt: skip
    config = tiny_config(family, rope_parameters=parameters, max_position_embeddings=4 * WINDOW)
    native = AutoModelForCausalLM.from_config(config).eval()
    native.load_state_dict(model.state_dict())
    torch.testing.assert_close(patched, output(native), rtol=0, atol=1e-5 * float(patched.abs().max()))


def test_a_bias_without_the_interface_is_an_error_that_says_what_to_use():
    model = tiny("falcon")
    model.config.model_type = "falcon_of_a_stranger"
    with pytest.raises(
        UnsupportedError, match=r"'alibi' acts at the scores, and FalconModel computes attention in its"
    ):
        patch_model(model, "alibi")
    with pytest.raises(OptionError, match="backend='eager' does not apply: FalconModel computes attention in its own"):
        patch_model(model, "yarn", factor=2, backend="eager")


def test_a_falcon_with_its_own_alibi_is_refused_by_its_row():
    with pytest.raises(UnsupportedError, match="FalconModel cannot be patched here, since this model has ALiBi"):
        patch_model(tiny("falcon", alibi=True), "yarn", factor=2.0)


OWN_CODE = [
    ("gpt_neo", {}), ("gpt_neox_japanese", {}), ("xglm", {}), ("falcon", {}), ("falcon", {"multi_query": False}),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
]  # fmt: skip
"""GPT-Neo has a local layer in these models, whose window is shorter than the texts."""


@pytest.mark.parametrize(("family", "settings"), OWN_CODE, ids=str)
def test_a_scheme_at_the_scores_replaces_the_attention_code_of_a_family(family, settings):
    """`group=1` and distances within the window change nothing, and zero slopes leave no position at all."""
    model = tiny(family, **settings)
    before, own = output(model), model.config._attn_implementation
    tolerance = 2e-6 * float(before.abs().max())
    if ADAPTERS[family].native == "rope":
        for scheme, options in (("self_extend", {"group": 1, "window": 8}), ("dynamic_ntk", {})):
            patch_model(model, scheme, **options, on_existing="replace")
            torch.testing.assert_close(output(model), before, rtol=0, atol=tolerance)
    patch_model(model, "nope", on_existing="replace")
    without = output(model)
    patch_model(model, "alibi", slopes=[1e-12] * model.config.num_attention_heads, on_existing="replace")
    torch.testing.assert_close(output(model), without, rtol=0, atol=tolerance)
    unpatch_model(model)
    assert torch.equal(output(model), before) and model.config._attn_implementation == own


@pytest.mark.parametrize(("family", "settings"), OWN_CODE, ids=str)
@pytest.mark.parametrize(("scheme", "options"), [("alibi", {}), ("lm_infinite", {"window": 8, "sinks": 2})])
def test_such_a_scheme_decodes_pads_and_is_saved(family, settings, scheme, options, tmp_path):
    model = tiny(family, **settings)
    patch_model(model, scheme, **options)
    full = output(model, 24, use_cache=False)
    tolerance = 3e-6 * float(full.abs().max())
    with torch.no_grad():
        first = model(input_ids=IDS[:, :20], use_cache=True)
        steps = [first.logits[:, -1]]
        for at in range(20, 24):
            step = model(input_ids=IDS[:, at : at + 1], past_key_values=first.past_key_values)
            steps.append(step.logits[:, -1])
        mask = torch.ones(2, 28, dtype=torch.long)
        mask[:, :4] = 0
        padded = model(input_ids=torch.cat((IDS[:, :4], IDS[:, :24]), 1), attention_mask=mask, use_cache=False)
    torch.testing.assert_close(torch.stack(steps, 1), full[:, 19:], rtol=0, atol=tolerance)
    torch.testing.assert_close(padded.logits[:, 4:], full, rtol=0, atol=tolerance)
    model.save_pretrained(tmp_path)
    assert torch.equal(output(load_patched(tmp_path).eval(), 24, use_cache=False), full)


def test_a_local_layer_of_gpt_neo_keeps_its_window():
    """Without positions, a model of local layers alone cannot tell what stands before its windows."""
    model = tiny("gpt_neo", attention_types=[[["local"], 2]], window_size=4, num_layers=2)
    patch_model(model, "nope")
    ids = IDS[:1, :20]
    other = ids.clone()
    other[:, :13] = ids[:, :13].flip(1)  # two layers of 4 tokens see 7 tokens
    patch_model(model, "alibi", on_existing="replace")
    with torch.no_grad():
        near, far = model(input_ids=ids).logits[:, -1], model(input_ids=other).logits[:, -1]
    assert torch.equal(near, far)
    other[:, 14] = ids[:, 15]
    with torch.no_grad():
        assert not torch.equal(model(input_ids=other).logits[:, -1], near)


def own_table(inv_freq, factor, rows):
    """GPT-J's and CodeGen's table for frequencies and a factor on cos and sin: sines, then cosines."""
    angles = torch.arange(rows).float()[:, None] * inv_freq
    return torch.cat((angles.sin() * factor, angles.cos() * factor), 1)


@pytest.mark.parametrize("family", ["gptj", "codegen"])
def test_a_scaling_of_a_family_with_sines_in_a_table_is_that_of_transformers(family):
    """The expected model has the frequencies of Transformers' own YaRN in its table."""
    model = tiny(family)
    before = output(model)
    patch_model(model, "yarn", factor=4.0)
    patched = output(model, LONG)
    unpatch_model(model)
    assert torch.equal(output(model), before)
    config = LlamaConfig(
        hidden_size=8, num_attention_heads=1, head_dim=8, max_position_embeddings=4 * WINDOW,
        rope_parameters={
            "rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": WINDOW,
        },
    )  # fmt: skip
    table = own_table(*ROPE_INIT_FUNCTIONS["yarn"](config, "cpu"), LONG)
    holders = [layer.attn for layer in model.base_model.h] if compat.OWN_SCORES else [model.base_model.rotary_emb]
    for holder in holders:
        holder.embed_positions = table
    torch.testing.assert_close(patched, output(model, LONG), rtol=0, atol=1e-5 * float(patched.abs().max()))


@pytest.mark.parametrize("family", ["gptj", "codegen"])
def test_positions_that_begin_again_separate_documents(family):
    model = tiny(family)
    positions = torch.arange(20)[None] % 10
    patch_model(model, "rope")
    with torch.no_grad():
        packed = model(input_ids=IDS[:1, :20], position_ids=positions, use_cache=False).logits
        alone = model(input_ids=IDS[:1, 10:20], use_cache=False).logits
    torch.testing.assert_close(packed[:, 10:], alone, rtol=0, atol=1e-5 * float(alone.abs().max()))


@pytest.mark.skipif(not compat.OWN_SCORES, reason="here GPT-J hands positions to its attentions")
def test_gradient_checkpointing_without_an_argument_for_positions_is_an_error():
    model = tiny("gptj").train()
    patch_model(model, "alibi")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss = model(input_ids=IDS[:1, :8], labels=IDS[:1, :8], use_cache=False).loss
    with pytest.raises(UnsupportedError, match="turn gradient checkpointing off"):
        loss.backward()


def test_the_scale_of_ministral_3_does_not_follow_a_scheme():
    model = tiny("ministral3")
    with pytest.raises(OptionError, match="would also change the scale of the queries"):
        patch_model(model, "yarn", factor=2.0, original_max_position_embeddings=32, on_existing="replace")
    patch_model(model, "yarn", factor=8.0, on_existing="replace")
    assert model.config.rope_parameters["original_max_position_embeddings"] == 16


@pytest.mark.parametrize("family", ["gptj", "codegen", "mpt"])
def test_every_mechanism_reaches_an_attention_of_its_own_code(family):
    model = tiny(family)
    before = output(model)
    for scheme, options in (("alibi", {}), ("self_extend", {"group": 2, "window": 8}), ("sinusoidal", {})):
        patch_model(model, scheme, **options)
        full = model(input_ids=IDS[:, :20], use_cache=False).logits.detach()
        first = model(input_ids=IDS[:, :17], use_cache=True)
        steps = [first.logits[:, -1]]
        cache = first.past_key_values
        for index in range(17, 20):
            following = model(input_ids=IDS[:, index : index + 1], past_key_values=cache, use_cache=True)
            steps.append(following.logits[:, -1])
        cached = torch.stack(steps, 1).detach()
        torch.testing.assert_close(cached, full[:, 16:], rtol=0, atol=2e-5 * float(full.abs().max()))
        unpatch_model(model)
        assert torch.equal(output(model), before)
    if family == "mpt" or compat.OWN_SCORES:
        with pytest.raises(OptionError, match="backend='sdpa' does not apply"):
            patch_model(model, "alibi", backend="sdpa")


@pytest.mark.parametrize("family", ["gptj", "codegen"])
def test_the_native_scheme_of_a_table_of_sines_changes_no_text(family, caplog):
    model = tiny(family)
    before = output(model)
    patch_model(model, "rope")
    torch.testing.assert_close(output(model), before, rtol=0, atol=1e-6 * float(before.abs().max()))
    assert "changes every text" not in caplog.text
    patch_model(model, "linear", factor=2.0, on_existing="replace")
    assert "changes every text" in caplog.text


# Rotary modules and attentions at other places.


def test_a_rotary_module_in_every_attention_is_replaced_everywhere():
    model = tiny("moshi")
    before = output(model)
    patch_model(model, "linear", factor=2.0)
    halved = output(model)
    assert describe(model).layers == [0, 1, 2, 3]
    unpatch_model(model)
    assert torch.equal(output(model), before)
    for layer in model.get_submodule("model").layers:
        layer.self_attn.rotary_emb.inv_freq /= 2
    torch.testing.assert_close(halved, output(model), rtol=0, atol=1e-6 * float(halved.abs().max()))


def test_two_attentions_in_a_layer_count_as_two():
    model = tiny("longcat_flash")
    patch_model(model, "yarn", factor=4.0)
    described = describe(model)
    assert described.num_layers == 8 and described.layers == list(range(8))
    unpatch_model(model)
    with pytest.raises(OptionError, match="the 2 attentions of a layer share their rotation"):
        patch_model(model, "yarn", factor=4.0, layers=[0])


# The language model of a model with several stacks.


def test_the_only_decoder_is_chosen():
    model = tiny("gemma3")
    native = output(model)
    patch_model(model, "rope")
    assert describe(model).family == "gemma3_text"
    assert torch.equal(output(model), native)


def test_an_encoder_decoder_is_not_chosen_for_the_user():
    model = AutoModel.from_config(tiny_config("bart")).eval()
    with pytest.raises(UnsupportedError, match="submodule"):
        patch_model(model, "nope")
    patch_model(model, "learned", submodule="decoder")
