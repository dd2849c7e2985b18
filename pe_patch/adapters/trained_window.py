"""Find the length that a model was trained for, and the source of the number."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeGuard

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from .. import compat
from ..core.checks import LARGEST_LENGTH
from ..errors import OptionValueError, quoted

OPTION = "original_max_position_embeddings"
"""The option by which a user states the window."""
OTHER_NAMES = ("seq_length", "max_sequence_length", "max_seq_len", "model_max_length")
"""Keys beside `max_position_embeddings` in which configs state a length."""
TOLERANCE = 0.01
"""Largest relative difference between a window and the factor times the other window."""
NOT_A_RATIO = ("longrope", "llama3")
"""Types whose factor is not the ratio of the two windows (Llama 3.1: factor 8, windows 16 apart)."""


@dataclass(frozen=True)
class AuthorFacts:
    """Facts that a model's authors state besides its config."""

    statement: str
    """A sentence with the value in the config and the value that the authors state."""
    source: str
    """A short form of the sentence, for a table or a log line."""
    trained_length: int | None = None
    """The window before any scaling, in tokens; None if it can be computed from the config."""
    maximum_is_scaled: bool = False
    """`max_position_embeddings` is the window after the scaling, so that it includes the factor."""
    recommended: str | None = None
    """Name of the scheme that the authors recommend without training; None if they recommend none."""
    recommended_length: int = 0
    """The length in tokens up to which they recommend it."""


Maximum = int | None
"""The `max_position_embeddings` that the model was built with."""
Parameters = dict[str, Any]
"""The rotary parameters of the layers in question."""


def _unscaled(parameters: Parameters) -> bool:
    return parameters.get("rope_type", "default") in ("default", None)


def _theta(parameters: Parameters) -> float:
    return float(parameters.get("rope_theta") or 0)


def _is_mistral_1(config: Any, maximum: Maximum, parameters: Parameters) -> bool:
    # The sliding window of 4096 may have been lifted. Versions 0.2 and 0.3 have a base of 1e6.
    return (
        config.model_type == "mistral"
        and maximum == 32768
        and _theta(parameters) == 1e4
        and (_unscaled(parameters) or parameters.get("original_max_position_embeddings") in (None, 8192))
    )


def _is_qwen3(config: Any, maximum: Maximum, parameters: Parameters) -> bool:
    return config.model_type in ("qwen3", "qwen3_moe") and maximum == 40960 and _unscaled(parameters)


def _is_qwen25(config: Any, maximum: Maximum, parameters: Parameters) -> bool:
    return config.model_type == "qwen2" and maximum == 32768 and _theta(parameters) == 1e6 and _unscaled(parameters)


def _is_bloom(config: Any, maximum: Maximum, parameters: Parameters) -> bool:
    # The released models, BLOOM and BLOOMZ, share one vocabulary; another vocabulary means another model.
    return config.model_type == "bloom" and config.vocab_size == 250880 and maximum is None


def _is_gemma3(config: Any, maximum: Maximum, parameters: Parameters) -> bool:
    return config.model_type == "gemma3_text" and parameters.get("rope_type") == "linear"


KNOWN: tuple[tuple[Callable[[Any, Maximum, Parameters], bool], AuthorFacts], ...] = (
    (
        _is_mistral_1,
        AuthorFacts(
            "The config allows 32,768 tokens; Transformers' page of the model says it was trained on 8,192, and YaRN's "
            "authors extend it from there (arXiv 2309.00071).",
            "Transformers' page of Mistral 7B v0.1; its config says 32,768",
            trained_length=8192,
        ),
    ),
    (
        _is_qwen3,
        AuthorFacts(
            "The config allows 40,960 tokens: the 32,768 that the model was trained on and 8,192 more for a prompt. "
            "Its authors' model card counts from 32,768 and recommends YaRN of factor 4 for 131,072.",
            "the model card of Qwen3; its config says 40,960, which adds 8,192 for a prompt",
            trained_length=32768,
            recommended="yarn",
            recommended_length=131072,
        ),
    ),
    (
        _is_qwen25,
        AuthorFacts(
            "Its authors' model card recommends YaRN of factor 4 over 32,768 tokens for 131,072.",
            "the model card of Qwen2.5, and its config",
            trained_length=32768,
            recommended="yarn",
            recommended_length=131072,
        ),
    ),
    (
        _is_bloom,
        AuthorFacts(
            "The config names no window; the model was trained on 2,048 tokens (arXiv 2211.05100).",
            "BLOOM's paper, arXiv 2211.05100; its config names none",
            trained_length=2048,
        ),
    ),
    (
        _is_gemma3,
        AuthorFacts(
            "Its authors trained it on 32,768 tokens and rescaled its far-reaching layers to the window that the "
            "config names (Gemma Team 2025, arXiv 2503.19786), which therefore counts the factor.",
            "Gemma 3's report, arXiv 2503.19786",
            maximum_is_scaled=True,
        ),
    ),
)


