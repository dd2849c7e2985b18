"""Record in a PEFT adapter the scheme that it was trained under, and check that a model has the same scheme.

The record is part of the adapter's `adapter_config.json`, whose `peft_type` becomes `TYPE`. PEFT, which would load the
adapter into a model without the scheme, does not know this type and raises a `KeyError` that quotes it. This module
never imports PEFT.
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

from .. import compat
from ..errors import CheckpointError, MismatchError, OptionError, PePatchError
from .config import write_json
from .record import RECORD_KEY, check_scheme
from .targets import unwrap

logger = logging.getLogger("pe_patch")

TYPE = "PE_PATCH: load this adapter with pe_patch.load_adapter(model, path) or pe_patch.load_patched(path)"
"""The `peft_type` of an adapter that only works under a scheme. PEFT's error quotes it, so it names the remedy."""
CONFIG, TENSORS = "adapter_config.json", "position_schemes.safetensors"
"""Files of an adapter: its config, and the weights of the scheme."""
FINGERPRINTED = ("scheme", "options", "layers", "submodule", "keep_native")
OPTION_PREFIX, NATIVE_PREFIX = "option ", "own "
"""Prefixes of keys in a fingerprint. They enter the digests of saved adapters, so they must not change."""
LEFT_OUT = ("keep_original",)
"""Options that do not affect logits."""
HUB = ("subfolder", "revision", "token", "cache_dir", "local_files_only", "force_download")


def record_on(model: Any) -> dict[str, Any] | None:
    """Return the record of the scheme in a model's config, or None.

    It is there for a patched model, and for a model that was saved with native parameters of its scheme.
    """
    return getattr(unwrap(model).config, RECORD_KEY, None)


def scheme_modules(model: Any) -> nn.Module | None:
    """Return the module that holds the schemes of a patched model, or None without a patch."""
    bases = (module for module in unwrap(model).modules() if "pe_patch" in module.__dict__)
    base = next(bases, None)
    return None if base is None else base.get_submodule("position_schemes.scheme")


def train_scheme(model: Any) -> list[str]:
    """Unfreeze the scheme's weights, which PEFT freezes with the rest of the model, and return their names.

    Call this after the last adapter was added, since PEFT freezes all other weights with each adapter. The weights are
    saved and loaded with the adapter.

    Args:
        model: a patched model with a PEFT adapter.

    Raises:
        PePatchError: the model is not patched.
        OptionError: its scheme has no weights.
    """
    modules = scheme_modules(model)
    if modules is None:
        raise PePatchError("This model carries no patch, so there are no weights of a scheme to train.")
    named = dict(modules.named_parameters())
    if not named:
        record = record_on(model) or {}
        raise OptionError(f"{record.get('scheme')!r} has no weights to train.")
    for parameter in named.values():
        parameter.requires_grad_(True)
    return list(named)


