"""Vision-language models: the language model is found by itself, and images and videos keep their positions."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForImageTextToText

from pe_patch import UnsupportedError, describe, load_patched, patch_model, unpatch_model

from .model_types.tiny import tiny_config
from .model_types.vision_language import END, IMAGE, ROWS_OF_POSITIONS, SETTINGS, START, VIDEO, build, inputs

CASES = [*((family, False) for family in SETTINGS), *((family, True) for family in ROWS_OF_POSITIONS)]
TEXT_STACK = {"llava": "llama", "gemma3": "gemma3_text", "idefics3": "llama", "smolvlm": "llama", "internvl": "qwen2"}


def logits(model, given):
    with torch.no_grad():
        return model(**given).logits


def written(model, given, **options):
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    return model.generate(**given, **settings, suppress_tokens=[IMAGE, VIDEO, START, END], **options)


@pytest.mark.parametrize(("family", "video"), CASES)
def test_the_native_rotation_changes_no_bit_and_no_token(family, video):
    model, given = build(family), inputs(family, video)
    before, tokens = logits(model, given), written(model, given)
    patch_model(model, "rope")
    assert describe(model).family == TEXT_STACK.get(family, f"{family}_text")
    assert torch.equal(logits(model, given), before)
    assert torch.equal(written(model, given), tokens)
    assert torch.equal(written(model, given, use_cache=False), tokens)
    unpatch_model(model)
    assert torch.equal(logits(model, given), before)


@pytest.mark.parametrize(("family", "video"), [case for case in CASES if case[0] in ROWS_OF_POSITIONS])
def test_a_scaling_of_m_rope_is_that_of_transformers(family, video, tmp_path):
    """The expected model reads the same scaling from its config. Its three rows must keep their sections."""
    model, given = build(family), inputs(family, video)
    settings = copy.deepcopy(SETTINGS[family])
    rope = settings["text_config"]["rope_parameters"]
    rope |= {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    settings["text_config"]["max_position_embeddings"] = 256
    native = AutoModelForImageTextToText.from_config(tiny_config(family, **settings)).eval()
    native.load_state_dict(model.state_dict())
    patch_model(model, "yarn", factor=4.0)
    patched, expected = logits(model, given), logits(native, given)
    torch.testing.assert_close(patched, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert torch.equal(written(model, given), written(native, given))
    model.save_pretrained(tmp_path)
    again = load_patched(tmp_path).eval()
    assert torch.equal(logits(again, given), patched)
    assert again.config.get_text_config().rope_parameters["mrope_section"] == [4, 2, 2]


@pytest.mark.parametrize("family", ROWS_OF_POSITIONS)
@pytest.mark.parametrize("scheme", ["alibi", "self_extend", "dynamic_ntk"])
def test_a_scheme_with_one_position_takes_text_and_refuses_images(family, scheme):
    model, given = build(family), inputs(family)
    patch_model(model, scheme, **({"factor": 4.0} if scheme == "dynamic_ntk" else {}))
    logits(model, {"input_ids": given["input_ids"][:, :6]})
    with pytest.raises(UnsupportedError, match=rf"'{scheme}' needs one position for each token.*Use a static rotary"):
        logits(model, given)


@pytest.mark.parametrize("family", [family for family in SETTINGS if family not in ROWS_OF_POSITIONS])
def test_one_row_of_positions_takes_every_scheme(family):
    model, given = build(family), inputs(family)
    before = logits(model, given)
    chosen = {"layers": [3]} if family == "gemma3" else {}
    patch_model(model, "self_extend", group=1, window=8, **chosen)
    torch.testing.assert_close(logits(model, given), before, rtol=0, atol=1e-5 * float(before.abs().max()))
    unpatch_model(model)
    patch_model(model, "alibi")
    assert float((logits(model, given) - before).abs().max()) > 1e-2


@pytest.mark.parametrize("family", ROWS_OF_POSITIONS)
def test_a_second_turn_after_an_image_continues_its_positions(family):
    """An image takes fewer positions than tokens, so the model keeps the difference (`rope_deltas`)."""
    model, given = build(family), inputs(family)
    patch_model(model, "yarn", factor=4.0)
    tokens = written(model, given)
    whole = dict(given, input_ids=tokens, attention_mask=torch.ones_like(tokens))
    padding = torch.zeros(1, tokens.shape[1] - given["input_ids"].shape[1], dtype=torch.long)
    whole["mm_token_type_ids"] = torch.cat((given["mm_token_type_ids"], padding), 1)
    full = logits(model, whole)
    full[..., [IMAGE, VIDEO, START, END]] = -torch.inf
    full = full.argmax(-1)
    start = given["input_ids"].shape[1]
    assert torch.equal(full[:, start - 1 : -1], tokens[:, start:])
