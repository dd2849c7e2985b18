"""What stands beside the config: the tokenizer's lengths, those of generation, and frequencies among the weights."""

from __future__ import annotations

from collections.abc import Iterator

from safetensors import SafetensorError, safe_open

from .finding import Finding
from .subject import Subject

LOW = {"BF16": "bfloat16", "F16": "float16", "F8_E4M3": "float8", "F8_E5M2": "float8"}


def check_files(subject: Subject) -> list[Finding]:
    """All findings in files beside the config; weights are not loaded, only their names and types are read."""
    return [*_tokenizer(subject), *_generation(subject), *_weights(subject)]


def _tokenizer(subject: Subject) -> Iterator[Finding]:
    window = subject.window
    settings = subject.files.get("tokenizer_config.json", {})
    longest = settings.get("model_max_length")
    if isinstance(longest, int | float) and 0 < longest < window:
        yield Finding(
            "tokenizer_window", "warning", "tokenizer_config.json: model_max_length",
            f"max_position_embeddings={window}",
            f"longer texts are cut at {longest} tokens where truncation=True, and warned of elsewhere",
            f'Write "model_max_length": {window}.',
        )  # fmt: skip
    truncation = subject.files.get("tokenizer.json", {}).get("truncation")
    if isinstance(truncation, dict) and int(truncation.get("max_length") or 0) < window:
        yield Finding(
            "tokenizer_window", "warning", "tokenizer.json: truncation", f"max_position_embeddings={window}",
            f"the tokenizers library, and servers on it, cut every text at {truncation.get('max_length')} tokens; "
            "Transformers does not",
            'Write "truncation": null.',
        )  # fmt: skip
    for key in ("truncation", "truncation_strategy", "max_length"):
        if settings.get(key) not in (None, False, "do_not_truncate"):
            yield Finding(
                "tokenizer_window", "note", f"tokenizer_config.json: {key}", f"{key}={settings[key]!r}",
                "Transformers does not truncate by it; another tool may", f"Remove {key}.",
            )  # fmt: skip


def _generation(subject: Subject) -> Iterator[Finding]:
    longest, window = subject.files.get("generation_config.json", {}).get("max_length"), subject.window
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


def _weights(subject: Subject) -> Iterator[Finding]:
    stored: dict[str, list[str]] = {}
    for file in sorted(subject.folder.glob("*.safetensors")) if subject.folder else ():
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
            "Transformers 5 makes its own in float32 and does not read these; older and other tools turn by them",
            "Remove the tensors, which follow from the config.",
        )  # fmt: skip