def fingerprint(record: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a record on which logits depend, as a flat dict.

    They are the scheme, its options, the layers and the native rotation of the base model.
    """
    flat: dict[str, Any] = {key: record[key] for key in FINGERPRINTED if record.get(key) not in (None, False)}
    options = flat.pop("options", {})
    flat |= {OPTION_PREFIX + key: value for key, value in options.items() if key not in LEFT_OUT}
    for key, value in ((record.get("native") or {}).get("rope_parameters") or {}).items():
        flat[NATIVE_PREFIX + key] = value
    return {key: _plain(value) for key, value in flat.items() if value is not None}


def _plain(value: Any) -> Any:
    """Return the value with every number as a float, so that 8 and 8.0 are equal."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def digest(record: dict[str, Any]) -> str:
    """Return the SHA-256 of a record's fingerprint, in hexadecimal."""
    return hashlib.sha256(json.dumps(fingerprint(record), sort_keys=True).encode()).hexdigest()


def format_record(record: dict[str, Any]) -> str:
    """Return a record in words, for example `yarn(factor=8)`."""
    options = [f"{key}={value}" for key, value in record["options"].items() if not isinstance(value, list | dict)]
    rest = [f"{key}={record[key]}" for key in FINGERPRINTED[2:] if record.get(key)]
    return f"{record['scheme']}({', '.join(options + rest)})"


def read_record(source: Any, **hub: Any) -> dict[str, Any] | None:
    """Return the record in an adapter's folder or hub repository, or None if it has none.

    Args:
        source: the folder, or the name of a repository on the hub.
        **hub: `revision`, `token` and other options of a download; unknown ones are ignored.

    Raises:
        CheckpointError: the record is damaged, or newer than this version can read.
    """
    return checked(adapter_fields(source, **hub).get(RECORD_KEY), source)


def adapter_fields(source: Any, **hub: Any) -> dict[str, Any]:
    """Return the content of an adapter's `adapter_config.json` with its record, or an empty dict without a file.

    Args:
        source: the folder, or the name of a repository on the hub.
        **hub: as for `read_record`.

    Raises:
        CheckpointError: the file is not a JSON object.
    """
    file = _file(source, CONFIG, hub)
    if file is None:
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds {content!r}, not the object that an adapter's config is.")
    return content


def checked(record: Any, source: Any) -> dict[str, Any] | None:
    """Return a record from an adapter's config after a check; None stays None.

    Raises:
        CheckpointError: the record is damaged or was changed by hand.
    """
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
    if (actual := digest(record)) != record["digest"]:
        raise CheckpointError(
            f"{file}: the record of the scheme, {format_record(record)}, was changed by hand: its digest is "
            f"{actual[:12]}..., not {record['digest'][:12]}... Restore the file as it was saved."
        )
    return record


def check_compatible(record: dict[str, Any] | None, model: Any, source: Any | None) -> None:
    """Check that a model has the scheme that an adapter was trained under.

    An adapter without a record is accepted, with a warning if the model has a scheme: adapters of the original model
    can work under a scheme that needs no training.

    Args:
        record: the record of the adapter, or None.
        model: the model that loads it.
        source: the folder or repository of the adapter; None if unknown.

    Raises:
        MismatchError: the model has another scheme, or another native rotation.
    """
    current = record_on(model)
    if record is None:
        if current is not None:
            logger.warning(
                "%s has no record of a scheme, so it was probably trained on the original model; here it runs "
                "under %s.", source, format_record(current),
            )  # fmt: skip
        return
    adapter = "This adapter" if source is None else f"The adapter {source}"
    build = (
        f"pe_patch.load_patched({'its folder' if source is None else repr(str(source))}) builds the model that it needs"
    )
    patch = f"pe_patch.patch_model(model, {record['scheme']!r}, ...) with those options makes this one fit"
    if current is None:
        raise MismatchError(
            f"{adapter} was trained under {format_record(record)}, and this model is not patched. {build}; {patch}."
        )
    theirs, ours = fingerprint(record), fingerprint(current)
    apart = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
    if not apart:
        return
    named = ", ".join(f"{_named(key)} {theirs.get(key)} against {ours.get(key)}" for key in apart[:3])
    if all(key.startswith(NATIVE_PREFIX) for key in apart):
        patch = "this is another base model, and no patch makes it fit"
    else:
        patch = f"after pe_patch.unpatch_model(model), {patch}"
    raise MismatchError(
        f"{adapter} was trained under {format_record(record)}, and this model has {format_record(current)} "
        f"({named}). {build}; {patch}."
    )


def _named(key: str) -> str:
    """Return a key of a fingerprint in words."""
    return (
        f"the model's own {key.removeprefix(NATIVE_PREFIX)}"
        if key.startswith(NATIVE_PREFIX)
        else key.removeprefix(OPTION_PREFIX)
    )


def write_record(model: Any, folder: Path, state_dict: dict[str, Any] | None = None) -> None:
    """Write the record and the weights of the scheme into the folder of an adapter that was just saved.

    Args:
        model: the model that was saved.
        folder: the folder of the adapter.
        state_dict: gathered weights, if the model only holds shards; else None.
    """
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
    """Return the weights of the schemes, from the gathered `state_dict` if the model only holds shards."""
    if modules is None:
        return {}
    weights = modules.state_dict()
    gathered = {key.rpartition("position_schemes.scheme.")[2]: value for key, value in (state_dict or {}).items()}
    return {name: gathered.get(name, weight).detach().contiguous() for name, weight in weights.items()}


class SchemeWeights:
    """The weights of the scheme in an adapter, checked by the constructor and loaded by `load`.

    Args:
        model: the model that loads the adapter.
        record: the record of the adapter, or None.
        source: its folder or repository.
        others: the model has other adapters.
        **hub: as for `read_record`.

    Raises:
        MismatchError: the weights do not fit the model's scheme, or another adapter brought different ones.
        CheckpointError: the adapter lacks the weights of its scheme.
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
                f"{source} has other weights for the scheme than the adapter that is already loaded, and a model has "
                "only one set of them: load it into a separate model, or merge one of the two adapters."
            )

    def load(self, trainable: bool) -> None:
        """Copy the weights into the model's schemes; with `trainable`, unfreeze those that were trained."""
        if self.modules is None or not self.weights:
            return
        self.modules.load_state_dict(self.weights)
        for name, parameter in self.modules.named_parameters():
            if trainable and name in self.trained:
                parameter.requires_grad_(True)


def _file(source: Any, name: str, hub: dict[str, Any]) -> Path | None:
    """Return the path of a file in an adapter's folder or repository, or None if there is no such file."""
    options = {key: hub[key] for key in HUB if hub.get(key) is not None}
    path = compat.find_file(str(source), name, gated=False, **options)
    return None if path is None else Path(path)