def author_facts(config: Any, maximum: Maximum, parameters: Parameters) -> AuthorFacts | None:
    """Return the facts that the authors state about this model, or None if they state nothing beyond its config.

    Args:
        config: the config of the language model.
        maximum: the `max_position_embeddings` that the model was built with; None if it has none.
        parameters: the rotary parameters of the layers in question.
    """
    return next((word for fits, word in KNOWN if fits(config, maximum, parameters)), None)


@dataclass(frozen=True)
class TrainedWindow:
    """The window that a model was trained for, before and after the scaling in its config."""

    length: int | None = None
    """The window before any scaling, in tokens, from which a scheme that replaces the rotation extends. None if
    unknown."""
    scaled_length: int | None = None
    """The window with the scaling, in tokens, from which a scheme over that rotation extends. `length` without a
    scaling; None if unknown."""
    source: str = "nothing names it"
    """The source of `length` in words, or the reason why it is unknown."""
    scaled_source: str = ""
    """The source of `scaled_length` in words, or the reason why it is unknown; empty without a scaling."""
    rope_type: str = "default"
    """The type of the scaling in the config; "default" for none."""
    factor: float | None = None
    """The factor of that scaling, or the ratio of the two windows if the config has no factor; None if unknown."""
    choices: tuple[tuple[int, int], ...] = ()
    """The possible pairs (`length`, `scaled_length`) if the config is ambiguous; else empty."""
    maximum: int | None = None
    """The `max_position_embeddings` that the model was built with; None if unknown."""
    config_maximum: int | None = None
    """The `max_position_embeddings` of the config, which may have been changed since."""
    word: AuthorFacts | None = None
    """The facts that the model's authors state; None if there are none."""

    @property
    def scaled(self) -> bool:
        """Return whether the config contains a scaling."""
        return self.rope_type != "default"

    @property
    def raised(self) -> bool:
        """Return whether the config claims a longer window than the model was built with."""
        return (self.config_maximum or 0) > (self.maximum or self.config_maximum or 0)

    def in_words(self, composed: bool = False) -> str:
        """Return the window with its source, for example `32,768 tokens (...)`; under `composed` the one with the
        scaling."""
        number = self.scaled_length if composed else self.length
        source = (self.scaled_source or self.source) if composed else self.source
        return f"unknown ({source})" if number is None else f"{number:,} tokens ({source})"

    def missing_window_message(self, composed: bool = False, option: str = OPTION) -> str:
        """Return why the window is unknown and what to type, with an example for each reading of the config."""
        reason = (self.scaled_source or self.source) if composed else self.source
        numbers = dict.fromkeys(pair[composed] for pair in self.choices)
        example = f"for example {option}=4096"
        if len(numbers) > 1:
            example = " or ".join(f"{option}={number}" for number in numbers)
        return f"{reason}: give {option}=<tokens>, {example}."

    def with_window(self, given: Any, composed: bool) -> TrainedWindow:
        """Return a copy with the window that the user gives.

        Args:
            given: the window that the scheme extends from, in tokens. Under `composed` it may also be the window before
                the scaling, for which configs use the same name; then it confirms `length`.
            composed: the scheme builds on the scaling in the config instead of replacing it.

        Raises:
            OptionValueError: `given` is not a whole number of tokens.
        """
        number = _count(given, OPTION)
        if not (composed and self.scaled):
            scaled = next((after for before, after in self._pairs if before == number), self.scaled_length)
            return replace(
                self, length=number, scaled_length=scaled if self.scaled else number, source=f"the option {OPTION}"
            )
        if all(number != after for _, after in self._pairs):
            for before, after in self._pairs:
                if number == before:
                    source = f"the option {OPTION}={number}, before the scaling"
                    return replace(self, length=before, scaled_length=after, source=source, scaled_source=source)
        return self.with_scaled_window(number)

    def with_scaled_window(self, given: Any, option: str = OPTION) -> TrainedWindow:
        """Return a copy with the window that the user gives for the model with its scaling."""
        number, source = _count(given, option), f"the option {option}"
        if not self.scaled:
            return replace(self, length=number, scaled_length=number, source=source)
        before = next((before for before, after in self._pairs if after == number), self.length)
        return replace(self, length=before, scaled_length=number, scaled_source=source)

    @property
    def _pairs(self) -> tuple[tuple[int, int], ...]:
        return self.choices or ((self.length or 0, self.scaled_length or 0),)


