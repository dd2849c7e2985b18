"""What must be equal under every scheme, measured."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...adapters import ADAPTERS
from ...adapters.adapter import native_parameters
from ...checkpoints.load import load_patched
from ...errors import NoEffectError, PePatchError, UnsupportedError
from ...patching.api import find_patch, patch_model, unpatch_model
from .models import PROMPT, TOKENS, Case
from .reading import Difference, cached_logits, difference, greedy, largest, last_logits, logits
from .result import Check

GENERATED = 14
"""Tokens of the greedy text."""
CHUNKS = (44, 6, 7, 5, 12)
"""Tokens of each pass when the cache is read in chunks."""
CHANGE = TOKENS // 2
"""The window of the scheme that follows the length. Beyond it all that is read here has one scaling, so that a cache
must give what one pass gives."""
SAVED_AT_MOST = 2 * 2**30
"""Bytes of weights above which a model is not saved and loaded again."""


@dataclass(frozen=True)
class Mechanism:
    """A way in which positions reach a model, and a scheme that uses it."""

    name: str
    scheme: str
    options: dict[str, Any] = field(default_factory=dict)
    reads_text: bool = False
    """The scheme is calibrated on text."""

    @property
    def changes(self) -> bool:
        """Return whether the scheme changes when the sequence grows beyond `CHANGE`."""
        return self.options.get("factor") == "auto"

    @property
    def label(self) -> str:
        """Return the scheme, with what makes it follow the length."""
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
        return [Check(name, NATIVE.name, NATIVE.label, "the model can be built", "failed", message=_said(error))]
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
            reason = "the patch before it could not be removed"
            rest = MECHANISMS[MECHANISMS.index(mechanism) + 1 :]
            return checks + [_skipped(case, other, "all checks", reason) for other in rest]
    return checks


def _under(case: Case, mechanism: Mechanism, before: Tensor) -> Iterator[Check]:
    """Patch, check, undo, and compare with the model as it was."""
    if mechanism.scheme in case.refuses:
        yield _skipped(case, mechanism, "all checks", "not defined for this family")
        return
    try:
        _patch(case, mechanism)
    except Exception as error:
        refused = isinstance(error, PePatchError) and not isinstance(error, NoEffectError)
        if refused and case.may_refuse:
            yield _skipped(case, mechanism, "all checks", _said(error))
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
        if "position_schemes.scheme" in name:  # learned, and at first mostly zero: nothing would depend on it
            values = torch.randn(parameter.shape, generator=generator)
            parameter.data = values.to(parameter.device, parameter.dtype)


def _run(case: Case, mechanism: Mechanism, comparisons: dict[str, Compare]) -> Iterator[Check]:
    for name, compare in comparisons.items():
        bitwise = name.startswith("saved")
        yield _measured(case, mechanism, name, compare, 0.0 if bitwise else case.tolerance)


def _measured(case: Case, mechanism: Mechanism, name: str, compare: Compare, tolerance: float) -> Check:
    """Run one comparison; an exception is a failure with its message."""
    try:
        found = compare(case)
    except NotChecked as reason:
        return _skipped(case, mechanism, name, str(reason))
    except Exception as error:
        return _failed(case, mechanism, name, error)
    status = "ok" if found.size <= tolerance else "failed"
    return Check(case.name, mechanism.name, mechanism.label, name, status, found.size, tolerance, found.where)


class NotChecked(Exception):
    """A check that cannot run here, with the reason."""


# The comparisons


def token_by_token(case: Case) -> Difference:
    """Compare a cache that grows by one token with a pass over the whole beginning, at every step."""
    sizes = [PROMPT, *[1] * (TOKENS - PROMPT)]
    return _against_whole(case, sizes)


def in_chunks(case: Case) -> Difference:
    """The same with several tokens in each pass."""
    return _against_whole(case, list(CHUNKS))


def across_a_change(case: Case) -> Difference:
    """Let a cache grow beyond the length at which the scheme changes, one token at a time and in two passes."""
    start = CHANGE - 7
    one_by_one = cached_logits(case.model, case.ids, [start, *[1] * (TOKENS - start)])
    chunks = cached_logits(case.model, case.ids, [start, 12, TOKENS - start - 12])
    return largest(difference(found, one_by_one[end], f"at token {end} of {TOKENS}") for end, found in chunks.items())


def _against_whole(case: Case, sizes: list[int]) -> Difference:
    found = cached_logits(case.model, case.ids, sizes)
    expected = last_logits(case.model, case.ids, found)
    return largest(difference(found[end], expected[end], f"at token {end} of {TOKENS}") for end in found)


def greedy_text(case: Case) -> Difference:
    """Compare the text that `generate` writes with and without a cache, by the logits each token is chosen from.

    The tokens must be the same, unless two of them have logits so near each other that rounding decides.
    """
    prompt = case.ids[:, :PROMPT]
    with_cache, found = greedy(case.model, prompt, GENERATED, use_cache=True)
    without, expected = greedy(case.model, prompt, GENERATED, use_cache=False)
    same = next((n for n in range(GENERATED) if with_cache[n] != without[n]), GENERATED - 1)
    texts = (
        "" if with_cache == without else f" ({_shown(case, with_cache)} with a cache, {_shown(case, without)} without)"
    )
    each = (difference(found[n], expected[n], f"at generated token {n + 1}{texts}") for n in range(same + 1))
    return largest(each)


def _shown(case: Case, tokens: list[int]) -> str:
    return str(tokens) if case.tokenizer is None else repr(case.tokenizer.decode(tokens))


def padded(case: Case) -> Difference:
    """Compare each row of a batch that is padded on the left with the row alone: one pass, and a cache that grows."""
    ids, mask, places = case.padded
    places = None if find_patch(case.model) is not None else places
    rows = [row[real.bool()][None] for row, real in zip(ids, mask, strict=True)]
    together = logits(case.model, ids, mask, places)
    parts = [
        difference(together[index : index + 1, -row.shape[1] :], logits(case.model, row), f"in row {index} of one pass")
        for index, row in enumerate(rows)
    ]
    grown = cached_logits(case.model, ids, [TOKENS - 6, *[1] * 6], mask, places)
    for index, row in enumerate(rows):
        empty = TOKENS - row.shape[1]
        alone = last_logits(case.model, row, [end - empty for end in grown])
        parts += [
            difference(found[index : index + 1], alone[end - empty], f"in row {index}, with a cache, at token {end}")
            for end, found in grown.items()
        ]
    return largest(parts)


def saved_and_loaded(case: Case) -> Difference:
    """Save the patched model, load it with `load_patched`, and compare the logits bit for bit."""
    size = sum(weight.numel() * weight.element_size() for weight in case.model.state_dict().values())
    if size > SAVED_AT_MOST:
        raise NotChecked(f"{size / 1e9:.1f} GB of weights are not written to a temporary folder")
    with tempfile.TemporaryDirectory(prefix="pe-patch-selftest-") as folder:
        free = shutil.disk_usage(folder).free
        if free < 2 * size:
            raise NotChecked(
                f"the temporary folder has {free / 1e6:.0f} MB free, and the weights take {size / 1e6:.0f}"
            )
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
"""What holds with and without a patch."""


def _identity(case: Case) -> Check:
    """Patch in the scheme that the family has anyway, and compare with the model without a patch.

    A rotation is the same bit for bit. BLOOM's bias is added elsewhere in the sum, which rounds otherwise.
    """
    mechanism = Mechanism("identity", "native")
    name = "native scheme = no patch"
    ids, mask, places = case.padded
    sizes = [PROMPT, *[1] * (TOKENS - PROMPT)]

    def read() -> list[Tensor]:
        real = logits(case.model, ids, mask, places)[mask.bool()]
        return [logits(case.model, case.ids), real, *cached_logits(case.model, case.ids, sizes).values()]

    try:
        scheme = _native_scheme(case.model)
        mechanism = Mechanism("identity", scheme if isinstance(scheme, str) else str(scheme.get("rope_type")))
        expected = read()
        patch_model(case.model, scheme, on_existing="replace")
    except NotChecked as reason:
        return _skipped(case, mechanism, name, str(reason))
    except Exception as error:
        if case.may_refuse and isinstance(error, PePatchError):
            return _skipped(case, mechanism, name, _said(error))
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
    """Return the scheme under which a patch changes nothing: that of the family, or the scaling that the config has."""
    config = model.config.get_text_config()
    adapter = ADAPTERS.get(config.model_type)
    if adapter is None:
        raise UnsupportedError(f"{config.model_type!r} is no supported family.")
    parameters = native_parameters(config) if adapter.rotary is not None else {}
    if any(isinstance(value, dict) for value in parameters.values()):
        raise NotChecked("its layers rotate by type, and one scheme is not all of them")
    return dict(parameters) if parameters.get("rope_type", "default") != "default" else adapter.native


# Results


def _failed(case: Case, mechanism: Mechanism, name: str, error: Exception) -> Check:
    return Check(case.name, mechanism.name, mechanism.label, name, "failed", message=_said(error))


def _skipped(case: Case, mechanism: Mechanism, name: str, reason: str) -> Check:
    return Check(case.name, mechanism.name, mechanism.label, name, "skipped", message=reason)


def _said(error: Exception) -> str:
    """Return an exception in one line."""
    text = " ".join(str(error).split())[:300].rstrip(".")
    return text if isinstance(error, PePatchError) else f"{type(error).__name__}: {text}"
