"""What Ulysses drops and is put back, masks and the positions of whole sequences, and what cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pe_patch.errors import PePatchError

from .launch import on_processes
from .steps import batch_of, forget_ulysses, model_under, recipe_for, trainer_for
from .test_engines import ULYSSES

LENGTH = 48
MODELS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    # family, scheme, its options, sizes
    "alibi": ("llama", "alibi", {}, {}),
    "yarn": ("llama", "yarn", {"factor": 4.0}, {}),
    "sliding_yarn": ("mistral", "yarn", {"factor": 4.0}, {}),
    "sliding_alibi": ("mistral", "alibi", {}, {}),
    "key_heads_repeated": ("llama", "t5", {}, {"num_key_value_heads": 1}),
    "dynamic": ("llama", "dynamic_ntk", {}, {}),
}


def passes() -> dict[str, dict[str, Tensor]]:
    """Inputs of whole sequences."""
    packed = batch_of(0)
    ids, whole = packed["input_ids"][:2], torch.arange(LENGTH).expand(2, -1)
    skips = whole + 20 * (whole > 29)
    padded = torch.ones_like(ids)
    padded[1, :7] = 0
    return {
        "plain": {"input_ids": ids, "position_ids": whole},
        "packed": {"input_ids": ids, "position_ids": packed["position_ids"][:2]},
        "skipping": {"input_ids": ids, "position_ids": skips, "attention_mask": torch.ones_like(ids)},
        "padded": {"input_ids": ids, "position_ids": (whole - 7 * torch.tensor([[0], [1]])).clamp(min=0),
                   "attention_mask": padded},
    }  # fmt: skip


def evaluated(model: Any) -> dict[str, Tensor]:
    """Whole sequences in evaluation, of rows of different lengths, and what is generated from them."""
    ids = passes()["padded"]["input_ids"]
    mask = passes()["padded"]["attention_mask"]
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
        packed = model(**passes()["packed"], use_cache=False).logits
        written = model.generate(
            ids[:, :20], attention_mask=mask[:, :20], max_new_tokens=5, do_sample=False, pad_token_id=0
        )
    return {"padded": logits, "packed": packed, "written": written}


def build(name: str) -> Any:
    family, scheme, options, sizes = MODELS[name]
    return model_under(scheme, options, family=family, **sizes)


def whole(name: str) -> dict[str, Any]:
    model = build(name)
    with torch.no_grad():
        trained = {kind: model(**inputs, use_cache=False).logits for kind, inputs in passes().items()}
    return {"trained": trained, "evaluated": evaluated(model)}


def cut() -> dict[str, Any]:
    """Logits of this process's part in training, and of whole sequences in evaluation."""
    found = {}
    for name in MODELS:
        model = build(name)
        trainer = trainer_for(model, recipe_for("/nowhere", dry_run=True))
        prepared = trainer.prepare()
        trained = {}
        for kind, inputs in passes().items():
            parts = trainer.inputs({**inputs, "labels": inputs["input_ids"]})
            parts.pop("shift_labels")
            with torch.no_grad():
                trained[kind] = prepared(**parts, use_cache=False).logits
        found[name] = {"trained": trained, "evaluated": evaluated(model)}
        if name == "alibi":
            found["refused"] = refusals(model.train())
        forget_ulysses()
    return {"rank": torch.distributed.get_rank(), **found}


def refusals(model: Any) -> dict[str, str]:
    part = {name: tensor[:, : LENGTH // 2] for name, tensor in passes()["plain"].items()}
    cases: dict[str, dict[str, Any]] = {
        "no_positions": {"input_ids": part["input_ids"]},
        "mask_of_the_whole": {**part, "attention_mask": torch.ones(2, LENGTH)},
        "four_dimensions": {**part, "attention_mask": torch.zeros(2, 1, LENGTH // 2, LENGTH // 2)},
    }
    found = {}
    for name, inputs in cases.items():
        try:
            model(**inputs, use_cache=False)
        except PePatchError as error:
            found[name] = str(error)
    try:
        hidden = torch.zeros(2, LENGTH // 2, 64)
        turn = model.model.rotary_emb(hidden, part["position_ids"])
        model.model.layers[0](hidden, position_embeddings=turn, position_ids=part["position_ids"])
    except PePatchError as error:
        found["a_layer_alone"] = str(error)
    return found


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    environment = {**ULYSSES, "PARALLELISM_CONFIG_SP_SIZE": "2", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}
    return on_processes(2, cut, environment)


@pytest.mark.parametrize("name", MODELS)
def test_parts_see_what_the_whole_sees(found, name):
    wanted = whole(name)
    for kind, logits in wanted["trained"].items():
        got = torch.cat([one[name]["trained"][kind] for one in found], 1)
        real = passes()[kind].get("attention_mask", torch.ones(2, LENGTH)).bool()
        torch.testing.assert_close(
            got[real], logits[real], atol=1e-5, rtol=1e-5, msg=lambda text, kind=kind: f"{kind}: {text}"
        )
    for kind, value in wanted["evaluated"].items():
        for one in found:
            torch.testing.assert_close(one[name]["evaluated"][kind], value, atol=1e-5, rtol=1e-5)


def test_the_cases_differ():
    """Masks and positions matter in these inputs, so that losing one would be seen."""
    trained = whole("alibi")["trained"]
    assert (trained["plain"] - trained["packed"]).abs().max() > 0.1
    assert (trained["plain"][1, 7:] - trained["padded"][1, 7:]).abs().max() > 0.1
    assert (whole("yarn")["trained"]["plain"] - whole("yarn")["trained"]["skipping"]).abs().max() > 0.1
    assert (whole("sliding_alibi")["trained"]["plain"] - trained["plain"]).abs().max() > 0.1


def test_what_cannot_be_right_is_refused(found):
    for one in found:
        told = one["refused"]
        assert "position_ids" in told["no_positions"] and "[rows, part]" in told["mask_of_the_whole"]
        assert "[rows, part]" in told["four_dimensions"] and "did not pass one to it" in told["a_layer_alone"]
