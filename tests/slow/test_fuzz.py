"""Options and rope dicts that nobody meant to write: an error of ours, or a model with finite logits.

Not part of the default run: `python -m pytest tests/slow` takes a few minutes; PE_PATCH_FUZZ sets the number of inputs
of each test.
"""

from __future__ import annotations

import logging
import os
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pe_patch import ALIASES, SCHEMES, PePatchError, patch_model, unpatch_model
from pe_patch.schemes import config_formats

from ..models import GIVEN, PAIRS, build, tokens

EXAMPLES = int(os.environ.get("PE_PATCH_FUZZ", "3000"))
SECONDS = 10
"""No input may take longer."""
FAMILIES = ("llama", "gpt_neox", "bloom", "gpt2")
OUTCOMES: Counter[str] = Counter()

FUZZ = settings(
    max_examples=EXAMPLES, deadline=None, database=None, derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)  # fmt: skip

NUMBERS = [0, 1, 2, 3, 4, 7, 8, 16, 32, 64, -1, -0.0, 0.5, 1.0, 1.5, 2.0, 1e-300, 1e-9, 1e6, 1e9, 1e12, 1e30, 1e300,
           1e308, -1e308, float("nan"), float("inf"), -float("inf"), 10**9, 10**12, 10**18, 2**63, 2**64, 10**400,
           -(10**400), 1j, Fraction(1, 3), Fraction(7, 2)]  # fmt: skip
ODD = [None, True, False, "", "auto", "4", "yarn", "rope", "linear", "dynamic", "x" * 300, b"4", object(), [], {}, (),
       set(), range(8), slice(2), int, len, np.float32(2), np.float64("nan"), np.int64(4), np.bool_(True),
       np.array([1.0, 2.0]), np.array(3.0), np.ones((2, 2)), np.array(["a"]), torch.tensor(2.0),
       torch.tensor(4), torch.tensor(True), torch.ones(4), torch.ones(8), torch.ones(2, 2), torch.tensor(float("nan")),
       torch.empty(3, device="meta")]  # fmt: skip
LISTS = [[1.0] * n for n in (1, 4, 8)] + [[2.0] * 8, [0.0] * 8, [-1.0] * 8, [float("nan")] * 4, [1e308] * 8, [None] * 8,
         ["a"] * 8, [[1.0]] * 8, [True] * 4, list(range(1, 9)), (1.0, 2.0, 3.0, 4.0), [10**400] * 8]  # fmt: skip

sensible = st.one_of(st.integers(1, 64), st.floats(0, 64), st.sampled_from(NUMBERS), st.booleans(), st.none())
values = st.one_of(
    st.sampled_from(NUMBERS), st.sampled_from(ODD), st.sampled_from(LISTS), st.floats(), st.integers(-(10**6), 10**6),
    st.text(max_size=8), st.floats(1, 64), st.integers(1, 64), st.booleans(),
    st.lists(st.one_of(st.floats(), st.integers(), st.none(), st.text(max_size=3)), max_size=8),
    st.dictionaries(st.text(max_size=6), st.one_of(st.floats(), st.integers(), st.text(max_size=4)), max_size=3),
)  # fmt: skip

WORDS = sorted(
    {key for keys in config_formats.KEYS.values() for key in keys}
    | {key for keys in config_formats.SYNONYMS.values() for key in keys}
    | set(config_formats.UNSUPPORTED_KEYS) | config_formats.WHOLE_CONFIG
    | {"scheme", "options", "version", "pe_patch", "full_attention", "sliding_attention", "short_mscale", "long_mscale",
       "attn_factor", "extrapolation_factor", "finetuned", "rope_local_base_freq", "over", "window", "group", "slopes"}
)  # fmt: skip
TYPES = [*config_formats.TYPES, *config_formats.UNSUPPORTED_TYPES, "YaRN", "", None, 3, ["yarn"], {}]
keys = st.one_of(st.sampled_from(WORDS), st.sampled_from(WORDS), st.text(max_size=5), st.integers(0, 3))
flat = st.dictionaries(keys, values, max_size=5)


@st.composite
def rope_dicts(draw: Any) -> dict:
    """A dict in no dialect, or in one of them with something wrong in it."""
    found = draw(flat)
    typed = draw(st.sampled_from(["rope_type", "type", "scheme", "none"]))
    if typed == "scheme":
        found["scheme"] = draw(st.one_of(st.sampled_from([*SCHEMES]), values))
    elif typed != "none":
        found[typed] = draw(st.sampled_from(TYPES))
    if draw(st.booleans()):
        found.setdefault("factor", draw(st.floats(1, 8)))
    around = draw(
        st.sampled_from([None, None, "rope_parameters", "rope_scaling", "text_config", "full_attention", "pe_patch"])
    )
    return found if around is None else {around: found, **draw(st.dictionaries(keys, values, max_size=2))}


