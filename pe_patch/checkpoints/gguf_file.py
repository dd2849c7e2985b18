"""Read a model from a GGUF file through Transformers, as an ordinary model with float weights.

Transformers' reader leaves out what a file says about scaled rotations and fills missing weights with random numbers.
So the header is read here too: its rotation goes into the config, and a file of which a part would be lost is refused.
"""

from __future__ import annotations

import logging
import math
import mmap
import os
import re
import struct
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from .. import compat
from ..errors import CheckpointError, UnsupportedError, quoted

logger = logging.getLogger("pe_patch")

PathLike = str | os.PathLike[str]

VERSIONS = (2, 3)
"""Versions of the format that Transformers reads."""
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""The `struct` code of each type of number."""
TEXT, ARRAY = 8, 9
"""The other two types of values."""
FLOATS = ("F32", "F16", "BF16", "F64")
"""Types of tensors that are not quantised."""
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""The constants of Llama 3's scaling, which a file leaves out: it only has the factor of each frequency."""
ROTATION = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors with factors of frequencies, which go into the config."""
SCALING_KEYS = (
    "type", "factor", "original_context_length", "attn_factor", "yarn_beta_fast", "yarn_beta_slow", "finetuned",
)  # fmt: skip
"""Keys after `rope.scaling.` that a Transformers config can express."""
NEUTRAL = {"yarn_ext_factor": 1.0, "yarn_log_multiplier": 0.0, "alpha": 0.0}
"""Further keys, with the value at which they have no effect."""
UNREAD = "yarn_attn_factor"
"""A key that llama.cpp's converter writes for YaRN and that llama.cpp reads for Grok alone."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file."""

    size: int
    """Number of weights."""
    type: str
    """GGUF's name of its type, such as Q4_1."""
    start: int
    """Its first byte in the file."""


