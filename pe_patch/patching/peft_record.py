"""What a PEFT adapter says about the positions it was trained under, and whether a model fits that.

It stands in the adapter's `adapter_config.json`, whose `peft_type` becomes `PE_PATCH`: plain PEFT, which would put the
adapter on a model without the scheme, knows no such type and raises. PEFT itself is never imported here.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils.hub import cached_file

from ..errors import CheckpointError, MismatchError, OptionError, PePatchError
from .config import write_json
from .record import RECORD_KEY, check_scheme
from .targets import unwrap

logger = logging.getLogger("pe_patch")

TYPE = "PE_PATCH"
"""The `peft_type` of an adapter that only works under a scheme."""
CONFIG, TENSORS = "adapter_config.json", "position_schemes.safetensors"
MATTERS = ("scheme", "options", "layers", "submodule", "keep_native")
OPTION, OWN = "option ", "own "
LEFT_OUT = ("keep_original",)
"""Options that change nothing that is computed."""
HUB = ("subfolder", "revision", "token", "cache_dir", "local_files_only", "force_download")


def record_on(model: Any) -> dict[str, Any] | None:
    """The record of the scheme a model stands under: its patch, or the native parameters that a patch was saved as."""
    return getattr(unwrap(model).config, RECORD_KEY, None)


def scheme_modules(model: Any) -> nn.Module | None:
    """The schemes of a patched model, for the weights they may have."""
    bases = (module for module in unwrap(model).modules() if "pe_patch" in module.__dict__)
    base = next(bases, None)
    return None if base is None else base.get_submodule("position_schemes.scheme")


def train_scheme(model: Any) -> list[str]:
    """Let the scheme's own weights train beside an adapter, which PEFT has frozen with the rest of the model.

    To be called once the last adapter is on, since PEFT freezes all else with each. The weights are saved with the
    adapter and come back with it. Returns their names.

    Raises:
        PePatchError: where the model carries no patch.
        OptionError: where its scheme has no weights.
    """
    modules = scheme_modules(model)
    if modules is None:
        raise PePatchError("This model carries no patch, so there are no weights of a scheme to train.")
    named = dict(modules.named_parameters())
    if not named:
        raise OptionError(f"{record_on(model)['scheme']!r} has no weights of its own to train.")  # type: ignore[index]
    for parameter in named.values():
        parameter.requires_grad_(True)
    return list(named)


def matter(record: dict[str, Any]) -> dict[str, Any]:
    """The part of a record on which logits depend, flat: scheme, options, layers and the base's own rotation."""
    flat: dict[str, Any] = {key: record[key] for key in MATTERS if record.get(key) not in (None, False)}
    options = flat.pop("options", {})
    flat |= {OPTION + key: value for key, value in options.items() if key not in LEFT_OUT}
    for key, value in ((record.get("native") or {}).get("rope_parameters") or {}).items():
        flat[OWN + key] = value
    return {key: _plain(value) for key, value in flat.items() if value is not None}


def _plain(value: Any) -> Any:
    """The same with every number a float, so that 8 and 8.0 are one."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def digest(record: dict[str, Any]) -> str:
    """SHA-256 of what matters in a record, in hexadecimal."""
    return hashlib.sha256(json.dumps(matter(record), sort_keys=True).encode()).hexdigest()


def told(record: dict[str, Any]) -> str:
    """`yarn(factor=8)`."""
    options = [f"{key}={value}" for key, value in record["options"].items() if not isinstance(value, list | dict)]
    rest = [f"{key}={record[key]}" for key in MATTERS[2:] if record.get(key)]
    return f"{record['scheme']}({', '.join(options + rest)})"


def read_record(source: Any, **hub: Any) -> dict[str, Any] | None:
    """The record in an adapter's folder or hub repository, or None where it carries none.

    Raises:
        CheckpointError: where the record is damaged, or of a later version than this one reads.
    """
    file = _file(source, CONFIG, hub)
    if file is None:
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds {content!r}, not the object that an adapter's config is.")
    return checked(content.get(RECORD_KEY), source)


def checked(record: Any, source: Any) -> dict[str, Any] | None:
    """A record as it was found in an adapter's config, or a clear error."""
    if record is None:
        return None
    file = f"{source}/{CONFIG}"
    check_scheme(record, file)
    for key, kind, words in (
        ("digest", str, "the digest of what logits depend on"),
        ("peft_type", str, "the kind of adapter"),
        ("trained", list, "a list of names of weights"),
        ("native", dict, "an object with the values that the config had before the patch"),
    ):
        if not isinstance(record.get(key), kind) and (key in record or key in ("digest", "peft_type")):
            raise CheckpointError(
                f"{file}: the record of the scheme is damaged: {RECORD_KEY}.{key} is {record.get(key)!r}; expected "
                f"{words}. Save the adapter again, or restore the file as it was saved."
            )
    if (found := digest(record)) != record["digest"]:
        raise CheckpointError(
            f"{file}: the record of the scheme, {told(record)}, was changed by hand: its digest is {found[:12]}..., "
            f"not {record['digest'][:12]}... Restore the file as it was saved."
        )
    return record


