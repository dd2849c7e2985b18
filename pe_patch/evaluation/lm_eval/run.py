"""`harness`: run lm-eval's tasks on a loaded model, with the model's own window."""

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
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...checkpoints.folders import sole_writer
from ...errors import OptionError, PePatchError
from ..journal import Journal, key_of
from ..memory import PeakMemory
from ..model import EvaluatedModel, model_fingerprint, scheme_label, tokenizer_hash, windows
from ..results import Results, Row, check_results_folder, row_of
from ..retrieval import start_ids, starts_with_bos

if TYPE_CHECKING:
    from .tasks import RequestedTasks

TaskSpec = str | Mapping[str, Any]

RETENTION = ("arc_easy", "arc_challenge", "hellaswag")
"""Short-context benchmarks behind the name `retention`: they show what an extended model has kept."""


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
    bos: bool | None = None,
    seed: int | None = None,
    autocast: torch.dtype | None = None,
    beyond_window: bool = False,
    label: str | None = None,
    include_path: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> Results:
    """Run tasks of lm-eval on a loaded model and return its scores as rows.

    The tokenizer and the state of the random generators do not change.

    Args:
        model: A causal language model, patched or not.
        tokenizer: Its tokenizer.
        tasks: Names of lm-eval's tasks, groups and tags, paths of task files, task dicts, or "retention" for the tasks
            in `RETENTION`.
        lengths: Lengths in tokens at which RULER's tasks make their documents. None is `max_length`.
        max_length: Maximum tokens of a prompt and its answer. None is the model's effective window, or the longest of
            `lengths` if that is greater.
        limit: Documents of each task, or their fraction if below 1. None is all of them.
        few_shot: Examples in each prompt. None is the task's default.
        batch_size: Sequences per forward pass.
        chat: Put prompts into the tokenizer's chat template.
        bos: Start every prompt with BOS. None does as the tokenizer does.
        seed: Random seed. None is lm-eval's default.
        autocast: Dtype for torch.autocast. None disables it.
        beyond_window: Allow lengths beyond the effective window.
        label: Name of the model in the rows. None describes its scheme.
        include_path: Folder with the user's task files.
        output: Folder whose journal keeps finished tasks, so that they are not run again. None keeps nothing.
        overwrite: Write to `output` even if it holds something else.

    Returns:
        One row per score.

    Raises:
        PePatchError: lm-eval would cut a prompt (raised before the model reads one), or cannot prepare a task.
        UnknownNameError: lm-eval has no task of this name.
        OptionError: An option has no effect.
        OutputError: `output` holds something else and `overwrite` is False, or another run is writing to it.
    """
    if output is not None:
        output = Path(output).expanduser()
        check_results_folder(output, inputs=[model.config.name_or_path, include_path], overwrite=overwrite)
    _require_lm_eval()
    from .tasks import RequestedTasks

    chosen = _expand(tasks)
    ordered_lengths = [lengths] if isinstance(lengths, int) else sorted(set(lengths or ()))
    window = _check_window(model, max_length, ordered_lengths, beyond_window)
    if chat and not tokenizer.chat_template:
        raise PePatchError("chat=True needs a tokenizer with a chat template; this one has none. Use chat=False.")
    if bos and not starts_with_bos(tokenizer):
        raise OptionError("bos=True has no effect in lm-eval: this tokenizer adds no BOS token. Leave bos out.")
    tokenizer = _with_eos(model, tokenizer)
    with tempfile.TemporaryDirectory() as folder, sole_writer(output):
        requested = RequestedTasks(chosen, Path(folder), None if include_path is None else os.fspath(include_path))
        with_lengths = any(map(requested.has_lengths, chosen))
        if ordered_lengths and not with_lengths:
            raise OptionError(
                "lengths have no effect on these tasks: only RULER's tasks have lengths. Leave them out, or set "
                "max_length to limit the prompts."
            )
        if with_lengths:
            tokenizer.save_pretrained(folder)  # RULER's tasks load a tokenizer from a folder
        settings = {
            "limit": limit,
            "num_fewshot": few_shot,
            "batch_size": batch_size,
            "apply_chat_template": chat,
            "add_bos_token": bos,
            "seed": seed,
            "max_length": window,
            "autocast": None if autocast is None else str(autocast),
        }
        scheme = label or scheme_label(model)
        stamps = {"scheme": scheme, "tokenizer_hash": tokenizer_hash(tokenizer)}
        start = tokenizer.convert_ids_to_tokens(start_ids(tokenizer, bos).tolist())
        journal, results = Journal(output), Results(config=_config(model, scheme, chosen, ordered_lengths, settings))
        fingerprint = model_fingerprint(model)
        for task in chosen:
            for length in (ordered_lengths or [window]) if requested.has_lengths(task) else [None]:
                key = key_of(
                    lm_eval=_version(),
                    model=fingerprint,
                    task=task,
                    files=requested.file_hashes(task),
                    length=length,
                    **settings,
                    **stamps,
                )
                if key not in journal:
                    rows = _run(model, tokenizer, requested, task, length, settings, autocast, stamps)
                    rows = [replace(row, key=key, details={**row.details, "prompt_start": start}) for row in rows]
                    journal.put(key, {"rows": [asdict(row) for row in rows]})
                try:
                    results.rows += [row_of(row) for row in (journal.get(key) or {})["rows"]]
                except (KeyError, TypeError) as error:
                    raise journal.damaged(key, error) from error
    return results


