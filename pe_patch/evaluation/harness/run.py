"""`harness`: lm-eval's own tasks and scores on the model's own window, as rows."""

from __future__ import annotations

import contextlib
import copy
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...errors import OptionError, PePatchError
from ..journal import Journal, key_of
from ..memory import PeakMemory
from ..results import Results, Row, check_results_folder
from ..subject import model_fingerprint, scheme_label, tokenizer_hash, windows

TaskSpec = str | Mapping[str, Any]

RETENTION = ("arc_easy", "arc_challenge", "hellaswag")
"""What a model could do before its window was extended, by one name: `retention`."""


def harness(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[TaskSpec] | TaskSpec,
    lengths: Sequence[int] | int | None = None,
    *,
    max_length: int | None = None,
    limit: int | float | None = None,
    few_shot: int | None = None,
    batch_size: int = 1,
    chat: bool = False,
    seed: int | None = None,
    autocast: torch.dtype | None = None,
    beyond_window: bool = False,
    label: str | None = None,
    include_path: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> Results:
    """Run tasks of lm-eval on a loaded model and give its scores as rows.

    `tasks` are lm-eval's names of tasks, groups and tags, paths of task files, task dicts, or "retention", which is
    `RETENTION`. `lengths`, in tokens, are those that RULER's tasks are made at (default: `max_length`). `max_length` is
    what the model is given at most, prompt and answer together: its effective window where nothing is said. `limit` is
    the number of documents of each task, or their share if below 1. `few_shot` and `seed` are lm-eval's own where
    nothing is said. `chat` puts prompts into the tokenizer's chat template. `include_path` is a folder with task files
    of your own. With `output`, a folder, finished tasks are kept in its journal and not run again; a folder that holds
    anything else is refused unless `overwrite=True`. The tokenizer and the state of random generators are left as they
    were.

    Raises `PePatchError` for a prompt that lm-eval would cut, before the model reads it, and for a task that cannot be
    prepared; `UnknownNameError` for a task that lm-eval does not have; `OptionError` for options without effect.
    """
    if output is not None:
        output = Path(output).expanduser()
        check_results_folder(output, inputs=[model.config._name_or_path, include_path], overwrite=overwrite)
    _require_lm_eval()
    from .tasks import Tasks

    chosen = _expanded(tasks)
    wanted = [lengths] if isinstance(lengths, int) else sorted(set(lengths or ()))
    window = _window(model, max_length, wanted, beyond_window)
    if chat and not tokenizer.chat_template:
        raise PePatchError("chat=True needs a chat template, and the tokenizer has none. Leave it out.")
    with tempfile.TemporaryDirectory() as folder:
        found = Tasks(chosen, Path(folder), None if include_path is None else os.fspath(include_path))
        if wanted and not any(map(found.made_to_length, chosen)):
            raise OptionError(
                "lengths have no effect on these tasks: only RULER's are made to a length. Leave them out, or set "
                "max_length to bound what the model is given."
            )
        if any(map(found.made_to_length, chosen)):
            tokenizer.save_pretrained(folder)  # RULER's tasks take a tokenizer by its folder
        settings = {
            "limit": limit,
            "num_fewshot": few_shot,
            "batch_size": batch_size,
            "apply_chat_template": chat,
            "seed": seed,
            "max_length": window,
            "autocast": None if autocast is None else str(autocast),
        }
        scheme = label or scheme_label(model)
        stamps = {"scheme": scheme, "tokenizer_hash": tokenizer_hash(tokenizer)}
        journal, results = Journal(output), Results(config=_config(model, scheme, chosen, wanted, settings))
        fingerprint = model_fingerprint(model)
        for task in chosen:
            for length in (wanted or [window]) if found.made_to_length(task) else [None]:
                depends = {"lm_eval": _version(), "model": fingerprint, "task": task, "files": found.files(task)}
                key = key_of(**depends, length=length, **settings, **stamps)
                if key not in journal:
                    rows = _run(model, tokenizer, found, task, length, settings, autocast, stamps)
                    journal.put(key, {"rows": [asdict(replace(row, key=key)) for row in rows]})
                results.rows += [Row(**row) for row in (journal.get(key) or {})["rows"]]
    return results


def retention(model: Any, tokenizer: Any, *, text: str | Sequence[str] = "stdlib", **options: Any) -> Results:
    """What the extension left of a model's short context: the loss at its native window, ARC and HellaSwag.

    `options` are those of `harness`. The data sets of ARC and HellaSwag are on the hub.
    """
    from ..perplexity import Perplexity
    from ..run import evaluate

    benchmarks = harness(model, tokenizer, RETENTION, **options)
    loss = evaluate(
        model,
        tokenizer,
        Perplexity(measures="sliding"),
        windows(model)[0],
        text=text,
        retrieval=False,
        label=options.get("label"),
        autocast=options.get("autocast"),
    )
    return loss + benchmarks


def _run(
    model: Any,
    tokenizer: Any,
    found: Any,
    task: TaskSpec,
    length: int | None,
    settings: Mapping[str, Any],
    autocast: torch.dtype | None,
    stamps: Mapping[str, Any],
) -> list[Row]:
    """One call of lm-eval: a task or group at one length. RULER's several lengths would share `limit` otherwise."""
    import lm_eval

    from .rows import rows_of
    from .uncut import UncutLM

    run_tasks: Any = lm_eval.simple_evaluate
    seed, was_training = settings["seed"], model.training
    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    with _left_alone(), PeakMemory(model.device) as peak, contextlib.redirect_stdout(sys.stderr):
        start = time.perf_counter()
        try:
            # lm-eval gives a tokenizer without padding token one
            subject = UncutLM(model, copy.deepcopy(tokenizer), settings["max_length"], settings["batch_size"], autocast)
            subject.made_to_length = length
            with found.loading_errors(task):
                given = run_tasks(
                    model=subject,
                    tasks=[task if isinstance(task, str) else dict(task)],
                    task_manager=found.manager(task, length),
                    **{name: settings[name] for name in ("limit", "num_fewshot", "apply_chat_template")},
                    **({} if seed is None else dict.fromkeys(seeds, seed)),
                )
        finally:
            model.train(was_training)
        seconds = time.perf_counter() - start
    assert given is not None  # None comes from the other ranks of a distributed run, which this is not
    work = {"seconds": seconds, "peak_memory": peak.bytes, "memory_kind": peak.kind}
    return rows_of(given, version=_version(), subject=subject, length=length, stamps={**stamps, **work})


def _window(model: Any, max_length: int | None, lengths: Sequence[int], beyond_window: bool) -> int:
    """What the model is given at most. lm-eval's own default is a number of the configuration, which not every patch
    and no unbounded scheme changes."""
    effective = windows(model)[1]
    if any(value < 1 for value in (*lengths, 1 if max_length is None else max_length)):
        raise PePatchError(f"max_length and lengths are positive numbers of tokens, got {max_length} and {lengths}.")
    asked = max(*lengths, effective or 0, 0) if max_length is None else max_length
    if not asked:
        raise PePatchError("Nothing bounds the model's window: say how much it is given, with max_length or lengths.")
    if lengths and lengths[-1] > asked:
        raise OptionError(f"Length {lengths[-1]} does not fit into max_length={asked}. Give a larger one, or none.")
    if effective is not None and asked > effective and not beyond_window:
        raise PePatchError(
            f"{asked} tokens are beyond the model's window of {effective}. Extend it with patch_model(...), ask for "
            "less, or pass beyond_window=True to see what happens there."
        )
    return asked


def _expanded(tasks: Sequence[TaskSpec] | TaskSpec) -> list[TaskSpec]:
    several = [tasks] if isinstance(tasks, str | Mapping) else list(tasks)
    if not several:
        raise PePatchError("Give at least one task of lm-eval.")
    return [name for task in several for name in (RETENTION if task == "retention" else (task,))]


def _config(
    model: Any, scheme: str, tasks: Sequence[TaskSpec], lengths: Sequence[int], settings: Mapping[str, Any]
) -> dict[str, Any]:
    named = [task if isinstance(task, str) else task.get("task", task.get("group")) for task in tasks]
    return {
        "model": getattr(model.config, "_name_or_path", "") or type(model).__name__,
        "scheme": scheme,
        "lm_eval": {"version": _version(), "tasks": named, "lengths": list(lengths), **settings},
    }


def _require_lm_eval() -> None:
    from importlib.util import find_spec

    if find_spec("lm_eval") is None:
        raise PePatchError("lm-eval is not installed: pip install 'pe_patch[lm-eval]'.")


def _version() -> str:
    from importlib.metadata import version

    return version("lm_eval")


@contextlib.contextmanager
def _left_alone() -> Iterator[None]:
    """Put the state of the random generators back, which lm-eval seeds."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