def config_rope_parameters(config: Any, layer_type: str | None = None) -> dict[str, Any]:
    """Return the rotary parameters in a config, or those of one layer type; an empty dict if it has none."""
    parameters = dict(getattr(config, "rope_parameters", None) or {})
    return parameters if layer_type is None else dict(parameters[layer_type] or {})


def trained_window(base: Any, config: Any, layer_type: str | None = None) -> TrainedWindow:
    """Return the window that a model was trained for, with its source.

    The sources in order of trust: the model's authors (`KNOWN`), the scaling in the config, the built modules,
    and `max_position_embeddings`. A value from the user overrides all of them: see `TrainedWindow.with_window`.

    Args:
        base: the model, for the window that its modules were built with; None if there is only a config.
        config: the config of the language model.
        layer_type: the layer type, if types have separate rotary parameters; None for the type with the largest base.
    """
    parameters = _parameters(config, layer_type)
    maximum, source = _maximum(base, config)
    rope_type = str(parameters.get("rope_type") or "default")
    word = author_facts(config, maximum, parameters)
    named = getattr(config, "max_position_embeddings", None)
    window = TrainedWindow(
        source=source,
        rope_type=rope_type,
        maximum=maximum,
        config_maximum=named - _rows_before_zero(base, named) if is_count(named) else None,
        word=word,
    )
    if word is not None and word.trained_length is not None:
        window = replace(window, length=word.trained_length, source=word.source)
    if rope_type in ("default", "pe_patch"):
        length = window.length or maximum
        return replace(window, length=length, scaled_length=length, rope_type="default")
    return _with_scaling(window, config, parameters)


def _with_scaling(window: TrainedWindow, config: Any, parameters: dict[str, Any]) -> TrainedWindow:
    """Return both windows of a config that carries a scaling."""
    maximum, rope_type = window.maximum, window.rope_type
    original = parameters.get(OPTION) or getattr(config, OPTION, None)
    if maximum is None and original == window.config_maximum:  # Transformers copies its default there too
        original = None
    original = original if is_count(original) else window.length
    factor = _factor(parameters, maximum, original)
    window = replace(window, factor=factor)
    carried = f"{quoted(rope_type)}" if factor is None else f"{quoted(rope_type)} by {factor:g}"
    if original is None and rope_type == "dynamic":  # begins beyond its window and changes nothing within
        return replace(window, length=maximum, scaled_length=maximum, scaled_source=window.source)
    if original is None:
        return _by_factor(window, config, carried)
    if window.length is None:
        window = replace(window, length=original, source=f"{OPTION} of the config's {quoted(rope_type)} scaling")
    if rope_type == "dynamic":
        return replace(window, scaled_length=original, scaled_source=window.source)
    reached = None if factor is None else int(factor * original)
    by_factor = f"{carried} from {original:,}"
    if maximum is not None and maximum > original and (rope_type in NOT_A_RATIO or _agree(original, factor, maximum)):
        return replace(window, scaled_length=maximum, scaled_source=f"max_position_embeddings, {by_factor}")
    if maximum is None or _is_unscaled_maximum(config, window, parameters, original):
        return replace(window, scaled_length=reached, scaled_source=by_factor)
    if reached is None:
        return replace(window, scaled_source=f"the config's {quoted(rope_type)} scaling names no factor")
    assert maximum is not None
    conflict = f"{by_factor} reaches {reached:,} tokens, but max_position_embeddings={maximum}"
    return replace(window, scaled_source=conflict, choices=((original, maximum), (original, reached)))