@dataclass(frozen=True)
class Header:
    """The metadata of a file and the list of its tensors, without the weights."""

    path: str
    fields: dict[str, Any]
    """Texts and numbers by key; arrays are left out."""
    tensors: dict[str, StoredTensor]

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the family."""
        return str(self.fields.get("general.architecture"))

    @property
    def quantised(self) -> str | None:
        """The types of the quantised weights, most frequent first; None if no weight is quantised."""
        sizes: Counter[str] = Counter()
        for tensor in self.tensors.values():
            sizes[tensor.type] += tensor.size
        return ", ".join(kind for kind, _ in sizes.most_common() if kind not in FLOATS) or None

    def get(self, key: str) -> Any:
        """Return the value of a key of this architecture, or None."""
        return self.fields.get(f"{self.architecture}.{key}")

    def floats(self, name: str) -> list[float] | None:
        """Return the values of a float32 tensor, or None if there is none of this name."""
        tensor = self.tensors.get(name)
        if tensor is None:
            return None
        if tensor.type != "F32":
            raise _lost(self, f"{name} of the type {tensor.type}")
        with open(self.path, "rb") as file:
            file.seek(tensor.start)
            return list(struct.unpack(f"<{tensor.size}f", file.read(4 * tensor.size)))


def is_gguf(path: PathLike) -> bool:
    """Return whether this is the path of a GGUF file, by its name."""
    return str(path).lower().endswith(".gguf") and not Path(path).is_dir()


def read_header(path: PathLike) -> Header:
    """Read the header of a file, and check that the file is complete.

    Raises:
        MissingPackageError: the package `gguf` is not installed.
        CheckpointError: the file does not exist, is damaged or is truncated.
        UnsupportedError: the file is one part of a model, or has another version or unknown tensor types.
    """
    compat.require_extra("gguf")
    if not Path(path).is_file():
        raise CheckpointError(f"The file {path} does not exist.")
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            header = _parse(str(path), content)
    except (ArithmeticError, EOFError, KeyError, MemoryError, UnicodeDecodeError, ValueError, struct.error) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"{path} is damaged or incomplete: its header cannot be read ({reason}). Download or copy it again."
        ) from error
    if (parts := header.fields.get("split.count", 1)) > 1:
        raise UnsupportedError(
            f"{path} is one of {parts} parts of a model, and Transformers reads one file. Merge them first: "
            "llama-gguf-split --merge FIRST_PART MERGED.gguf"
        )
    return header


class _Cursor:
    """A position in the header."""

    def __init__(self, content: Any, at: int = 0) -> None:
        self.content, self.at = content, at

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self.content, self.at)
        self.at += struct.calcsize(f"<{code}")
        return value

    def text(self) -> str:
        length = self.number("Q")
        if self.at + length > len(self.content):
            raise EOFError("a text goes beyond the end of the file")
        self.at += length
        return self.content[self.at - length : self.at].decode()

    def value(self, kind: int) -> Any:
        """Return a text or a number, and None for an array."""
        if kind == TEXT:
            return self.text()
        if kind != ARRAY:
            return self.number(NUMBERS[kind])
        kind, count = self.number("I"), self.number("Q")
        if kind in NUMBERS:
            self.at += count * struct.calcsize(f"<{NUMBERS[kind]}")
            return None
        for _ in range(count):
            self.value(kind)
        return None


def _parse(path: str, content: Any) -> Header:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if content[:4] != b"GGUF":
        raise CheckpointError(f"{path} is not a GGUF file: it does not start with the letters GGUF.")
    cursor = _Cursor(content, 4)
    version, count, keys = cursor.number("I"), cursor.number("Q"), cursor.number("Q")
    if version not in VERSIONS:
        raise UnsupportedError(f"{path} has version {version} of GGUF; versions 2 and 3 can be read.")
    fields = {}
    for _ in range(keys):
        key = cursor.text()
        fields[key] = cursor.value(cursor.number("I"))
    entries = []
    for _ in range(count):
        name, dimensions = cursor.text(), cursor.number("I")
        shape = [cursor.number("Q") for _ in range(dimensions)]
        entries.append((name, shape, cursor.number("I"), cursor.number("Q")))
    alignment = fields.get("general.alignment") or 32
    data, tensors = -(-cursor.at // alignment) * alignment, {}
    for name, shape, number, offset in entries:
        if number not in list(GGMLQuantizationType):
            raise UnsupportedError(f"{path}: {quoted(name)} has the type {number}, which the package gguf cannot read.")
        kind, size = GGMLQuantizationType(number), prod(shape)
        block, block_bytes = GGML_QUANT_SIZES[kind]
        end = data + offset + size // block * block_bytes
        if end > len(content):
            raise CheckpointError(
                f"{path} is incomplete: it has {len(content):,} bytes, and {quoted(name)} ends at byte {end:,}. "
                "Download or copy it again."
            )
        tensors[name] = StoredTensor(size, kind.name, data + offset)
    if "general.architecture" not in fields:
        raise CheckpointError(f"{path} names no architecture (general.architecture).")
    return Header(path, fields, tensors)


def _location(path: PathLike) -> tuple[str, dict[str, str]]:
    """Return the folder and the keyword by which Transformers finds the file."""
    folder, name = os.path.split(os.path.abspath(path))
    return folder, {"gguf_file": name}


def read_gguf_config(path: PathLike) -> Any:
    """Return the config of the model in a file, with the window and the rotation that the file states.

    Raises:
        CheckpointError: the file is damaged or incomplete.
        UnsupportedError: Transformers cannot read this architecture, or its config cannot express the rotation.
    """
    return _config(read_header(path))


def _config(header: Header) -> Any:
    folder, name = _location(header.path)
    try:
        config = AutoConfig.from_pretrained(folder, **name)
    except Exception as error:  # the kind depends on the reader and on the checks of the family's config
        raise _unreadable(header, error) from error
    window = header.get("context_length")
    if hasattr(config, "max_position_embeddings"):
        if window is None:
            raise CheckpointError(f"{header.path} names no window ({header.architecture}.context_length).")
        config.max_position_embeddings = int(window)
    sliding = header.get("attention.sliding_window")
    if sliding and hasattr(config, "sliding_window") and getattr(config, "layer_types", None) is None:
        config.sliding_window = int(sliding)
    _set_rotation(config, header)
    config.name_or_path = header.path
    return config


def _unreadable(header: Header, error: Exception) -> UnsupportedError:
    return UnsupportedError(
        f"Transformers {transformers.__version__} cannot read {header.path}, a GGUF file of the architecture "
        f"{quoted(header.architecture)}: {error} Use the model's original folder, with safetensors."
    )


def _set_rotation(config: Any, header: Header) -> None:
    """Write base, width and scaling of the rotation into the config."""
    scaling = {"rope_type": "default"} | _scaling(header)
    parameters = getattr(config, "rope_parameters", None)
    if not parameters:
        if scaling["rope_type"] != "default":
            raise _lost(header, f"its scaled rotation ({scaling['rope_type']}), since {config.model_type} has none")
        return
    if isinstance(full := parameters.get("full_attention"), dict):  # llama.cpp scales only the layers that do not slide
        sliding = dict(parameters["sliding_attention"])
        sliding["rope_theta"] = float(header.get("rope.freq_base_swa") or sliding["rope_theta"])
        theta = header.get("rope.freq_base") or full["rope_theta"]
        config.rope_parameters = {"full_attention": _merged(full, scaling, theta), "sliding_attention": sliding}
        return
    theta = header.get("rope.freq_base") or 10000.0  # llama.cpp's default
    config.rope_parameters = _merged(parameters, scaling, theta) | _width(config, parameters, header)
    if scaling["rope_type"] == "longrope" and hasattr(config, "original_max_position_embeddings"):
        config.original_max_position_embeddings = scaling["original_max_position_embeddings"]


def _merged(parameters: dict[str, Any], scaling: dict[str, Any], theta: float) -> dict[str, Any]:
    """Return rope parameters with another scaling and base. Other values stay if the type stays."""
    if scaling["rope_type"] != parameters.get("rope_type"):
        parameters = {key: value for key, value in parameters.items() if key == "partial_rotary_factor"}
    return {**parameters, **scaling, "rope_theta": float(theta)}


def _width(config: Any, parameters: dict[str, Any], header: Header) -> dict[str, Any]:
    """Return the `partial_rotary_factor` that the file's number of rotating dimensions asks for."""
    width = header.get("rope.dimension_count")
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if not width or width == getattr(config, "rotary_dim", int(head * parameters.get("partial_rotary_factor", 1.0))):
        return {}
    if "partial_rotary_factor" not in parameters:
        raise _lost(header, f"that {width} of the {head} dimensions of a head rotate")
    return {"partial_rotary_factor": width / head}


