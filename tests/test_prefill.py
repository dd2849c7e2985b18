"""Reading a text in parts: the same answers, losses and text, with fewer tokens in a pass."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pe_patch import evaluate, patch_model, unpatch_model
from pe_patch.checkpoints import generation
from pe_patch.cli.main import main
from pe_patch.data.packaged import DEMO_MODEL
from pe_patch.errors import OptionError
from pe_patch.evaluation.model import EvaluatedModel, sequence_bytes

SCHEMES: dict[str, dict[str, Any]] = {
    "yarn": {"factor": 4.0}, "alibi": {}, "self_extend": {"factor": 4.0}, "dca": {}, "string": {}, "xpos": {},
}  # fmt: skip
CHUNK = 96


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(DEMO_MODEL).eval(), AutoTokenizer.from_pretrained(DEMO_MODEL)


def longest_pass(model: Any, lengths: list[int]) -> Any:
    """A hook that notes the tokens of each pass over the layers."""
    return model.model.layers[0].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))


@pytest.mark.parametrize("name", [*SCHEMES, None])
def test_losses_and_answers_stay(name: str | None, demo: tuple[Any, Any]) -> None:
    model, tokenizer = demo
    if name is not None:
        patch_model(model, name, **SCHEMES[name])
    try:
        rows = [np.random.default_rng(seed).integers(3, 400, 500) for seed in (0, 1)]
        whole, parts = EvaluatedModel(model, tokenizer), EvaluatedModel(model, tokenizer, prefill_chunk=CHUNK)
        for targets in (1, 40, 250, 499):
            expected, found = (subject.losses(rows, targets) for subject in (whole, parts))
            assert found.shape == (2, targets) and np.abs(found - expected).max() < 2e-5, targets
        if name not in ("yarn", "self_extend"):
            return
        lengths: list[int] = []
        hook = longest_pass(model, lengths)
        settings: dict[str, Any] = {"samples": 4, "beyond_window": True, "progress": False, "control_length": 256}
        tasks = ["needle", "passkey", "perplexity"]
        found_rows = evaluate(model, tokenizer, tasks, [512], prefill_chunk=CHUNK, **settings).rows
        hook.remove()
        assert max(lengths) <= CHUNK
        expected_rows = evaluate(model, tokenizer, tasks, [512], **settings).rows
        assert [row.score for row in found_rows] == pytest.approx([row.score for row in expected_rows], abs=1e-5)
    finally:
        if name is not None:
            unpatch_model(model)


def test_generated_text_stays(demo: tuple[Any, Any], capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = demo
    ids = torch.arange(3, 303)[None]
    expected = generation.continue_ids(model, tokenizer, ids, 20)
    lengths: list[int] = []
    hook = longest_pass(model, lengths)
    assert generation.continue_ids(model, tokenizer, ids, 20, prefill_chunk=CHUNK) == expected
    hook.remove()
    assert max(lengths) == CHUNK
    words = ["generate", "demo", "import os\n" * 40, "--max-new-tokens", "9", "--json", "--prefill-chunk", "96"]
    printed = []
    for given in (words, words[:-2]):
        assert main(given) == 0
        printed.append(json.loads(capsys.readouterr().out))
    assert printed[0] == printed[1]


def test_a_scheme_that_follows_the_length_is_refused(demo: tuple[Any, Any]) -> None:
    model, tokenizer = demo
    patch_model(model, "dynamic_ntk")
    try:
        with pytest.raises(OptionError, match=r"'dynamic_ntk' encodes a text by the length of its first pass"):
            evaluate(model, tokenizer, "passkey", 512, prefill_chunk=CHUNK, beyond_window=True)
        with pytest.raises(OptionError, match="expected_length"):
            generation.continue_ids(model, tokenizer, torch.arange(3, 300)[None], 2, prefill_chunk=CHUNK)
    finally:
        unpatch_model(model)
    with pytest.raises(OptionError, match="prefill_chunk"):
        evaluate(model, tokenizer, "passkey", 512, prefill_chunk=0, beyond_window=True)


def test_the_planned_memory_is_that_of_a_part(demo: tuple[Any, Any]) -> None:
    model, _ = demo
    cache, logits = 100, 1
    whole, part = (sequence_bytes(model, 4096, cache, logits, chunk) for chunk in (None, 512))
    assert whole - part == pytest.approx((sequence_bytes(model, 4096 - 512, 0, 0)), rel=1e-6)
