"""Check equalities that must hold under every scheme."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...adapters.adapter import config_rope_parameters
from ...checkpoints.load import load_patched
from ...errors import NoEffectError, PePatchError
from ...patching.api import find_patch, patch_model, unpatch_model
from ...patching.inference import adapter_for
from .models import PROMPT, TOKENS, Case
from .reading import Difference, cached_logits, difference, greedy, largest, last_logits, logits
from .result import Check

GENERATED = 14
"""Tokens of the greedy text."""
CHUNKS = (44, 6, 7, 5, 12)
"""Tokens of each pass when the sequence is read in chunks."""
CHANGE = TOKENS // 2
"""The window of the length-dependent scheme. All lengths read beyond it have the same scaling, so a cache must give the
result of one pass."""
SAVED_AT_MOST = 2 * 2**30
"""The largest size of weights, in bytes, that the check saves and loads."""


@dataclass(frozen=True)
class Mechanism:
    """A way to put positions into a model, with a scheme that uses it."""

    name: str
    scheme: str
    options: dict[str, Any] = field(default_factory=dict)
    reads_text: bool = False
    """True if the scheme needs calibration text."""

    @property
    def changes(self) -> bool:
        """True if the scheme changes when the sequence grows beyond `CHANGE`."""
        return self.options.get("factor") == "auto"

    @property
    def label(self) -> str:
        """The name of the scheme, with the option that makes it follow the length."""
        return f"{self.scheme}, factor auto" if self.changes else self.scheme


MECHANISMS = (
    Mechanism("absolute", "sinusoidal"),
    Mechanism("none", "nope"),
    Mechanism("static rotary", "yarn", {"factor": 4.0, "original_max_position_embeddings": 64}),
    Mechanism("length-dependent rotary", "yarn", {"factor": "auto", "original_max_position_embeddings": CHANGE}),
    Mechanism("bias", "alibi"),
    Mechanism("content-relative", "transformer_xl"),
    Mechanism("two-range", "self_extend", {"group": 4, "window": 16, "original_max_position_embeddings": 64}),
    Mechanism("latent attention", "mla", {"cache_ratio": 0.5}, reads_text=True),
)
"""One scheme of each mechanism."""
NATIVE = Mechanism("native", "none")

Compare = Callable[[Case], Difference]


def check_built(name: str, build: Callable[[], Case]) -> list[Check]:
    """Build a model and run every check on it; a model that cannot be built is a failure."""
    try:
        case = build()
    except Exception as error:
        return [Check(name, NATIVE.name, NATIVE.label, "the model can be built", "failed", message=_one_line(error))]
    return check_case(case)


def check_case(case: Case) -> list[Check]:
    """Run every check on a model, without a patch and under each mechanism."""
    checks = list(_run(case, NATIVE, PATCHED))
    try:
        before = logits(case.model, case.ids)
    except Exception as error:
        return [*checks, _failed(case, NATIVE, "one pass", error)]
    checks.append(_identity(case))
    for mechanism in MECHANISMS:
        checks += _under(case, mechanism, before)
        if find_patch(case.model) is not None:
            reason = "the previous patch could not be removed"
            rest = MECHANISMS[MECHANISMS.index(mechanism) + 1 :]
            return checks + [_skipped(case, other, "all checks", reason) for other in rest]
    return checks


def _under(case: Case, mechanism: Mechanism, before: Tensor) -> Iterator[Check]:
    """Patch the model, run the checks, remove the patch, and compare with the unpatched model."""
    if mechanism.scheme in case.refuses:
        yield _skipped(case, mechanism, "all checks", "not defined for this family")
        return
    try:
        _patch(case, mechanism)
    except Exception as error:
        refused = isinstance(error, PePatchError) and not isinstance(error, NoEffectError)
        if refused and case.may_refuse:
            yield _skipped(case, mechanism, "all checks", _one_line(error))
        else:
            yield _failed(case, mechanism, "patch_model", error)
        return
    crossing = {"cache across a change, one by one = in chunks": across_a_change} if mechanism.changes else {}
    yield from _run(case, mechanism, PATCHED | crossing | {"saved and loaded = in memory": saved_and_loaded})
    try:
        unpatch_model(case.model)
    except Exception as error:
        yield _failed(case, mechanism, "unpatch_model", error)
        return
    undone: Compare = lambda case: difference(logits(case.model, case.ids), before, "after unpatch_model")  # noqa: E731
    yield _measured(case, mechanism, "undone = never patched", undone, 0.0)


def _patch(case: Case, mechanism: Mechanism) -> None:
    options = dict(mechanism.options)
    if mechanism.reads_text:
        options["calibration"] = case.ids.repeat(4, 1).tolist()
    patch_model(case.model, mechanism.scheme, on_existing="replace", **options)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in case.model.named_parameters():
        if "position_schemes.scheme" in name:  # initially mostly zero, so the outputs would not depend on it
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 2:  # projections, whose terms must not saturate the softmax of a wide model
                values /= parameter.shape[-1] ** 0.5
            parameter.data = values.to(parameter.device, parameter.dtype)


def _run(case: Case, mechanism: Mechanism, comparisons: dict[str, Compare]) -> Iterator[Check]:
    for name, compare in comparisons.items():
        bitwise = name.startswith("saved")
        yield _measured(case, mechanism, name, compare, 0.0 if bitwise else case.tolerance)


def _measured(case: Case, mechanism: Mechanism, name: str, compare: Compare, tolerance: float) -> Check:
    """Run one comparison; an exception counts as a failure."""
    try:
        measured = compare(case)
    except NotChecked as reason:
        return _skipped(case, mechanism, name, str(reason))
    except Exception as error:
        return _failed(case, mechanism, name, error)
    status = "ok" if measured.size <= tolerance else "failed"
    return Check(case.name, mechanism.name, mechanism.label, name, status, measured.size, tolerance, measured.where)


class NotChecked(Exception):
    """A check that cannot run here, with the reason."""


# The comparisons


def token_by_token(case: Case) -> Difference:
    """Compare passes of one token over a cache with one pass over the same tokens, at every step."""
    sizes = [PROMPT, *[1] * (TOKENS - PROMPT)]
    return _against_whole(case, sizes)


def in_chunks(case: Case) -> Difference:
    """Compare passes of several tokens over a cache with one pass over the same tokens."""
    return _against_whole(case, list(CHUNKS))


def across_a_change(case: Case) -> Difference:
    """Compare passes of one token with passes of several while a cache grows beyond `CHANGE`."""
    start = CHANGE - 7
    one_by_one = cached_logits(case.model, case.ids, [start, *[1] * (TOKENS - start)])
    chunks = cached_logits(case.model, case.ids, [start, 12, TOKENS - start - 12])
    return largest(difference(last, one_by_one[end], f"at token {end} of {TOKENS}") for end, last in chunks.items())


def _against_whole(case: Case, sizes: list[int]) -> Difference:
    cached = cached_logits(case.model, case.ids, sizes)
    expected = last_logits(case.model, case.ids, cached)
    return largest(difference(cached[end], expected[end], f"at token {end} of {TOKENS}") for end in cached)


def greedy_text(case: Case) -> Difference:
    """Compare the logits of the tokens that `generate` writes with and without a cache.

    Two logits may be so close that rounding decides between them, so the comparison ends at the first token that
    differs.
    """
    prompt = case.ids[:, :PROMPT]
    with_cache, cached = greedy(case.model, prompt, GENERATED, use_cache=True)
    without, expected = greedy(case.model, prompt, GENERATED, use_cache=False)
    last = next((n for n in range(GENERATED) if with_cache[n] != without[n]), GENERATED - 1)
    texts = ""
    if with_cache != without:
        texts = f" ({_format_tokens(case, with_cache)} with a cache, {_format_tokens(case, without)} without)"
    return largest(difference(cached[n], expected[n], f"at generated token {n + 1}{texts}") for n in range(last + 1))


def _format_tokens(case: Case, tokens: list[int]) -> str:
    return str(tokens) if case.tokenizer is None else repr(case.tokenizer.decode(tokens))


def padded(case: Case) -> Difference:
    """Compare each row of a left-padded batch with the row alone, in one pass and with a cache."""
    ids, mask, position_ids = case.padded
    position_ids = None if find_patch(case.model) is not None else position_ids
    rows = [row[is_token.bool()][None] for row, is_token in zip(ids, mask, strict=True)]
    batched = logits(case.model, ids, mask, position_ids)
    differences = [
        difference(batched[index : index + 1, -row.shape[1] :], logits(case.model, row), f"in row {index} of one pass")
        for index, row in enumerate(rows)
    ]
    cached = cached_logits(case.model, ids, [TOKENS - 6, *[1] * 6], mask, position_ids)
    for index, row in enumerate(rows):
        padding = TOKENS - row.shape[1]
        alone = last_logits(case.model, row, [end - padding for end in cached])
        differences += [
            difference(last[index : index + 1], alone[end - padding], f"in row {index}, with a cache, at token {end}")
            for end, last in cached.items()
        ]
    return largest(differences)


def saved_and_loaded(case: Case) -> Difference:
    """Save the patched model, load it with `load_patched`, and compare the logits bit for bit."""
    size = sum(weight.numel() * weight.element_size() for weight in case.model.state_dict().values())
    if size > SAVED_AT_MOST:
        raise NotChecked(f"its {size / 1e9:.1f} GB of weights are too large for a temporary folder")
    with tempfile.TemporaryDirectory(prefix="pe-patch-selftest-") as folder:
        free = shutil.disk_usage(folder).free
        if free < 2 * size:
            raise NotChecked(f"the temporary folder has {free / 1e6:.0f} MB free; the weights take {size / 1e6:.0f} MB")
        case.model.save_pretrained(Path(folder) / "model")
        loaded: Any = load_patched(Path(folder) / "model", dtype=case.model.dtype)
        loaded = loaded.to(case.model.device).eval()
        return difference(logits(loaded, case.ids), logits(case.model, case.ids), "after load_patched")


PATCHED: dict[str, Compare] = {
    "cache, token by token = no cache": token_by_token,
    "cache, in chunks = no cache": in_chunks,
    "greedy text, cache = no cache": greedy_text,
    "padded batch = rows alone": padded,
}
"""The comparisons with and without a patch."""


def _identity(case: Case) -> Check:
    """Patch in the family's native scheme and compare with the unpatched model.

    A rotation is equal bit for bit. A patch adds BLOOM's bias at another place in the sum, which rounds differently.
    """
    mechanism = Mechanism("identity", "native")
    name = "native scheme = no patch"
    ids, mask, position_ids = case.padded
    sizes = [PROMPT, *[1] * (TOKENS - PROMPT)]

    def read() -> list[Tensor]:
        padded_logits = logits(case.model, ids, mask, position_ids)[mask.bool()]
        return [logits(case.model, case.ids), padded_logits, *cached_logits(case.model, case.ids, sizes).values()]

    try:
        scheme = _native_scheme(case.model)
        mechanism = Mechanism("identity", scheme if isinstance(scheme, str) else str(scheme.get("rope_type")))
        expected = read()
        patch_model(case.model, scheme, on_existing="replace")
    except NotChecked as reason:
        return _skipped(case, mechanism, name, str(reason))
    except Exception as error:
        if case.may_refuse and isinstance(error, PePatchError):
            return _skipped(case, mechanism, name, _one_line(error))
        return _failed(case, mechanism, name, error)

    def compare(case: Case) -> Difference:
        where = [
            "in one pass",
            "in a padded batch",
            *(f"with a cache, at token {n}" for n in range(PROMPT, TOKENS + 1)),
        ]
        return largest(difference(*each) for each in zip(read(), expected, where, strict=True))

    tolerance = 0.0 if mechanism.scheme not in ("alibi",) else case.tolerance
    check = _measured(case, mechanism, name, compare, tolerance)
    try:
        unpatch_model(case.model)
    except Exception as error:
        return _failed(case, mechanism, "unpatch_model", error)
    return check


def _native_scheme(model: Any) -> str | dict[str, Any]:
    """Return the scheme with which a patch changes nothing: the scaling of the config, or the family's scheme."""
    config = model.config.get_text_config()
    _, adapter = adapter_for(model)
    parameters = config_rope_parameters(config) if adapter.rotary is not None else {}
    if any(isinstance(value, dict) for value in parameters.values()):
        raise NotChecked("its layer types rotate differently, so no single scheme is native")
    return dict(parameters) if parameters.get("rope_type", "default") != "default" else adapter.native


# Results


def _failed(case: Case, mechanism: Mechanism, name: str, error: Exception) -> Check:
    return Check(case.name, mechanism.name, mechanism.label, name, "failed", message=_one_line(error))


def _skipped(case: Case, mechanism: Mechanism, name: str, reason: str) -> Check:
    return Check(case.name, mechanism.name, mechanism.label, name, "skipped", message=reason)


def _one_line(error: Exception) -> str:
    """Return an exception as one line of text."""
    text = " ".join(str(error).split())[:300].rstrip(".")
    return text if isinstance(error, PePatchError) else f"{type(error).__name__}: {text}"