@st.composite
def calls(draw: Any) -> tuple[str, str, dict]:
    """A family, a scheme and options: those that work, with some of them replaced by anything."""
    family = draw(st.sampled_from(FAMILIES))
    scheme = draw(st.sampled_from([*GIVEN, "rope_2d", "alibi_2d", *ALIASES]))
    name = ALIASES.get(scheme, scheme)
    options = dict(GIVEN.get(name, {}))
    if "long_factor" in options:
        options["long_factor"] = [1.5] * PAIRS[family]
    if "calibration" in options:
        options |= {"calibration": tokens(2, 16), "kv_rank": 8}
    if family == "bloom" and "original_max_position_embeddings" in SCHEMES[name].option_names():
        options["original_max_position_embeddings"] = 32
    declared = sorted(SCHEMES[name].option_names())
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 1, 2, 3]))):
        if declared:
            option = draw(st.sampled_from(declared))
            options[option] = draw(st.one_of(values, sensible, rope_dicts() if option == "over" else sensible))
    if draw(st.integers(0, 9)) == 0:
        options[draw(st.text(max_size=6))] = draw(values)
    for reserved in ("layers", "backend", "on_existing", "submodule", "keep_native", "strict", "adapter"):
        if draw(st.integers(0, 24)) == 0:
            options[reserved] = draw(values)
    return family, scheme, options


MODELS = {family: build(family) for family in FAMILIES}
SHORT, LONG = tokens(1, 12), tokens(1, 40)


def state(model: Any) -> tuple:
    """What must be the same after a refusal, and after undoing."""
    attributes = [(name, sorted(module.__dict__), list(module._modules)) for name, module in model.named_modules()]
    with torch.no_grad():
        found = model(input_ids=SHORT, use_cache=False).logits
    return attributes, model.config.to_dict(), [p.requires_grad for p in model.parameters()], found.tolist()


STATES = {family: state(model) for family, model in MODELS.items()}


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise TimeoutError where the block takes longer."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"more than {seconds} s")

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def attempt(family: str, scheme: Any, options: dict) -> None:
    """Patch, run and undo; whatever is not an error of ours, finite logits and the model as it was, fails."""
    model, accepted = MODELS[family], False
    try:
        with limited(SECONDS):
            patch_model(model, scheme, **options)
            accepted = True
            for ids in (SHORT, LONG):
                with torch.no_grad():
                    found = model(input_ids=ids, use_cache=False).logits
                assert found.isfinite().all(), "logits are not finite"
        OUTCOMES["accepted"] += 1
    except PePatchError as error:
        OUTCOMES["refused when run" if accepted else "refused"] += 1
        assert str(error).strip() and len(str(error)) < 3000
        assert not accepted or "beyond" in str(error) or "bound" in str(error), f"refused too late: {error}"
    finally:
        if accepted and options.get("keep_original") is not False:
            unpatch_model(model)
        elif accepted:
            MODELS[family] = build(family)
    assert state(MODELS[family]) == STATES[family], "the model changed"


@pytest.fixture(autouse=True)
def quiet(caplog):
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@FUZZ
@given(calls())
def test_options(call):
    attempt(*call)


@FUZZ
@given(st.sampled_from(FAMILIES), rope_dicts())
def test_rope_dicts(family, config):
    attempt(family, config, {"original_max_position_embeddings": 32} if family == "bloom" else {})


@FUZZ
@given(rope_dicts())
def test_reading_a_dict(config):
    try:
        found = config_formats.read(config)
    except PePatchError:
        return
    assert isinstance(found, config_formats.Specification | dict)


@FUZZ
@given(st.one_of(values, st.text(max_size=20)))
def test_names_of_schemes(name):
    with pytest.raises(PePatchError):
        patch_model(MODELS["llama"], "yarm" if isinstance(name, str) and name in {*SCHEMES, *ALIASES} else name)


def test_the_outcomes_are_of_both_kinds():
    """Else the inputs above would be all of one kind, and the test empty."""
    print(dict(OUTCOMES))
    if sum(OUTCOMES.values()) > 500:
        assert OUTCOMES["accepted"] > 20 and OUTCOMES["refused"] > 20
