"""Build the schemes of all layers, from the user's options and from a scaling that the model has already.

`on_existing` decides about that scaling: raise, replace it, or build on it. The built rotary module decides what the
scaling is; the config only describes it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..adapters import ADAPTERS, Adapter
from ..adapters.adapter import frequencies_of, native_theta
from ..adapters.trained_window import OPTION, TrainedWindow, config_rope_parameters
from ..attention.parallel import check_conversion
from ..core.scheme import Scheme
from ..errors import AlreadyPatchedError, NoEffectError, OptionError, UnsupportedError, quoted
from ..mla.protocol import converts, replaces_rotation
from ..schemes import config_formats
from ..schemes.frequency_wrappers import FrequencyWrapper
from ..schemes.grid import GridScheme
from ..schemes.registry import ALIASES, SCHEMES, find_scheme
from ..schemes.remapped_base import Remapped
from ..schemes.rotary import Rotary, Rotation
from .targets import Target, device_and_dtype

EXISTING = ("error", "replace", "compose")
"""The values of `on_existing`."""


def build(
    scheme: Any, options: Mapping[str, Any], target: Target, on_existing: str
) -> tuple[dict[int, Scheme], TrainedWindow]:
    """Return the scheme of each chosen layer, by layer index, and the trained window that it extends from.

    Layers share one scheme, except that a rotary scheme needs one for each layer type and a `per_layer` scheme one for
    each layer.

    Args:
        scheme: as for `patch_model`.
        options: options of the scheme.
        target: the layers to patch.
        on_existing: one of `EXISTING`.

    Raises:
        PePatchError: the scheme or an option does not fit the model.
    """
    first = target.layers[0]
    cls, options = find_scheme(scheme, options, target.shape(first))
    check_modality(target, cls)
    if converts(cls):
        check_conversion(target.attentions[first], cls.name)
    window = target.window(first)
    if replaces_rotation(cls, options):
        options, window = resolve_existing_scaling(target, cls, options, on_existing)
    placement = device_and_dtype(target.base)
    schemes: dict[Any, Scheme] = {}
    scheme_by_layer: dict[int, Scheme] = {}
    for index in target.layers:
        shape = target.shape(index)
        key = index if cls.per_layer else shape if issubclass(cls, Rotation) else None
        if key not in schemes:
            schemes[key] = cls(shape, **options).to(*placement).train(target.base.training)
        scheme_by_layer[index] = schemes[key]
    if on_existing == "compose" and window.scaled:
        check_effect(schemes.values(), window)
    return scheme_by_layer, window


def factor_reaching(
    length: int, scheme: Any, options: Mapping[str, Any], target: Target, on_existing: str
) -> float | int:
    """Return the factor by which a scheme reaches `length` tokens from the window that it extends.

    Args:
        length: the target length in tokens.
        scheme: as for `patch_model`.
        options: options of the scheme, without a factor.
        target: the layers to patch.
        on_existing: one of `EXISTING`.

    Raises:
        OptionError: the scheme has no factor, a factor is given too, or the length is within the trained window.
    """
    given = scheme.options if isinstance(scheme, Scheme) else scheme if isinstance(scheme, Mapping) else {}
    if "factor" in {*given, *options}:
        value = quoted({**given, **options}["factor"])
        raise OptionError(f"target_length={length} and factor={value} both set the reach of the scheme: give one.")
    known = SCHEMES.get(ALIASES.get(scheme, scheme)) if isinstance(scheme, str) else scheme
    if isinstance(known, type) and issubclass(known, Scheme):
        if known.name == "dynamic_ntk":
            raise OptionError("'dynamic_ntk' follows the length of each sequence: leave target_length out.")
        if "factor" not in known.option_names():
            names = ", ".join(sorted(known.option_names())) or "none"
            raise OptionError(
                f"{known.name!r} has no factor, so target_length={length} does not apply: leave it out. Its options "
                f"are: {names}."
            )
    cls, checked = find_scheme(scheme, {**options, "factor": 1.0}, target.shape(target.layers[0]))
    window = target.window(target.layers[0])
    if replaces_rotation(cls, checked):
        checked, window = resolve_existing_scaling(target, cls, checked, on_existing)
    start = checked.get(OPTION) or window.length
    if start is None:
        raise OptionError(
            f"target_length needs the trained window, and {window.missing_window_message(composed=False)}"
        )
    if length <= start:
        raise OptionError(
            f"target_length={length} is within the trained window of {start} tokens, so no scheme is needed. Give more "
            f"than {start}."
        )
    factor = length / start
    while int(factor * start) < length:  # the quotient was rounded down
        factor = math.nextafter(factor, math.inf)
    return int(factor) if factor.is_integer() else factor


def check_modality(target: Target, cls: type[Scheme]) -> None:
    """Raise `UnsupportedError` for a text scheme on a vision encoder, or a scheme for images on a text model."""
    adapter, family = target.adapter, target.base.config.model_type
    for_images = issubclass(cls, GridScheme)
    if adapter.vision_encoder is not None and not for_images:
        able = ", ".join(name for name, known in SCHEMES.items() if issubclass(known, GridScheme))
        raise UnsupportedError(
            f"{cls.name!r} is for text, and {family} reads images: use one of {able}, or choose the text "
            "model with submodule=."
        )
    if adapter.vision_encoder is None and for_images:
        raise UnsupportedError(
            f"{cls.name!r} needs a grid of image patches, and {family} reads text: use 'rope' or 'alibi', "
            "or choose a vision encoder with submodule=."
        )


def resolve_existing_scaling(
    target: Target, scheme: type[Scheme], options: dict[str, Any], on_existing: str
) -> tuple[dict[str, Any], TrainedWindow]:
    """Return the options to use and the trained window that the scheme extends from.

    Args:
        target: the layers to patch.
        scheme: the class of the scheme.
        options: its options.
        on_existing: one of `EXISTING`.

    Raises:
        AlreadyPatchedError: the config carries a scaling and `on_existing` is "error".
        OptionError: the window is needed and unknown; the message names the option.
        UnsupportedError: the scheme does not compose, or the config was changed after the model was built.
    """
    base, adapter, layer_types = target.base, target.adapter, target.layer_types
    config = base.config
    parameters_by_type = {layer_type: config_rope_parameters(config, layer_type) for layer_type in target.chosen_types}
    layer = next((i for i in target.layers if _scaled(parameters_by_type[layer_types[i]])), target.layers[0])
    window, parameters = target.window(layer), parameters_by_type[layer_types[layer]]
    composed = on_existing == "compose" and _scaled(parameters) and adapter.rotary is not None
    if options.get(OPTION) is not None and OPTION in scheme.option_names():
        window = window.with_window(options[OPTION], composed)
    if _scaled(parameters) and adapter.rotary is not None:
        if on_existing == "error":
            raise _already_scaled(
                window, parameters, native_theta(adapter.rotary_module(base), config, layer_types[layer])
            )
        if composed:
            _check_composes(scheme, options, parameters, target.chosen_types, layer_types[layer])
            options = {"over": existing_scheme(base, adapter, layer, window), **options}
        elif "theta" not in options:
            _check_built(base, adapter, layer_types[layer])
    if OPTION not in scheme.option_names():
        return options, window
    number = window.scaled_length if composed else window.length
    if number is None:
        raise OptionError(f"{scheme.name!r} extends a trained window, and {window.missing_window_message(composed)}")
    if composed and number != window.length:
        options = {**options, OPTION: number}
    return options, window


def _scaled(parameters: dict[str, Any]) -> bool:
    """Return whether rotary parameters contain a scaling."""
    return parameters.get("rope_type", "default") not in ("default", None)


def _already_scaled(window: TrainedWindow, parameters: dict[str, Any], theta: float) -> AlreadyPatchedError:
    """Return the error for a model whose config has a scaling, with both remedies."""
    start = f"its window of {window.length} tokens and theta {theta} ({window.source})"
    if window.length is None:
        start = f"theta {theta} and the unscaled window, which you must state: {window.source}"
    over = "" if window.scaled_length is None else f" from {window.scaled_length} tokens"
    return AlreadyPatchedError(
        f"This model already carries rope_type={parameters['rope_type']!r} ({_short(parameters)}): a second scaling "
        f"on top would not extend by the factor that it states. on_existing='replace' starts again from {start}; "
        f"on_existing='compose' builds on it{over}, for schemes that support it."
    )


def _short(parameters: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in parameters.items() if not isinstance(value, list))


def _check_composes(
    scheme: type[Scheme],
    options: dict[str, Any],
    parameters: dict[str, Any],
    layer_types: list[str | None],
    layer_type: str | None,
) -> None:
    """Raise if a scheme cannot build on the scaling in the config.

    Raises:
        UnsupportedError: the scheme does not compose, or only some of the chosen layer types are scaled.
        OptionError: the user gives `over` too.
    """
    if "over" not in scheme.option_names():
        able = [name for name, known in SCHEMES.items() if "over" in known.option_names()]
        raise UnsupportedError(
            f"{scheme.name!r} cannot build on an existing {parameters['rope_type']!r}; only {', '.join(able)} "
            "compose. Use on_existing='replace'."
        )
    if len(layer_types) > 1:
        raise UnsupportedError(f"Only the {layer_type} layers of this model are scaled; choose them with layers=.")
    if options.get("over") is not None:
        raise OptionError(
            f"on_existing='compose' puts {scheme.name!r} over the config's {parameters['rope_type']!r}, and "
            f"over={quoted(options['over'])} names another scheme. Leave one of the two out."
        )


def existing_scheme(base: PreTrainedModel, adapter: Adapter, layer: int, window: TrainedWindow) -> dict[str, Any]:
    """Return the scaling of a model as a scheme specification of this library, with the numbers of its rotary module.

    Args:
        base: the model that holds the layers.
        adapter: the description of its family.
        layer: index of a layer that has the scaling.
        window: the trained window.

    Raises:
        UnsupportedError: the module does not rotate by what the config says.
    """
    layer_type = adapter.layer_types(base, base.config)[layer]
    parameters = config_rope_parameters(base.config, layer_type)
    parameters = {key: value for key, value in parameters.items() if key not in config_formats.OF_THE_FAMILY}
    if window.factor is not None and parameters["rope_type"] in config_formats.FACTOR_IS_RATIO:
        parameters = {**parameters, "factor": window.factor}
    if window.length is not None:
        parameters = {**parameters, OPTION: window.length}
    read = config_formats.read(parameters)
    if not isinstance(read, config_formats.Specification):
        raise UnsupportedError(f"This config has different parameters for {', '.join(read)}, which do not compose.")
    options = {"scheme": read.scheme, **read.options}
    if window.length is None and OPTION not in options:
        options[OPTION] = window.maximum or 1  # its frequencies do not depend on the window
    cls, given = find_scheme(options, {}, None)
    scheme = cls(adapter.shape(base, base.config, layer), **given)
    if not isinstance(scheme, Rotary):
        raise UnsupportedError(f"{read.scheme!r} is not defined by its frequencies alone, so nothing composes with it.")
    inv_freq, factor = built_rotation(base, adapter, layer_type)
    norm = adapter.norm_after_rotation
    if norm and any(hasattr(each, norm) for each in adapter.attentions(base).values()):
        factor = 1.0
    ours, our_factor = scheme.frequencies(None)
    if not _same(ours, inv_freq):
        raise _changed(base, adapter, parameters, ours, inv_freq)
    if not math.isclose(our_factor, factor, rel_tol=1e-4):
        if "attention_factor" not in cls.option_names():
            raise UnsupportedError(
                f"The built rotary module multiplies cos and sin by {factor:.6g} and {read.scheme!r} by "
                f"{our_factor:.6g}: the config does not describe this model, so nothing composes with it."
            )
        options["attention_factor"] = factor
    return options


def built_rotation(base: PreTrainedModel, adapter: Adapter, layer_type: str | None) -> tuple[Tensor, float]:
    """Return the frequencies of a built rotary module for short sequences, and its factor on cos and sin.

    The frequencies have the shape `[rotary_dim / 2]`. The factor is measured at position zero, on a copy.
    """
    assert adapter.rotary is not None
    rotary: Any = adapter.rotary_module(base)
    if frequencies_of(rotary, layer_type)[1].is_meta:  # meta tensors have no values: build the module from its config
        rotary = type(rotary)(rotary.config)
    inv_freq = frequencies_of(rotary, layer_type)[1].detach().cpu()
    with torch.no_grad():
        origin = torch.zeros(1, 1, dtype=torch.long, device=frequencies_of(rotary, layer_type)[0].device)
        hidden = torch.zeros(1, 1, 1, 1, device=origin.device)
        output = copy.deepcopy(rotary)(hidden, origin, *([] if layer_type is None else [layer_type]))
    cos = output[0] if isinstance(output, tuple) else output.abs()
    factor = float(cos.flatten()[0])
    exact = getattr(rotary, "attention_scaling" if layer_type is None else f"{layer_type}_attention_scaling", factor)
    return inv_freq, float(exact) if math.isclose(exact, factor, rel_tol=1e-5) else factor


def _check_built(base: PreTrainedModel, adapter: Adapter, layer_type: str | None) -> None:
    """Raise if the config was changed after the rotary module was built, so that its base and window would be wrong."""
    rotary: Any = adapter.rotary_module(base)
    inv_freq = frequencies_of(rotary, layer_type)[1]
    if inv_freq.is_meta or base.config.model_type not in ADAPTERS:
        return
    rebuilt = frequencies_of(type(rotary)(copy.deepcopy(base.config)), layer_type)[1]
    if not _same(rebuilt, inv_freq):
        raise _changed(base, adapter, config_rope_parameters(base.config, layer_type), rebuilt, inv_freq)


def _same(expected: Tensor, built: Tensor) -> bool:
    tolerance = 1e-5 if built.dtype in (torch.float32, torch.float64) else 1e-2
    expected, built = expected.detach().float().cpu(), built.detach().float().cpu()
    return expected.shape == built.shape and torch.allclose(expected, built, rtol=tolerance, atol=0)


def _changed(
    base: PreTrainedModel, adapter: Adapter, parameters: dict[str, Any], expected: Tensor, built: Tensor
) -> UnsupportedError:
    module = type(adapter.rotary_module(base)).__name__
    expected, built, numbers = expected.detach().float().cpu(), built.detach().float().cpu(), ""
    if expected.shape == built.shape:
        pair = int((expected - built).abs().div(expected.clamp(min=1e-12)).argmax())
        numbers = (
            f": pair {pair} rotates by {float(built[pair]):.6g} radians per token, not by {float(expected[pair]):.6g}"
        )
    return UnsupportedError(
        f"The built {module} does not rotate by the {parameters['rope_type']!r} of the config{numbers}. The config was "
        "changed after the model was built, which does not change the model: load the model again."
    )


def check_effect(schemes: Iterable[Scheme], window: TrainedWindow) -> None:
    """Raise `NoEffectError` if a scheme over the model's scaling changes nothing.

    The check covers lengths up to the effective window, and up to twice the trained window at most.
    """
    for scheme in schemes:
        if not isinstance(scheme, FrequencyWrapper | Remapped):
            continue
        known = window.scaled_length or scheme.trained_window
        reach = min(scheme.effective_window or 2 * known, 2 * known)
        if not scheme.differs_within(reach):
            given = ", ".join(f"{key}={value}" for key, value in scheme.resolved_options.items())
            named = f"{scheme.name!r}{f' with {given}' if given else ''}"
            raise NoEffectError(
                f"{named} over the {window.rope_type!r} scaling of this model changes nothing up to {reach} tokens: "
                f"its window is {window.in_words(composed=True)}. Give a larger factor or a smaller window."
            )