def _by_factor(window: TrainedWindow, config: Any, carried: str) -> TrainedWindow:
    """Return both windows of a config with a factor and one length.

    Whether the length includes the factor depends on the family (Gemma 3: yes, Vicuna: no).
    """
    maximum, factor = window.maximum, window.factor or 1.0
    if maximum is None:
        return window
    if factor == 1:
        return replace(window, length=maximum, scaled_length=maximum, scaled_source=window.source)
    before, after = round(maximum / factor), int(maximum * factor)
    if window.word is not None and window.word.maximum_is_scaled:
        source = window.word.source
        counted = f"max_position_embeddings, which counts the factor {factor:g}; {source}"
        source = f"{maximum:,} over the factor {factor:g}; {source}"
        return replace(window, length=before, scaled_length=maximum, source=source, scaled_source=counted)
    for key in OTHER_NAMES:
        other = getattr(config, key, None)
        if not is_count(other):
            continue
        if _close(other, after):
            return replace(window, length=maximum, scaled_length=after, scaled_source=f"{key} of the config, {carried}")
        if _close(other, maximum):
            source = f"{maximum:,} over the factor {factor:g}, which {key}={other} counts too"
            return replace(window, length=before, scaled_length=maximum, source=source, scaled_source=f"{key}={other}")
    written = _checkpoint_config(config)
    if written is not None and not _carries_scaling(written) and written.get("max_position_embeddings") == maximum:
        source = f"max_position_embeddings of {config.name_or_path}, whose config.json carries no scaling"
        return replace(window, length=maximum, scaled_length=after, source=source, scaled_source=carried)
    unclear = (
        f"the config carries {carried} and max_position_embeddings={maximum}, and does not say whether that is the "
        f"window before the factor ({maximum} to {after} tokens) or after it ({before} to {maximum})"
    )
    return replace(window, source=unclear, scaled_source=unclear, choices=((before, maximum), (maximum, after)))


def _is_unscaled_maximum(config: Any, window: TrainedWindow, parameters: dict[str, Any], original: int) -> bool:
    """Return whether this `max_position_embeddings` is from before a scaling that starts at `original` was added, as
    Qwen3's model card asks for and YaRN's authors did with Mistral."""
    if window.maximum == original:
        return True
    before = author_facts(config, window.maximum, {**parameters, "rope_type": "default", OPTION: None})
    return before is not None and before.trained_length == original


def is_count(value: Any) -> TypeGuard[int]:
    """Return whether a value is a number of tokens."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _close(first: float, second: float) -> bool:
    return math.isclose(first, second, rel_tol=TOLERANCE)


def _agree(original: int, factor: float | None, maximum: int) -> bool:
    """Return whether a factor is the ratio of two windows, up to rounding: 32 from 4,096 to 128,000 tokens."""
    return factor is not None and (_close(factor, maximum / original) or factor == math.ceil(maximum / original))


def _factor(parameters: dict[str, Any], maximum: int | None, original: int | None) -> float | None:
    """Return the factor as Transformers takes it: the one that is written, else the ratio of the two windows."""
    written = parameters.get("factor")
    if isinstance(written, int | float) and not isinstance(written, bool):
        return float(written)
    return maximum / original if maximum and original else None


def _parameters(config: Any, layer_type: str | None) -> dict[str, Any]:
    """Return the rotary parameters of one layer type, or of the type with the largest base."""
    parameters = config_rope_parameters(config, layer_type)
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    if nested and not parameters.get("rope_type"):
        return max(nested, key=lambda each: float(each.get("rope_theta") or 0))
    return parameters


def _maximum(base: Any, config: Any) -> tuple[int | None, str]:
    """Return the `max_position_embeddings` that the model was built with, and its source or why it is unknown."""
    maximum, built = getattr(config, "max_position_embeddings", None), built_window(base)
    if is_count(maximum) and built is not None and (before := _rows_before_zero(base, maximum)):
        return built[0], f"the table of {maximum:,} rows, of which the first {before} are no positions"
    if is_count(maximum) and built is not None and maximum > built[0]:
        return built[0], f"what {built[1]} was built with; the config was changed to {maximum:,} afterwards"
    if is_count(maximum) and not _left_out(config, maximum):
        return maximum, "max_position_embeddings of the config"
    for key in OTHER_NAMES:
        if is_count(getattr(config, key, None)):
            return getattr(config, key), f"{key} of the config"
    if is_count(maximum):
        default = f"{maximum:,} is the default of {type(config).__name__}"
        return None, f"the config.json of {config.name_or_path} names no window ({default})"
    if maximum is not None:
        return None, f"the config says max_position_embeddings={quoted(maximum)}, which is no number of tokens"
    if built is not None:
        return built[0], f"what {built[1]} was built with"
    return None, f"the config of this {config.model_type} names no window"


BUILT_NAMES = {
    "Attention": ("max_positions", "max_seq_length"),  # GPT-J, MPT
    "SinusoidalPositionalEmbedding": ("num_positions",),  # XGLM
}
"""Attributes with the window that a module was built for, by the end of the name of its class."""


def built_window(base: Any) -> tuple[int, str] | None:
    """Return the window that a model's rotary module or table of positions was built for, and its class; None without
    such a module."""
    for module in base.modules() if base is not None else ():
        own = next((names for kind, names in BUILT_NAMES.items() if type(module).__name__.endswith(kind)), ())
        for name in ("original_max_seq_len", *own):
            if is_count(built := getattr(module, name, None)):
                return built, type(module).__name__
    return table_window(base)


def table_window(base: Any) -> tuple[int, str] | None:
    """Return how many positions a model's table of positions has, and its class; None without a table."""
    found = named_table(base)
    if found is None:
        return None
    _, table, offset = found
    return table.num_embeddings - offset, type(table).__name__