def retention(model: Any, tokenizer: Any, *, text: str | Sequence[str] = "stdlib", **options: Any) -> Results:
    """Measure what an extended model has kept of its short context: loss at the native window, ARC and HellaSwag.

    Args:
        model: A causal language model, patched or not.
        tokenizer: Its tokenizer.
        text: Text for the loss, as in `evaluate`.
        options: Options of `harness`. The data sets of ARC and HellaSwag come from the hub.
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
        bos=options.get("bos"),
        autocast=options.get("autocast"),
    )
    return loss + benchmarks


def _run(
    model: Any,
    tokenizer: Any,
    requested: RequestedTasks,
    task: TaskSpec,
    length: int | None,
    settings: Mapping[str, Any],
    autocast: torch.dtype | None,
    stamps: Mapping[str, Any],
) -> list[Row]:
    """Call lm-eval for a task or group at one length. Several lengths in one call would share RULER's `limit`."""
    import lm_eval

    from .model import NoTruncationLM
    from .rows import rows_of

    simple_evaluate: Any = lm_eval.simple_evaluate
    seed, was_training = settings["seed"], model.training
    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    with _preserved_random_state(), PeakMemory(model.device) as peak, contextlib.redirect_stdout(sys.stderr):
        start = time.perf_counter()
        try:
            # a copy, because lm-eval adds a padding token to a tokenizer without one
            wrapped = NoTruncationLM(
                model,
                copy.deepcopy(tokenizer),
                settings["max_length"],
                settings["batch_size"],
                autocast,
                settings["add_bos_token"],
            )
            wrapped.generated_length = length
            with requested.loading_errors(task):
                output = simple_evaluate(
                    model=wrapped,
                    tasks=[task if isinstance(task, str) else dict(task)],
                    task_manager=requested.manager(task, length),
                    **{name: settings[name] for name in ("limit", "num_fewshot", "apply_chat_template")},
                    **({} if seed is None else dict.fromkeys(seeds, seed)),
                )
        finally:
            model.train(was_training)
        seconds = time.perf_counter() - start
    assert output is not None  # only other ranks of a distributed run return None
    usage = {"seconds": seconds, "peak_memory": peak.bytes, "memory_kind": peak.kind}
    return rows_of(output, version=_version(), model=wrapped, length=length, stamps={**stamps, **usage})


def _check_window(model: Any, max_length: int | None, lengths: Sequence[int], beyond_window: bool) -> int:
    """Return the maximum tokens of a prompt and its answer.

    lm-eval's default is a number of the configuration, which not every patch changes and which an unbounded scheme
    ignores.
    """
    effective = windows(model)[1]
    if any(value < 1 for value in (*lengths, 1 if max_length is None else max_length)):
        raise PePatchError(
            f"max_length and lengths must be positive numbers of tokens, got max_length={max_length} and "
            f"lengths={list(lengths)}."
        )
    window = max(*lengths, effective or 0, 0) if max_length is None else max_length
    if not window:
        raise PePatchError("The model's window is unbounded: give max_length or lengths. Example: max_length=32768.")
    if lengths and lengths[-1] > window:
        raise OptionError(
            f"Length {lengths[-1]} does not fit into max_length={window}. Use a greater max_length, or leave it out."
        )
    if effective is not None and window > effective and not beyond_window:
        raise PePatchError(
            f"{window} tokens are beyond the model's window of {effective}. Extend it with patch_model(...), use a "
            "smaller length, or pass beyond_window=True to measure it all the same."
        )
    return window


def _expand(tasks: Sequence[TaskSpec] | TaskSpec) -> list[TaskSpec]:
    """Return the tasks as a list, with "retention" replaced by its benchmarks."""
    several = [tasks] if isinstance(tasks, str | Mapping) else list(tasks)
    for task in several:
        if isinstance(task, str) and task.startswith(("longbench", "infinitebench")):
            benchmark = "InfiniteBench" if task.startswith("infinite") else "LongBench"
            raise OptionError(
                f"{benchmark} is a task of evaluate() here (--task {task.split('_')[0]}), with the authors' prompts "
                "and scores, controls, and rows from a folder. lm-eval's copy has lost white space in prompts, scores "
                "code in another way, and reads only the hub."
            )
    if not several:
        raise PePatchError("Give at least one task of lm-eval. Example: tasks=['arc_easy'].")
    return [name for task in several for name in (RETENTION if task == "retention" else (task,))]


def _config(
    model: Any, scheme: str, tasks: Sequence[TaskSpec], lengths: Sequence[int], settings: Mapping[str, Any]
) -> dict[str, Any]:
    names = [task if isinstance(task, str) else task.get("task", task.get("group")) for task in tasks]
    return {
        "model": getattr(model.config, "name_or_path", "") or type(model).__name__,
        "scheme": scheme,
        "lm_eval": {"version": _version(), "tasks": names, "lengths": list(lengths), **settings},
    }


def _with_eos(model: Any, tokenizer: Any) -> Any:
    """Return the tokenizer, or a copy with the model's EOS token if it has none, which lm-eval cannot do without.

    Raises:
        PePatchError: Neither has an EOS token.
    """
    if tokenizer.eos_token_id is not None:
        return tokenizer
    ends = EvaluatedModel(model, tokenizer).end_tokens
    if not ends:
        raise PePatchError(
            "lm-eval ends answers at the EOS token, and neither this tokenizer nor the model's generation config has "
            "one. Set it: tokenizer.eos_token = '...', or \"eos_token\" in tokenizer_config.json. Tasks of evaluate() "
            "(--task) need none."
        )
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(min(ends))
    return tokenizer


def _require_lm_eval() -> None:
    from importlib.util import find_spec

    if find_spec("lm_eval") is None:
        raise PePatchError("lm-eval is not installed: pip install 'pe_patch[eval]'.")


def _version() -> str:
    from importlib.metadata import version

    return version("lm_eval")


@contextlib.contextmanager
def _preserved_random_state() -> Iterator[None]:
    """Restore the state of the random generators, which lm-eval seeds."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
