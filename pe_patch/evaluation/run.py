"""`evaluate`: measure tasks at several lengths on a loaded model, without cutting any prompt."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..checkpoints.folders import sole_writer
from ..checkpoints.sources import check_loaded
from ..errors import PePatchError
from ..patching.prefill import check_prefill_chunk
from .context import EvaluationContext, PromptTemplate, WorkUnit
from .corpus import Corpus
from .journal import Journal
from .model import DryRunModel, EvaluatedModel, Work, model_fingerprint, scheme_label, tokenizer_hash, windows
from .progress import Progress, fewer_samples
from .results import Results, check_results_folder, json_text, row_of, write_atomically
from .tasks import Needle, Task, find_tasks

logger = logging.getLogger(__name__)

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Needle positions: the centres of five equal parts of the haystack."""


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str | Task] | str | Task = ("perplexity", "needle"),
    lengths: Sequence[int] | int | None = None,
    *,
    samples: int = 50,
    depths: Sequence[float] = DEPTHS,
    batch_size: int | None = None,
    prefill_chunk: int | None = None,
    seed: int = 0,
    text: str | Sequence[str] | Corpus = "stdlib",
    control_length: int | None = None,
    beyond_window: bool = False,
    retrieval: bool = True,
    autocast: torch.dtype | None = None,
    label: str | None = None,
    progress: bool | Callable[[int, int], None] = True,
    chat: bool = False,
    bos: bool | None = None,
    task_options: Mapping[str, object] | None = None,
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Results:
    """Measure a loaded model at several lengths. Each score comes with the same questions within the native window.

    Args:
        model: A causal language model, patched or not.
        tokenizer: Its tokenizer.
        tasks: Names from TASKS or GROUPS, or task instances.
        lengths: Lengths in tokens, answer included. None is the model's effective window.
        samples: Questions per length, divided over `depths`. With fewer than 32, perplexity reads less text, too.
        depths: Positions of the answer in the text, from 0 (start) to 1 (end).
        batch_size: Sequences per forward pass. None plans it from the free memory.
        prefill_chunk: Most tokens of a text that one forward pass reads, such as 2048. It bounds the memory of the
            activations, and the logits stay the same. None reads a text in one pass.
        seed: Random seed for questions and text spots.
        text: A list of documents, a source that `pe_patch.data.text.load_documents` knows, or a Corpus, which several
            evaluations can share.
        control_length: Length in tokens of the control. None is the native window (the shortest length if it is
            unknown), or the longest length if that is less.
        beyond_window: Allow lengths beyond the effective window.
        retrieval: Add the task `needle` if no task retrieves, because loss alone does not show that context is used.
        autocast: Dtype for torch.autocast. None disables it.
        label: Name of the model in the rows. None describes its scheme.
        progress: Show the progress on stderr: a bar in a terminal, else a line at least every 30 seconds. Or a
            function of the tokens read so far and of all tokens, which shows nothing else.
        chat: Put prompts into the tokenizer's chat template.
        bos: Start every window of a loss, every prompt and every control with BOS. None does as the tokenizer does: a
            model that was trained with BOS is much worse without it. The rows say which.
        task_options: Options for the named tasks that have them.
        output: Folder for the results. Each row is saved as soon as it is measured, and rows that the folder already
            has are not measured again. `answers.jsonl` has the answers behind the rows. None saves nothing.
        overwrite: Write to `output` even if it holds something else, or the results of another scheme.
        dry_run: Do everything except run the model, so that a missing file, a short text or a wrong length raises now.
            Writes nothing.

    Returns:
        The rows and the configuration. A dry run has no rows, and the exact work of each task in `config["plan"]`.

    Raises:
        PePatchError: A prompt would be cut, a length is beyond the window, or the text is too short.
        UnknownNameError: A task or one of its named options does not exist.
        OptionError: No task has an option of `task_options`, `chat` has no chat template, `bos` no BOS token, or
            `prefill_chunk` would change the logits.
        OutputError: `output` holds something else and `overwrite` is False, or another run is writing to it.
    """
    check_loaded(model, tokenizer)
    if output is not None:
        output = Path(output).expanduser()
        name = label or scheme_label(model)
        check_results_folder(
            output, scheme=name, inputs=[cast(PreTrainedConfig, model.config).name_or_path, text], overwrite=overwrite
        )
    native, effective = windows(model)
    chosen = _with_retrieval(_find_tasks(tasks, task_options), retrieval)
    with sole_writer(None if dry_run else output):
        context = _context(
            model,
            tokenizer,
            lengths,
            samples=samples,
            depths=depths,
            batch_size=batch_size,
            prefill_chunk=prefill_chunk,
            seed=seed,
            text=text,
            control_length=control_length,
            beyond_window=beyond_window,
            autocast=autocast,
            label=label,
            chat=chat,
            bos=bos,
            output=output,
            dry_run=dry_run,
        )
        plan = _plan(context, chosen)
        results = Results(config=_config(context, chosen, native, effective))
        if dry_run:
            for _, task, _, unit in plan:
                before = replace(context.model.work)
                unit.measure()
                results.config["plan"] = add_work(
                    results.config.get("plan", {}), task.name, context.model.work - before
                )
            return results
        remaining: dict[str, dict[str, int]] = {}
        for key, task, _, unit in plan:
            if key not in context.journal:
                remaining = add_work(remaining, task.name, unit.work)
        total = sum(work["tokens"] for work in remaining.values())
        answers: list[dict[str, Any]] = []
        cheaper = partial(fewer_samples, samples, tokens=partial(_tokens_with, context, chosen))
        with (
            Progress(context.scheme, total, plan_sentence(remaining), progress, cheaper) as shown,
            shown.following(context.model.layers),
        ):
            context.model.advance = shown.advance
            for key, task, length, unit in plan:
                shown.describe(f"{task.name} at {length}")
                entry = context.journal.get(key) or _measure(context, key, unit)
                try:
                    results.rows += [row_of(row) for row in entry["rows"]]
                    answers += [{"scheme": context.scheme, **answer} for answer in entry["answers"]]
                except (KeyError, TypeError) as error:
                    raise context.journal.damaged(key, error) from error
        if output is not None:
            folder = results.save(output, overwrite=True)  # check_results_folder has checked it
            write_atomically(folder / "answers.jsonl", "".join(f"{json_text(a)}\n" for a in answers))
        return results