def _rows_before_zero(base: Any, maximum: int) -> int:
    """Return how many of `max_position_embeddings` rows are no positions, where the config counts those (RoBERTa)."""
    found = None if base is None else named_table(base)
    return found[2] if found is not None and found[1].num_embeddings == maximum else 0


TABLES = ("wpe", "embed_positions", "positions_embed", "position_embeddings", "embeddings.position_embeddings")
"""Paths at which base models keep a table of positions."""


def named_table(base: Any) -> tuple[str, Any, int] | None:
    """Return the path of a table of positions under a usual name, the table, and its rows before position zero."""
    for name in TABLES:
        try:
            table = attrgetter(name)(base)
        except AttributeError:
            continue
        if is_count(getattr(table, "num_embeddings", None)):
            padding = getattr(table, "padding_idx", None)  # RoBERTa counts from the row behind that of padding
            return name, table, int(getattr(table, "offset", 0 if padding is None else padding + 1))
    return None


def _left_out(config: Any, maximum: int) -> bool:
    """Return whether Transformers filled the window in from its class, since the checkpoint's config.json has none."""
    name = config.attribute_map.get("max_position_embeddings", "max_position_embeddings")
    field = getattr(type(config), "__dataclass_fields__", {}).get(name)
    if field is None or field.default != maximum:
        return False
    written = _checkpoint_config(config)
    if written is None:
        return False
    return written.get("model_type") == config.model_type and not {name, "max_position_embeddings"} & written.keys()


def _checkpoint_config(config: Any) -> dict[str, Any] | None:
    """Return the config.json that a config was read from, as it is on disk; None if it is not here."""
    source = getattr(config, "name_or_path", "")
    if not source:
        return None
    file: Any = Path(source) / "config.json"
    if not file.is_file():
        try:
            file = try_to_load_from_cache(source, "config.json", revision=compat.commit_hash(config))
        except HFValidationError:  # a folder that is gone, and no name on the hub
            return None
        if not isinstance(file, str):
            return None
    return json.loads(Path(file).read_text(encoding="utf-8"))


def _carries_scaling(written: dict[str, Any]) -> bool:
    """Return whether a config.json asks for rotary frequencies other than the plain ones, in any layer type."""
    for key in ("rope_scaling", "rope_parameters"):
        parameters = written.get(key) or {}
        nested = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
        if any(each.get("rope_type", each.get("type", "default")) not in ("default", None) for each in nested):
            return True
    return False


def _count(given: Any, option: str) -> int:
    """Return a user's number of tokens.

    Raises:
        OptionValueError: it is none.
    """
    number = isinstance(given, int | float) and not isinstance(given, bool) and 1 <= given <= LARGEST_LENGTH
    if not number or given != int(given):
        raise OptionValueError(
            f"{option}={quoted(given)} is not a window; give a whole number of tokens, such as {option}=4096."
        )
    return int(given)
