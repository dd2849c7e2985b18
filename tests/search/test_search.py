"""Search on the demo model, compare the scores with plain Transformers, and check refusals."""

from __future__ import annotations

import json
import logging
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from pe_patch import AlreadyPatchedError, UnsupportedError, describe, patch_model, patched
from pe_patch.compare.demo import BASE
from pe_patch.errors import OptionError, PePatchError
from pe_patch.search import Schedule, search
from pe_patch.search.evolution import Candidate, Scored
from pe_patch.search.objective import make_material
from pe_patch.search.picture import search_chart

from ..models import build
from .cases import LENGTH, SMALL, TEXT, WINDOW, demo, run

METHODS = ("longrope", "longrope2")
PLAIN = 10000.0 ** (-np.arange(16) / 16)


@cache
def found(method):
    return run(method)


@cache
def rows_and_targets(method):
    """Return the sequences of the search `[rows, length]` and booleans for the tokens that count."""
    material = make_material(method, demo()[1], TEXT, LENGTH, 2, 4, 0)
    targets = np.zeros((2, LENGTH), dtype=bool)
    targets[:, -material.targets :] = material.mask
    assert targets.sum() == (2 * LENGTH // 8 if method == "longrope" else 2 * 4)
    return torch.from_numpy(np.stack(material.rows)), torch.from_numpy(targets)


def native_loss(method, factors, attention_factor):
    """Return the mean loss of the targets under Transformers' own LongRoPE."""
    parameters = {
        "rope_type": "longrope", "rope_theta": 10000.0, "long_factor": list(factors), "short_factor": [1.0] * 16,
        "factor": LENGTH / WINDOW, "attention_factor": attention_factor, "original_max_position_embeddings": WINDOW,
    }  # fmt: skip
    model = LlamaForCausalLM.from_pretrained(BASE, rope_parameters=parameters, max_position_embeddings=LENGTH).eval()
    ids, targets = rows_and_targets(method)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits.double()
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(2, LENGTH - 1)
    return float(losses[targets[:, 1:]].mean())


FORMULA = (1 + np.log(LENGTH / WINDOW) / np.log(WINDOW)) ** 0.5


@pytest.mark.parametrize("method", METHODS)
def test_scores_equal_those_of_transformers(method):
    result = found(method)
    assert result.options["attention_factor"] == pytest.approx(FORMULA)
    for entry in (result.history[0], result.history[-1], result.best):
        assert entry.score == pytest.approx(native_loss(method, entry.factors, FORMULA), abs=2e-6)


def test_the_best_is_no_worse_than_pi_ntk_and_yarn():
    """Compute their factors from the formulas; for YaRN, round D(32) and D(1) outwards."""
    pair = [32 * np.log(WINDOW / (2 * np.pi * turns)) / (2 * np.log(10000.0)) for turns in (32, 1)]
    low, high = max(np.floor(pair[0]), 0), np.ceil(pair[1])
    ramp = np.clip((np.arange(16) - low) / (high - low), 0, 1)
    known = {"PI": [2.0] * 16, "NTK": 2.0 ** (2 * np.arange(16) / 30), "YaRN": 1 / (1 - ramp + ramp / 2)}
    scores = {name: native_loss("longrope", factors, FORMULA) for name, factors in known.items()}
    result = found("longrope")
    assert native_loss("longrope", result.best.factors, FORMULA) <= min(scores.values()) + 2e-6
    assert result.best.score < scores["PI"] - 0.01  # it is not PI that came back
    for entry in result.history[:3]:
        np.testing.assert_allclose(entry.factors, known[entry.candidate.origin], rtol=2e-6)


@pytest.mark.parametrize("method", METHODS)
def test_baselines_are_the_schemes_themselves(method):
    ids, targets = rows_and_targets(method)
    for paper, name in (("PI", "linear"), ("YaRN", "yarn")):
        extra = {"original_max_position_embeddings": WINDOW} if name == "yarn" else {}
        parameters = {"rope_type": name, "rope_theta": 10000.0, "factor": LENGTH / WINDOW, **extra}
        model = LlamaForCausalLM.from_pretrained(BASE, rope_parameters=parameters, max_position_embeddings=LENGTH)
        with torch.no_grad():
            logits = model.eval()(input_ids=ids, use_cache=False).logits
        losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        expected = float(losses.view(2, -1)[targets[:, 1:]].double().mean())
        assert found(method).baselines[paper] == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("method", METHODS)
def test_every_candidate_keeps_to_the_constraints(method):
    result = found(method)
    assert len(result.history) == SMALL.candidates == 16
    for entry in result.history:
        searched = np.array(entry.factors[entry.candidate.critical :])
        low, high = (1, 2.5) if method == "longrope" else (2, 4)
        assert np.all(np.diff(entry.factors) >= 0) and low <= searched[0] and searched[-1] <= high
    assert result.curve == sorted(result.curve, reverse=True) and result.curve[-1] == result.best.score
    assert result.best.score == min(entry.score for entry in result.history)


def test_needles_cover_every_distance_and_only_answers_count():
    tokenizer = demo()[1]
    material = make_material("longrope2", tokenizer, TEXT, 300, 5, 3, 0)
    firsts = []
    for row, mask in zip(material.rows, material.mask, strict=True):
        spans = tokenizer.convert_ids_to_tokens(row.tolist())
        answers = [spans[i] for i in np.flatnonzero(mask) + len(row) - material.targets]
        asked = [spans[i - 1] for i in np.flatnonzero(mask) + len(row) - material.targets]
        assert len(answers) == 3 and all(word.startswith("<v") for word in answers)
        assert all(spans[spans.index(key) + 1] == value for key, value in zip(asked, answers, strict=True))
        firsts.append(spans.index(asked[0]))
    assert firsts[0] < 6 and np.all(np.diff(firsts) > 40)  # the first fact asked for moves from the start on


def test_the_model_is_restored_and_takes_the_options(caplog):
    model, _ = demo()
    result, ids = found("longrope"), rows_and_targets("longrope")[0]
    assert "pe_patch" not in model.config.to_dict() and model.config.max_position_embeddings == WINDOW
    with caplog.at_level(logging.WARNING), patched(model, "longrope", **result.options):
        assert describe(model).to_dict()["effective"]["effective_window"] == LENGTH
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits
    assert not caplog.records
    last = LENGTH // 8
    loss = F.cross_entropy(logits[:, -last - 1 : -1].flatten(0, 1).double(), ids[:, -last:].flatten())
    assert float(loss) == pytest.approx(result.best.score, abs=2e-6)


def test_a_start_and_an_attention_factor_are_used():
    start = list(found("longrope").best.factors)
    result = run("longrope", start=start, attention_factor=1.1, schedule=Schedule(4, 0, 1, 1, 2))
    assert result.history[0].candidate.origin == "given" and list(result.history[0].factors) == start
    assert result.history[0].score == pytest.approx(native_loss("longrope", start, 1.1), abs=2e-6)
    assert result.options["attention_factor"] == 1.1


def test_lengths_that_are_no_multiple_of_the_window_are_reached():
    assert search(
        *demo(), 333, method="longrope", text=TEXT, samples=1, schedule=Schedule(3, 0, 1, 1, 2), progress=False
    ).options["factor"] == pytest.approx(333 / 256)
    from pe_patch.search.target import factor_for

    assert all(int(factor_for(length, 48) * 48) == length for length in range(49, 2000))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"length": 256}, OptionError, "length=256 lies within the trained window of 256"),
        ({"samples": 0}, OptionError, "samples=0"),
        ({"targets": 512, "method": "longrope"}, OptionError, "targets=512; of 512 tokens 1 to 511"),
        ({"targets": 9}, OptionError, "is an option of the method 'longrope'"),
        ({"text": ["x = 1\n" * 40]}, PePatchError, "(?i)longer text"),
        ({"text": ["".join(TEXT)[:9000]], "samples": 50, "method": "longrope"}, PePatchError, "samples=50 needs 50"),
        ({"needles": 65}, PePatchError, "64 keys, so needles must be at most 64, got 65"),
        ({"schedule": Schedule(population=8, parents=9)}, OptionError, "below parents=9"),
        ({"start": [*[1.0] * 8, 3.0, 2.0, *[3.0] * 6], "method": "longrope"}, OptionError, "must not decrease"),
        ({"attention_factor": -1.0}, OptionError, "attention_factor"),
    ],
)
def test_invalid_searches_are_refused(options, error, message, tmp_path):
    length = options.pop("length", LENGTH)
    given = {"text": TEXT, "samples": 2, "schedule": SMALL, "progress": False, **options}
    with pytest.raises(error, match=message):
        search(*demo(), length, output=tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["bloom", "gpt2"])