def planned_tokens(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str | Task] | str | Task,
    lengths: Sequence[int],
    *,
    samples: int,
    text: str | Sequence[str] | Corpus,
    control_length: int | None = None,
    depths: Sequence[float] = DEPTHS,
) -> int:
    """Return about how many tokens `evaluate` reads with these arguments, controls included, without running the model.

    `model` may be on the meta device.
    """
    context = _context(
        model, tokenizer, lengths, samples=samples, depths=depths, text=text, control_length=control_length,
        beyond_window=True, dry_run=True,
    )  # fmt: skip
    return _tokens_with(context, _find_tasks(tasks, None), samples)


def _context(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    lengths: Sequence[int] | int | None,
    *,
    samples: int,
    depths: Sequence[float],
    text: str | Sequence[str] | Corpus,
    control_length: int | None,
    beyond_window: bool,
    dry_run: bool,
    batch_size: int | None = None,
    prefill_chunk: int | None = None,
    seed: int = 0,
    autocast: torch.dtype | None = None,
    label: str | None = None,
    chat: bool = False,
    bos: bool | None = None,
    output: Path | None = None,
) -> EvaluationContext:
    """Check the arguments of `evaluate`, read the text, and return the context of the evaluation."""
    native, effective = windows(model)
    checked_lengths = _check_lengths(lengths, effective, beyond_window)
    control = control_length or min(native or min(checked_lengths), max(checked_lengths))
    if min(samples, control) < 1 or not depths:
        raise PePatchError(
            f"samples and control_length must be at least 1, and depths must not be empty; got samples={samples}, "
            f"control_length={control} and depths={tuple(depths)}."
        )
    corpus = text if isinstance(text, Corpus) else Corpus.load(tokenizer, text, needed=max(*checked_lengths, control))
    return EvaluationContext(
        model=_evaluated(
            DryRunModel if dry_run else EvaluatedModel, model, tokenizer, batch_size, autocast, prefill_chunk
        ),
        corpus=corpus,
        lengths=checked_lengths,
        depths=tuple(depths),
        samples=samples,
        seed=seed,
        control_length=control,
        scheme=label or scheme_label(model),
        tokenizer_hash=tokenizer_hash(tokenizer),
        model_hash="" if output is None or dry_run else model_fingerprint(model),
        template=PromptTemplate.of(tokenizer, chat, bos),
        journal=Journal(None if dry_run else output),
    )


def _evaluated(
    kind: type[EvaluatedModel],
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int | None,
    autocast: torch.dtype | None,
    prefill_chunk: int | None,
) -> EvaluatedModel:
    evaluated = kind(model, tokenizer, batch_size, autocast)
    check_prefill_chunk(model, prefill_chunk)
    if prefill_chunk is not None and not isinstance(evaluated, DryRunModel) and not evaluated.cache_bytes:
        raise PePatchError("prefill_chunk reads a text in parts, which needs a cache, and this model keeps none.")
    evaluated.prefill_chunk = prefill_chunk
    return evaluated


def _tokens_with(context: EvaluationContext, tasks: Sequence[Task], samples: int) -> int:
    """Return about how many tokens the tasks read with so many questions at each length, controls included."""
    return sum(unit.work.tokens for *_, unit in _plan(replace(context, samples=samples), tasks))


