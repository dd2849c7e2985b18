"""Text that is tokenised once, and found again on disk by its content."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ...data.text import Split, fingerprint, iter_documents
from ..recipe import Data, Phase, RecipeError
from .corpus import FACTS, OFFSETS, TOKENS, Corpus, StoredCorpus, tokenised

FORMAT = 1
"""Of the files, and of what `tokenised` and the split make of a text: a change of either must raise it."""

Corpora = Mapping[tuple[str | None, str | None], Corpus]
"""What the sources of mixtures read, by their `source` and `text_column`; (None, None) is `data.source` itself."""


def load_corpora(
    data: Data, phases: Sequence[Phase], tokenizer: Any, *, split: Split = "train", progress: bool = True
) -> Corpora:
    """The tokenised text of every source that the phases' mixtures read; `data.limit` holds for each.

    Every process may call this at the same time: one of those that share a disk tokenises, the others wait for it.
    """
    wanted = {(source.source, source.text_column) for phase in phases for source in phase.mixture.values()}
    found: dict[tuple[str, str], Corpus] = {}
    for source, column in wanted:
        place = (source or data.source, column or data.text_column)
        if place not in found:
            found[place] = open_store(
                place[0], tokenizer, split=split, text_column=place[1], limit=data.limit, streaming=data.streaming,
                cache=data.cache, progress=progress,
            )  # fmt: skip
    return {key: found[key[0] or data.source, key[1] or data.text_column] for key in wanted}


def open_store(
    source: str,
    tokenizer: Any,
    *,
    split: Split | None = "train",
    text_column: str = "text",
    limit: int | None = None,
    streaming: bool = False,
    cache: str | Path | None = None,
    progress: bool = False,
) -> StoredCorpus:
    """The tokens of a source of text, from the cache or, where it has no such text or tokenizer, tokenised now.

    `source` to `streaming` are those of `pe_patch.data.text.iter_documents`; `cache` is a folder, null for
    `$XDG_CACHE_HOME/pe_patch` or `~/.cache/pe_patch`. An entry is built beside its place and then renamed, so that it
    is whole or not there. A folder that cannot be written raises `RecipeError`, a source that cannot be read
    `TextSourceError`.
    """
    told: dict[str, Any] = {"split": split, "text_column": text_column, "limit": limit}
    parts = (str(FORMAT), fingerprint(source, **told), tokenizer_hash(tokenizer))
    folder = cache_folder(cache) / hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    if not folder.exists():
        with _locked(folder):
            if not folder.exists():  # another process may have been faster
                texts = iter_documents(source, **told, streaming=streaming)
                _build(folder, texts, tokenizer, {"source": source, **told}, progress)
    return StoredCorpus(folder, source)


def cache_folder(cache: str | Path | None) -> Path:
    """Where tokens are kept."""
    if cache is not None:
        return Path(cache).expanduser() / "tokens"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pe_patch" / "tokens"


def tokenizer_hash(tokenizer: Any) -> str:
    """A hash of everything that decides which ids a text becomes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        own = json.loads(backend.to_str())
        # Set by each call for itself, and left there.
        parts = [json.dumps({key: value for key, value in own.items() if key not in ("truncation", "padding")})]
    else:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            parts = [f"{path.name} {path.read_bytes().hex()}" for path in sorted(Path(folder).rglob("*.*"))]
    # Start and end tokens may be added by Python code, which no file tells.
    probe = tokenizer("a")["input_ids"]
    parts += [type(tokenizer).__qualname__, repr(probe), repr(tokenizer.eos_token_id)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _locked(folder: Path) -> Any:
    """The only process on this entry; the system takes the lock from a process that dies."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(f"{folder}.lock").acquire()
    except OSError as error:
        raise _unwritable(folder.parent, error) from error


def _unwritable(folder: Path, error: OSError) -> RecipeError:
    return RecipeError(f"Tokenised text cannot be kept in {folder} ({error}). Name another folder with data.cache.")


def _build(folder: Path, texts: Iterator[str], tokenizer: Any, facts: dict[str, Any], progress: bool) -> None:
    """Tokenise into a folder beside `folder`, and give it its name once it is complete. The lock is held."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    try:
        partial.mkdir()
        with (partial / TOKENS).open("wb") as tokens, _bar(facts["source"], progress) as advance:
            offsets = array("q", [0])
            for batch in tokenised(texts, tokenizer):
                for ids in batch:
                    tokens.write(ids.tobytes())
                    offsets.append(offsets[-1] + len(ids))
                advance(len(offsets) - 1, offsets[-1])
            if not offsets[-1]:
                raise RecipeError(f"{facts['source']}: its {len(offsets) - 1:,} documents have no token.")
            _synchronise(tokens)
        with (partial / OFFSETS).open("wb") as file:
            offsets.tofile(file)
            _synchronise(file)
        known = {"format": FORMAT, **facts, "documents": len(offsets) - 1, "tokens": offsets[-1]}
        (partial / FACTS).write_text(json.dumps(known, indent=1), encoding="utf-8")
        partial.rename(folder)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise _unwritable(folder.parent, error) from error
        raise


def _synchronise(file: BinaryIO) -> None:
    """Have the bytes on the disk before the folder gets its name."""
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def _bar(source: str, shown: bool) -> Iterator[Any]:
    """A line that tells documents, tokens and tokens per second."""
    started = time.perf_counter()
    with Progress(
        SpinnerColumn(),
        TimeElapsedColumn(),
        TextColumn(  # the source comes last, where a narrow terminal cuts
            "{task.fields[documents]:,} documents, {task.completed:,} tokens, {task.fields[speed]:,.0f} tokens/s: "
            "tokenising {task.description}"
        ),
        console=Console(stderr=True),
        disable=not shown,
    ) as bar:
        task = bar.add_task(source, total=None, documents=0, speed=0)
        yield lambda documents, tokens: bar.update(
            task, documents=documents, completed=tokens, speed=tokens / (time.perf_counter() - started)
        )
