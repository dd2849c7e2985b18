"""Check the files beside the config: lengths of tokenizer and generation, and frequencies among the weights."""

from __future__ import annotations

from collections.abc import Iterator

from safetensors import SafetensorError, safe_open

from .examined import ExaminedModel
from .finding import Finding

LOW = {"BF16": "bfloat16", "F16": "float16", "F8_E4M3": "float8", "F8_E5M2": "float8"}


def check_files(examined: ExaminedModel) -> list[Finding]:
    """Return the findings in the files beside the config; of the weights, read only names and dtypes."""
    return [*_tokenizer(examined), *_generation(examined), *_weights(examined)]


def _tokenizer(examined: ExaminedModel) -> Iterator[Finding]:
    window = examined.window
    settings = examined.files.get("tokenizer_config.json", {})
    longest = settings.get("model_max_length")
    if isinstance(longest, int | float) and 0 < longest < window:
        yield Finding(
            "tokenizer_window", "warning", "tokenizer_config.json: model_max_length",
            f"max_position_embeddings={window}",
            f"truncation=True cuts longer texts at {longest} tokens; otherwise the tokenizer warns",
            f'Write "model_max_length": {window}.',
        )  # fmt: skip
    truncation = examined.files.get("tokenizer.json", {}).get("truncation")
    if isinstance(truncation, dict) and int(truncation.get("max_length") or 0) < window:
        yield Finding(
            "tokenizer_window", "warning", "tokenizer.json: truncation", f"max_position_embeddings={window}",
            f"the tokenizers library and servers that use it cut every text at {truncation.get('max_length')} tokens; "
            "Transformers does not",
            'Write "truncation": null.',
        )  # fmt: skip
    for key in ("truncation", "truncation_strategy", "max_length"):
        if settings.get(key) not in (None, False, "do_not_truncate"):
            yield Finding(
                "tokenizer_window", "note", f"tokenizer_config.json: {key}", f"{key}={settings[key]!r}",
                "Transformers ignores it; another tool may truncate", f"Remove {key}.",
            )  # fmt: skip


def _generation(examined: ExaminedModel) -> Iterator[Finding]:
    longest, window = examined.files.get("generation_config.json", {}).get("max_length"), examined.window
    if isinstance(longest, int) and 0 < window < longest:
        yield Finding(
            "generation_window", "warning", "generation_config.json: max_length", f"max_length={longest}",
            f"generate() may run past the window of {window} tokens", f'Write "max_length": {window}.',
        )  # fmt: skip
    elif isinstance(longest, int) and 20 < longest < window:
        yield Finding(
            "generation_window", "note", "generation_config.json: max_length", f"a window of {window} tokens",
            f"generate() without max_new_tokens stops at {longest}", f'Write "max_length": {window}, or remove it.',
        )  # fmt: skip


def _weights(examined: ExaminedModel) -> Iterator[Finding]:
    stored: dict[str, list[str]] = {}
    for file in sorted(examined.folder.glob("*.safetensors")) if examined.folder else ():
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():
                    if name.endswith("inv_freq") and (dtype := tensors.get_slice(name).get_dtype()) in LOW:
                        stored.setdefault(dtype, []).append(f"{file.name}: {name}")
        except SafetensorError as error:
            yield Finding(
                "weights_damaged", "error", file.name, "weights in safetensors", f"cannot be read: {error}",
                "Download or save the file again.",
            )  # fmt: skip
    for dtype, names in stored.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield Finding(
            "low_precision", "warning", names[0] + more, f"frequencies stored in {LOW[dtype]}",
            "Transformers 5 computes them in float32 and does not read these; older versions and other tools use them",
            "Remove these tensors; the config determines them.",
        )  # fmt: skip