def test_models_without_rotation_are_refused(family):
    with pytest.raises(UnsupportedError, match="for rotary models"):
        search(build(family), demo()[1], 64, text=TEXT, progress=False)


def test_patched_and_scaled_models_are_refused():
    model = LlamaForCausalLM.from_pretrained(BASE)
    patch_model(model, "yarn", factor=2)
    with pytest.raises(AlreadyPatchedError, match="unpatch_model"):
        search(model, demo()[1], LENGTH, text=TEXT, progress=False)
    scaled = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    model = LlamaForCausalLM.from_pretrained(BASE, rope_parameters=scaled)
    with pytest.raises(AlreadyPatchedError, match="on_existing='replace'"):
        search(model, demo()[1], LENGTH, text=TEXT, progress=False)
    options = {"method": "longrope", "text": TEXT, "samples": 2, "schedule": SMALL, "progress": False}
    assert search(model, demo()[1], LENGTH, on_existing="replace", **options).best == found("longrope").best


def test_the_result_is_json():
    told = json.loads(json.dumps(found("longrope2").to_dict()))
    assert told["score"] == found("longrope2").best.score and told["scored"] == 16
    assert set(told["baselines"]) == {"PI", "NTK", "YaRN"}
    assert told["options"]["long_factor"] == list(found("longrope2").best.factors)


def test_the_axis_of_the_scores_fits_the_best_line():
    scored = ((4.1, 0), (3.0, 0), (3.02, 1), (2.97, 2))
    history = [Scored(Candidate(0, (1.0,), "mutation"), score, generation) for score, generation in scored]
    known, factors = {"PI": 3.55, "YaRN": 2.99}, {"PI": (8.0,), "YaRN": (1.0,)}
    chart = search_chart("", "", history=history, curve=[3.0, 3.0, 2.97], baselines=known, factors=factors, best=(1.0,))
    scores = chart.panels[0].to_dict()
    low, high = scores["layer"][0]["encoding"]["y"]["scale"]["domain"]
    assert 2.9 < low < 2.97 and 3.02 < high < 3.1  # the best line falls over more than a third of the panel
    assert scores["title"] == "above: PI 3.550"
