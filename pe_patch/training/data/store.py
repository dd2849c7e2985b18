"""Tokenise text once and cache it on disk by its content."""

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
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ...data.text import Skipped, Split, fingerprint_of, iter_documents, manifest
from ..recipe import Data, Phase, RecipeError
from .corpus import FACTS, OFFSETS, TOKENS, Corpus, StoredCorpus, Tokeniser

FORMAT = 2
"""Version of the cache. Raise it after a change of the files, of `Tokeniser` or of the split."""

Corpora = Mapping[tuple[str | None, str | None], Corpus]
"""Corpora of a mixture by `source` and `text_column`; (None, None) is `data.source`."""


def load_corpora(
    data: Data, phases: Sequence[Phase], tokenizer: Any, *, split: Split = "train", progress: bool = True
) -> Corpora:
    """Return the tokenised text of all sources in the phases' mixtures. `data.limit` applies to each source.

    All processes may call this together: one process per disk tokenises, and the others wait for it.
    """
    wanted = {(source.source, source.text_column) for phase in phases for source in phase.mixture.values()}
    corpora: dict[tuple[str, str], Corpus] = {}
    for source, column in wanted:
        place = (source or data.source, column or data.text_column)
        if place not in corpora:
            corpora[place] = open_store(
                place[0], tokenizer, split=split, text_column=place[1], limit=data.limit, streaming=data.streaming,
                encoding=data.encoding, skip_unreadable=data.skip_unreadable, bos=data.bos,
                split_special_tokens=data.split_special_tokens, cache=data.cache, progress=progress,
            )  # fmt: skip
    return {key: corpora[key[0] or data.source, key[1] or data.text_column] for key in wanted}


def open_store(
    source: str,
    tokenizer: Any,
    *,
    split: Split | None = "train",
    text_column: str = "text",
    limit: int | None = None,
    streaming: bool = False,
    encoding: str | None = None,
    skip_unreadable: bool = False,
    bos: bool = True,
    split_special_tokens: bool = True,
    cache: str | Path | None = None,
    progress: bool = False,
) -> StoredCorpus:
    """Return the tokens of a source, from the cache or tokenised now.

    The entry is built beside its final place and then renamed, so that it is complete or absent.

    Args:
        source: see `pe_patch.data.text.iter_documents`, also for `split`, `text_column`, `limit`, `streaming`,
            `encoding` and `skip_unreadable`.
        tokenizer: the tokenizer of the model.
        bos: begin each document as the tokenizer begins a text.
        split_special_tokens: read control tokens in the text, such as `</s>`, as text.
        cache: a folder; None is `$XDG_CACHE_HOME/pe_patch` or `~/.cache/pe_patch`.
        progress: show a progress bar.

    Raises:
        RecipeError: the cache folder is not writable.
        TextSourceError: the source cannot be read.
    """
    options: dict[str, Any] = {
        "split": split, "text_column": text_column, "limit": limit, "encoding": encoding,
        "skip_unreadable": skip_unreadable,
    }  # fmt: skip
    files, settings = manifest(source), {"bos": bos, "split_special_tokens": split_special_tokens}
    parts = (str(FORMAT), fingerprint_of(files, source, options), tokenizer_hash(tokenizer), repr(settings))
    folder = cache_folder(cache) / hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    if not folder.exists():
        with _locked(folder):
            if not folder.exists():  # another process may have built it meanwhile
                skipped: list[Skipped] = []
                texts = iter_documents(source, **options, streaming=streaming, skipped=skipped)
                facts = {"source": source, **options, **settings, "files": files}
                _build(folder, texts, Tokeniser(tokenizer, **settings), skipped, facts, progress)
    return StoredCorpus(folder, source)


def cache_folder(cache: str | Path | None) -> Path:
    """Return the folder of the token cache."""
    if cache is not None:
        return Path(cache).expanduser() / "tokens"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pe_patch" / "tokens"


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash everything that determines the token ids of a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        settings = json.loads(backend.to_str())
        # Calls set truncation and padding and leave them set, so they are not part of the tokenizer.
        parts = [json.dumps({key: value for key, value in settings.items() if key not in ("truncation", "padding")})]
    else:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            parts = [f"{path.name} {path.read_bytes().hex()}" for path in sorted(Path(folder).rglob("*.*"))]
    # Python code may add start and end tokens, which is not in the files.
    probe = tokenizer("a")["input_ids"]
    parts += [type(tokenizer).__qualname__, repr(probe), repr(tokenizer.eos_token_id)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _locked(folder: Path) -> Any:
    """Lock this entry. The system releases the lock if the process dies."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(f"{folder}.lock").acquire()
    except OSError as error:
        raise _unwritable(folder.parent, error) from error


def _unwritable(folder: Path, error: OSError) -> RecipeError:
    return RecipeError(f"Cannot write tokenised text to {folder} ({error}). Give another folder in data.cache.")


def _build(
    folder: Path,
    texts: Iterator[str],
    tokeniser: Tokeniser,
    skipped: list[Skipped],
    facts: dict[str, Any],
    progress: bool,
) -> None:
    """Tokenise into a temporary folder and rename it once it is complete. The caller holds the lock."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
    try:
        partial.mkdir()
        largest = 0
        with (partial / TOKENS).open("wb") as tokens, _bar(facts["source"], progress) as advance:
            offsets = array("q", [0])
            for batch in tokeniser(texts):
                for ids in batch:
                    tokens.write(ids.tobytes())
                    offsets.append(offsets[-1] + len(ids))
                    largest = max(largest, int(ids.max(initial=0)))
                advance(len(offsets) - 1, offsets[-1])
            if not offsets[-1]:
                raise RecipeError(f"{facts['source']}: its {len(offsets) - 1:,} documents have no tokens.")
            _synchronise(tokens)
        with (partial / OFFSETS).open("wb") as file:
            offsets.tofile(file)
            _synchronise(file)
        found = {
            "documents": len(offsets) - 1, "tokens": offsets[-1], "largest_id": largest, "start": tokeniser.start,
            "control_tokens": tokeniser.control_tokens, "skipped": [asdict(record) for record in skipped],
        }  # fmt: skip
        (partial / FACTS).write_text(json.dumps({"format": FORMAT, **facts, **found}, indent=1), encoding="utf-8")
        partial.rename(folder)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise _unwritable(folder.parent, error) from error
        raise


def _synchronise(file: BinaryIO) -> None:
    """Flush the file to disk."""
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def _bar(source: str, shown: bool) -> Iterator[Any]:
    """Show a progress line with documents, tokens and tokens per second."""
    started = time.perf_counter()
    with Progress(
        SpinnerColumn(),
        TimeElapsedColumn(),
        TextColumn(  # a narrow terminal cuts the end, so the source comes last
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