def require(record: dict[str, Any] | None, model: Any, source: Any | None) -> None:
    """Raise `MismatchError` unless the model stands under the scheme that the adapter was trained under.

    `source` is where the adapter came from, where that is known.
    An adapter without a record is taken, with a warning where the model carries a scheme: a scheme that needs no
    training goes with adapters of the original model.
    """
    current = record_on(model)
    if record is None:
        if current is not None:
            logger.warning(
                "%s says nothing about positions, so it was probably trained on the original model; here it runs "
                "under %s.", source, told(current),
            )  # fmt: skip
        return
    adapter = "This adapter" if source is None else f"The adapter {source}"
    build = (
        f"pe_patch.load_patched({'its folder' if source is None else repr(str(source))}) builds the model that it needs"
    )
    patch = f"pe_patch.patch_model(model, {record['scheme']!r}, ...) with those options makes this one fit"
    if current is None:
        raise MismatchError(
            f"{adapter} was trained under {told(record)}, and this model is not patched. {build}; {patch}."
        )
    theirs, ours = matter(record), matter(current)
    apart = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
    if not apart:
        return
    named = ", ".join(f"{_named(key)} {theirs.get(key)} against {ours.get(key)}" for key in apart[:3])
    if all(key.startswith(OWN) for key in apart):
        patch = "this is another base model, which no patch makes fit"
    else:
        patch = f"after pe_patch.unpatch_model(model), {patch}"
    raise MismatchError(
        f"{adapter} was trained under {told(record)}, and this model stands under {told(current)} "
        f"({named}). {build}; {patch}."
    )


def _named(key: str) -> str:
    return f"the model's own {key.removeprefix(OWN)}" if key.startswith(OWN) else key.removeprefix(OPTION)


def write_record(model: Any, folder: Path, state_dict: dict[str, Any] | None = None) -> None:
    """Put the record, and the weights of the scheme, beside an adapter that was just saved."""
    tensors = folder / TENSORS
    tensors.unlink(missing_ok=True)
    current, file = record_on(model), folder / CONFIG
    if current is None or not file.exists():
        return
    config, modules = json.loads(file.read_text(encoding="utf-8")), scheme_modules(model)
    trained = [] if modules is None else [name for name, weight in modules.named_parameters() if weight.requires_grad]
    weights = _weights(modules, state_dict)
    if weights:
        save_file(weights, tensors, metadata={"format": "pt"})
    record = {**current, "peft_type": config["peft_type"], "trained": trained}
    write_json(file, {**config, "peft_type": TYPE, RECORD_KEY: {**record, "digest": digest(record)}})


def _weights(modules: nn.Module | None, state_dict: dict[str, Any] | None) -> dict[str, Tensor]:
    """The weights of the schemes, from the gathered ones where the model itself holds only shards."""
    if modules is None:
        return {}
    weights = modules.state_dict()
    gathered = {key.rpartition("position_schemes.scheme.")[2]: value for key, value in (state_dict or {}).items()}
    return {name: gathered.get(name, weight).detach().contiguous() for name, weight in weights.items()}


class SchemeWeights:
    """The weights that an adapter brings for the scheme; checked when made, put in place by `load`.

    Raises:
        MismatchError: where the model's scheme has other weights, or holds those that another adapter brought.
        CheckpointError: where the adapter lacks the weights that its scheme has.
    """

    def __init__(self, model: Any, record: dict[str, Any] | None, source: Any, others: bool, **hub: Any) -> None:
        self.modules = scheme_modules(model) if record is not None else None
        current = {} if self.modules is None else self.modules.state_dict()
        file = _file(source, TENSORS, hub) if record is not None else None
        try:
            self.weights = {} if file is None else load_file(file)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}, the weights of the scheme, is damaged or cut short: {error}.") from error
        self.trained = [] if record is None else record.get("trained", [])
        if record is not None and current and not self.weights:
            raise CheckpointError(f"{source} lacks {TENSORS}, the weights of the scheme {record['scheme']!r}.")
        if {name: weight.shape for name, weight in self.weights.items()} != {n: w.shape for n, w in current.items()}:
            raise MismatchError(f"The scheme's weights in {source} do not fit those of this model's scheme.")
        same = all(weight.to(current[name]).equal(current[name]) for name, weight in self.weights.items())
        if others and not same:
            raise MismatchError(
                f"{source} brings other weights for the scheme than the adapter that is here already, and a model "
                "has one set of them: load it on a model of its own, or merge one of the two."
            )

    def load(self, trainable: bool) -> None:
        if self.modules is None or not self.weights:
            return
        self.modules.load_state_dict(self.weights)
        for name, parameter in self.modules.named_parameters():
            if trainable and name in self.trained:
                parameter.requires_grad_(True)


def _file(source: Any, name: str, hub: dict[str, Any]) -> Path | None:
    """A file of an adapter's folder or repository, or None."""
    options = {key: hub[key] for key in HUB if hub.get(key) is not None}
    found = cached_file(
        str(source),
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False,
        **options,
    )
    return None if found is None else Path(found)