def _scaling(header: Header) -> dict[str, Any]:
    """Return the rope parameters of the file's scaling; empty without one.

    Raises:
        UnsupportedError: a config cannot express the scaling.
    """
    prefix = f"{header.architecture}.rope.scaling."
    facts = {key.removeprefix(prefix): value for key, value in header.fields.items() if key.startswith(prefix)}
    facts = {key: value for key, value in facts.items() if key != UNREAD and NEUTRAL.get(key) != value}
    if strange := sorted(facts.keys() - {*SCALING_KEYS}):
        raise _lost(header, f"{prefix}{strange[0]}={quoted(facts[strange[0]])}")
    kind = facts.get("type", "linear")  # as in llama.cpp
    factor = float(facts.get("factor") or header.get("rope.scale_linear") or 1)
    original = int(facts.get("original_context_length") or header.get("context_length") or 0)
    attention = float(facts.get("attn_factor") or 1)
    if (factors := header.floats("rope_freqs.weight")) and any(value != 1 for value in factors):
        if factor != 1:
            raise _lost(header, "two scalings of its rotation (rope_freqs.weight and rope.scaling.factor)")
        return _llama3(header, factors)
    long, short = (header.floats(f"rope_factors_{which}.weight") for which in ("long", "short"))
    if long and short:
        values = {"rope_type": "longrope", "long_factor": long, "short_factor": short}
        values |= {"original_max_position_embeddings": original}
        return values | ({"attention_factor": attention} if "attn_factor" in facts else {})
    if kind == "none" or factor == 1:
        return {}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise _lost(header, f"the scaling {quoted(kind)} of its rotation")
    values = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    betas = {beta: float(facts[f"yarn_{beta}"]) for beta in ("beta_fast", "beta_slow") if f"yarn_{beta}" in facts}
    if attention != 1:  # llama.cpp multiplies YaRN's factor by it
        values["attention_factor"] = attention * (1 + 0.1 * math.log(factor))
    return values | betas