def _plan(context: EvaluationContext, tasks: Sequence[Task]) -> list[tuple[str, Task, int, WorkUnit]]:
    """List every unit of work with its key, task and length, shorter lengths first."""
    return [
        (context.key(task, length, unit.name), task, length, unit)
        for length in context.lengths
        for task in tasks
        for unit in task.work_units(context, length)
    ]


def add_work(plan: dict[str, dict[str, int]], task: str, work: Work) -> dict[str, dict[str, int]]:
    """Return the plan with the work of another unit added to its task."""
    known = plan.get(task, {})
    return {**plan, task: {name: known.get(name, 0) + count for name, count in asdict(work).items()}}


def plan_sentence(plan: Mapping[str, Mapping[str, int]]) -> str:
    """Describe a plan in a sentence: prompts and tokens of each task, controls included."""
    if not plan:
        return "everything is measured already"
    parts = [
        f"{name} about {work['tokens']:,} tokens in {work['prompts'] + work['windows']:,} "
        f"{'prompts' if work['prompts'] else 'windows'}"
        for name, work in sorted(plan.items(), key=lambda entry: -entry[1]["tokens"])
    ]
    return f"to read, with controls: {', '.join(parts)}"


def _measure(context: EvaluationContext, key: str, unit: WorkUnit) -> dict[str, Any]:
    """Measure a unit of work and return its journal entry."""
    outcome = unit.measure()
    rows = [asdict(replace(row, key=key)) for row in outcome.rows]
    context.journal.put(key, {"rows": rows, "answers": list(outcome.answers)})
    entry = context.journal.get(key)
    assert entry is not None
    return entry


def _find_tasks(tasks: Sequence[str | Task] | str | Task, options: Mapping[str, Any] | None) -> list[Task]:
    several = tasks if isinstance(tasks, Sequence) and not isinstance(tasks, str) else [tasks]
    if not several:
        raise PePatchError("Give at least one task. Example: tasks=['perplexity', 'needle'].")
    return find_tasks(several, options)


def _with_retrieval(tasks: list[Task], retrieval: bool) -> list[Task]:
    """Add a retrieval task if there is none: fine-tuning without a scheme repairs the loss but not retrieval."""
    if not retrieval or any(getattr(task, "retrieves", False) for task in tasks):
        return tasks
    logger.warning(
        "Loss alone does not show that context is used: adding the task 'needle' (retrieval=False leaves it out)."
    )
    return [*tasks, Needle()]


def _check_lengths(lengths: Sequence[int] | int | None, effective: int | None, beyond_window: bool) -> list[int]:
    """Return the lengths in ascending order without duplicates."""
    if lengths is None:
        if effective is None:
            raise PePatchError("The model's configuration has no window: give lengths. Example: lengths=[4096, 8192].")
        lengths = effective
    ordered = sorted(set([lengths] if isinstance(lengths, int) else lengths))
    if not ordered or ordered[0] < 1:
        raise PePatchError(f"lengths must be positive numbers of tokens, got {lengths}.")
    if effective is not None and ordered[-1] > effective and not beyond_window:
        raise PePatchError(
            f"Length {ordered[-1]} is beyond the model's window of {effective} tokens. Extend it with "
            "patch_model(...), use a smaller length, or pass beyond_window=True to measure it all the same."
        )
    return ordered


def _config(context: EvaluationContext, tasks: list[Task], native: int | None, effective: int | None) -> dict[str, Any]:
    """Collect what another run needs to reproduce the rows."""
    model = context.model.model
    return {
        "model": getattr(model.config, "name_or_path", "") or type(model).__name__,
        "scheme": context.scheme,
        "native_window": native,
        "effective_window": effective,
        "tasks": [repr(task) for task in tasks],
        "lengths": list(context.lengths),
        "depths": list(context.depths),
        "samples": context.samples,
        "control_length": context.control_length,
        "seed": context.seed,
        "text": context.corpus.name,
        "text_hash": context.corpus.hash,
        "bytes_per_token": context.corpus.bytes_per_token,
        "tokenizer_hash": context.tokenizer_hash,
        "chat": context.template.chat,
        "bos": bos_stamp(context),
        "precision": str(context.model.autocast or next(model.parameters()).dtype) + _dequantised(model),
        "device": str(context.model.device),
        "versions": _versions(),
    }


def _dequantised(model: Any) -> str:
    """Say which type the weights had in the GGUF file that they are from, if they were quantised there."""
    kind = getattr(model, "dequantised", None)
    return "" if kind is None else f", dequantised from {kind}"


def bos_stamp(context: EvaluationContext) -> str:
    """Say what every window and prompt starts with, and who decided it."""
    ids = context.start_ids.tolist()
    token = " ".join(context.model.tokenizer.convert_ids_to_tokens(ids)) or "none"
    return f"{token} ({'as the tokenizer does' if context.template.bos is None else f'bos={context.template.bos}'})"


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for name in ("pe_patch", "torch", "transformers"):
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions
