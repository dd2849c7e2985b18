"""`evaluate`: tasks times lengths on a model that is already loaded, with nothing cut and everything counted."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import PePatchError
from .bench import Bench, Piece
from .corpus import Corpus
from .journal import Journal
from .prompts import Frame
from .results import Results, Row, check_results_folder, write_atomically
from .subject import Rehearsal, Subject, model_fingerprint, scheme_label, tokenizer_hash, windows
from .tasks import Needle, Task, find_tasks

logger = logging.getLogger(__name__)

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Where the needle stands: the middles of five equal parts of the haystack."""


def evaluate(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str | Task] | str | Task = ("perplexity", "needle"),
    lengths: Sequence[int] | int | None = None,
    *,
    samples: int = 50,
    depths: Sequence[float] = DEPTHS,
    batch_size: int | None = None,
    seed: int = 0,
    text: str | Sequence[str] | Corpus = "stdlib",
    control_length: int | None = None,
    beyond_window: bool = False,
    retrieval: bool = True,
    autocast: torch.dtype | None = None,
    label: str | None = None,
    progress: bool = True,
    chat: bool = False,
    task_options: Mapping[str, Any] | None = None,
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Results:
    """Measure a loaded model at several lengths, each score beside the same questions within its native window.

    `tasks` are names from TASKS or GROUPS, or instances; `task_options` go to those named that take them. `lengths`
    are in tokens, the answer included (default: the model's window). `samples` questions per length are shared out
    over `depths`. `text` is a list of documents, a source `pe_patch.data.text.load_documents` knows, or a Corpus, which
    several evaluations can share. Loss alone says little about context, so a retrieval task is added unless
    `retrieval=False`. A length beyond the model's window is an error unless `beyond_window=True`. `label` names the
    model in the rows. `chat` puts prompts into the tokenizer's chat template. With `output`, a folder, every row is
    kept there as soon as it is measured, and one that is there already is not measured again; the answers behind
    the rows are in its `answers.jsonl`. A folder with anything else in it, or with the results of another scheme, is
    refused unless `overwrite=True`. `dry_run` does everything but run the model: what would raise for want of a file,
    of text or of length raises now. It gives no rows and writes nothing. Raises `PePatchError` wherever a prompt would
    have been cut.
    """
    if output is not None:
        output = Path(output).expanduser()
        name = label or scheme_label(model)
        check_results_folder(output, scheme=name, inputs=[model.config._name_or_path, text], overwrite=overwrite)
    native, effective = windows(model)
    chosen = _with_retrieval(_tasks(tasks, task_options), retrieval)
    wanted = _lengths(lengths, effective, beyond_window)
    control = control_length or min(native or min(wanted), max(wanted))
    if min(samples, control) < 1 or not depths:
        raise PePatchError("samples and control_length must be at least 1, and depths must not be empty.")
    corpus = text if isinstance(text, Corpus) else Corpus.load(tokenizer, text, needed=max(*wanted, control))
    bench = Bench(
        subject=(Rehearsal if dry_run else Subject)(model, tokenizer, batch_size, autocast),
        corpus=corpus,
        lengths=wanted,
        depths=tuple(depths),
        samples=samples,
        seed=seed,
        control_length=control,
        scheme=label or scheme_label(model),
        tokenizer_hash=tokenizer_hash(tokenizer),
        model_hash="" if output is None or dry_run else model_fingerprint(model),
        frame=Frame.of(tokenizer, chat),
        journal=Journal(None if dry_run else output),
    )
    plan = _plan(bench, chosen)
    results = Results(config=_config(bench, chosen, native, effective))
    if dry_run:
        for _, _, _, piece in plan:
            piece.measure()
        return results
    todo = sum(piece.tokens for key, _, _, piece in plan if key not in bench.journal)
    answers: list[dict[str, Any]] = []
    with _progress(bench, todo, progress) as describe:
        for key, task, length, piece in plan:
            describe(f"{task.name} at {length}")
            entry = bench.journal.get(key) or _measured(bench, key, piece)
            results.rows += [Row(**row) for row in entry["rows"]]
            answers += [{"scheme": bench.scheme, **answer} for answer in entry["answers"]]
    if output is not None:
        folder = results.save(output, overwrite=True)  # checked at the start
        write_atomically(folder / "answers.jsonl", "".join(f"{json.dumps(a, ensure_ascii=False)}\n" for a in answers))
    return results


def _plan(bench: Bench, tasks: Sequence[Task]) -> list[tuple[str, Task, int, Piece]]:
    """Every piece of work with its key, shorter lengths first."""
    return [
        (bench.key(task, length, piece.name), task, length, piece)
        for length in bench.lengths
        for task in tasks
        for piece in task.pieces(bench, length)
    ]


def _measured(bench: Bench, key: str, piece: Piece) -> dict[str, Any]:
    outcome = piece.measure()
    rows = [asdict(replace(row, key=key)) for row in outcome.rows]
    bench.journal.put(key, {"rows": rows, "answers": list(outcome.answers)})
    entry = bench.journal.get(key)
    assert entry is not None
    return entry


def _tasks(tasks: Sequence[str | Task] | str | Task, options: Mapping[str, Any] | None) -> list[Task]:
    several = tasks if isinstance(tasks, Sequence) and not isinstance(tasks, str) else [tasks]
    if not several:
        raise PePatchError("Give at least one task.")
    return find_tasks(several, options)


def _with_retrieval(tasks: list[Task], retrieval: bool) -> list[Task]:
    """Loss does not stand alone: fine-tuning without any scheme repairs it and leaves retrieval broken."""
    if not retrieval or any(getattr(task, "retrieves", False) for task in tasks):
        return tasks
    logger.warning(
        "Loss alone does not show that context is used: adding the task 'needle' (retrieval=False leaves it out)."
    )
    return [*tasks, Needle()]


def _lengths(lengths: Sequence[int] | int | None, effective: int | None, beyond_window: bool) -> list[int]:
    if lengths is None:
        if effective is None:
            raise PePatchError("The model's configuration names no window: say which lengths to measure.")
        lengths = effective
    wanted = sorted(set([lengths] if isinstance(lengths, int) else lengths))
    if not wanted or wanted[0] < 1:
        raise PePatchError(f"lengths must be positive numbers of tokens, got {lengths}.")
    if effective is not None and wanted[-1] > effective and not beyond_window:
        raise PePatchError(
            f"Length {wanted[-1]} is beyond the model's window of {effective} tokens. Extend it with patch_model(...), "
            "ask for a smaller length, or pass beyond_window=True to see what happens there."
        )
    return wanted


def _config(bench: Bench, tasks: list[Task], native: int | None, effective: int | None) -> dict[str, Any]:
    """What another run needs to give the same rows."""
    model = bench.subject.model
    return {
        "model": getattr(model.config, "_name_or_path", "") or type(model).__name__,
        "scheme": bench.scheme,
        "native_window": native,
        "effective_window": effective,
        "tasks": [repr(task) for task in tasks],
        "lengths": list(bench.lengths),
        "depths": list(bench.depths),
        "samples": bench.samples,
        "control_length": bench.control_length,
        "seed": bench.seed,
        "text": bench.corpus.name,
        "text_hash": bench.corpus.hash,
        "bytes_per_token": bench.corpus.bytes_per_token,
        "tokenizer_hash": bench.tokenizer_hash,
        "chat": bench.frame.chat,
        "precision": str(bench.subject.autocast or next(model.parameters()).dtype),
        "device": str(bench.subject.device),
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("pe_patch", "torch", "transformers"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


@contextlib.contextmanager
def _progress(bench: Bench, tokens: int, shown: bool) -> Iterator[Callable[[str], None]]:
    """A bar over the tokens the model is given, with the time left; it goes to stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not shown, transient=True) as bar:
        work = bar.add_task(bench.scheme, total=tokens)
        bench.subject.advance = lambda tokens: bar.advance(work, tokens)
        yield lambda what: bar.update(work, description=f"{bench.scheme}: {what}")