def _llama3(header: Header, factors: list[float]) -> dict[str, Any]:
    """Return Llama 3's scaling if it gives these factors of the wavelengths, one for each frequency."""
    values = {"rope_type": "llama3", "factor": max(factors), **LLAMA3}
    theta = float(header.get("rope.freq_base") or 10000.0)
    exponents = torch.arange(len(factors), dtype=torch.float64) / len(factors)
    turns = LLAMA3["original_max_position_embeddings"] / (2 * math.pi * theta**exponents)
    low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    expected = 1 / ((1 - smooth) / values["factor"] + smooth)
    if not torch.allclose(expected, torch.tensor(factors, dtype=torch.float64), rtol=1e-3):
        raise _lost(header, "the factors of its frequencies (rope_freqs.weight), which are not those of Llama 3")
    return values


def _lost(header: Header, what: str) -> UnsupportedError:
    return UnsupportedError(
        f"{header.path} cannot be read without a loss: Transformers' config of {quoted(header.architecture)} cannot "
        f"express {what}. Use the model's original folder, with safetensors."
    )


def build_empty_gguf(path: PathLike) -> Any:
    """Build the causal language model of a file on the meta device, without weights."""
    header = read_header(path)
    config = _config(header)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.dequantised = header.quantised
    return model


def load_gguf(path: PathLike, auto_class: Any, **from_pretrained_kwargs: Any) -> Any:
    """Load a file as a model with float weights, which can be patched, trained and saved like any other.

    The attribute `dequantised` of the model is the type that its weights had, such as Q4_1, or None.

    Args:
        path: the file.
        auto_class: the auto class that builds the model.
        **from_pretrained_kwargs: passed to its `from_pretrained`.

    Raises:
        CheckpointError: the file is damaged, or lacks weights of the model.
        UnsupportedError: Transformers cannot read this architecture, or would leave out a part of the model.
    """
    if from_pretrained_kwargs.get("quantization_config") is not None:
        raise UnsupportedError(
            f"{path} was quantised before, and cannot be quantised again while it is loaded. Leave the quantization "
            "out, or give the model's original folder, with safetensors."
        )
    header = read_header(path)
    config, (folder, name) = _config(header), _location(path)
    from_pretrained_kwargs.pop("use_safetensors", None)
    options = {**compat.gguf_options(), **from_pretrained_kwargs}
    try:
        model, report = auto_class.from_pretrained(folder, config=config, output_loading_info=True, **name, **options)
    except Exception as error:  # as for the config
        raise _unreadable(header, error) from error
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(f"{path} lacks {missing[0]!r} and {len(missing) - 1} more weights of its model.")
    _check_all_taken(header, model)
    compat.forget_quantizer(model)
    model.name_or_path = model.config.name_or_path = str(path)
    model.dequantised = header.quantised
    if header.quantised:
        logger.warning("The weights of %s were quantised (%s); here they are floats.", path, header.quantised)
    return model


def _check_all_taken(header: Header, model: Any) -> None:
    """Raise `UnsupportedError` if the file has more weights than the model took from it."""
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", math.inf)
    stored = 0
    for name, tensor in header.tensors.items():
        block = re.match(r"blk\.(\d+)\.", name)
        beyond = block is not None and int(block[1]) >= layers  # layers that predict further tokens
        repeated = name == "output.weight" and model.config.tie_word_embeddings
        if not (beyond or repeated or name in ROTATION or name.endswith("attn_rot_embd.weight")):
            stored += tensor.size
    taken = sum(parameter.numel() for parameter in model.parameters())
    if stored > taken:
        raise _lost(header, f"{stored - taken:,} of its {stored:,} weights")


def load_gguf_tokenizer(path: PathLike) -> Any:
    """Load the tokenizer of a file."""
    header = read_header(path)
    folder, name = _location(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **name)
    except Exception as error:  # the kind depends on the reader
        raise _unreadable(header, error) from error
    tokenizer.name_or_path = str(path)
    return tokenizer
