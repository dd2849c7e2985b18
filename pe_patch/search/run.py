"""`search`: from a model and a text to the factors that suit them best, going on where an earlier run was stopped."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..checkpoints.folders import SEARCH, check_output
from ..evaluation.corpus import Corpus
from ..evaluation.model import EvaluatedModel, model_fingerprint
from .evolution import Schedule, evolve
from .folder import SearchJournal, settle
from .objective import Objective, check_samples, make_material
from .progress import Progress
from .result import SearchResult, write_best
from .scoring import Scorer
from .space import KNOWN, known_factors, make_space
from .target import make_target


def search(
    model: Any,
    tokenizer: Any,
    length: int,
    *,
    method: str = "longrope2",
    text: str | Sequence[str] | Corpus = "stdlib",
    samples: int = 8,
    needles: int = 8,
    targets: int | None = None,
    schedule: Schedule | None = None,
    seed: int = 0,
    start: Sequence[float] | None = None,
    attention_factor: float | None = None,
    on_existing: str = "error",
    batch_size: int | None = None,
    output: str | os.PathLike[str] | None = None,
    progress: bool = True,
    overwrite: bool = False,
) -> SearchResult:
    """Search the rescale factors by which a rotary model reads `length` tokens best, without training it.

    Args:
        length: tokens that the model is to reach, beyond its trained window.
        method: "longrope" (Ding et al. 2024, arXiv 2402.13753), which judges by the loss of documents, or "longrope2"
            (Shang et al. 2025, arXiv 2502.20082), by that of the answers to questions about hidden facts.
        text: documents, a source that `pe_patch.data.text.load_documents` knows, or a Corpus.
        samples: documents of `length` tokens that a candidate is scored on.
        needles: facts hidden in each of longrope2's documents, all of them asked for.
        targets: last tokens of longrope's documents whose loss counts; by default an eighth of them, at most 2048.
        schedule: how many candidates; the papers' numbers by default.
        seed: of the candidates, the facts and the places in the text.
        start: factors to start from as well, one for each rotated pair.
        attention_factor: what cos and sin are multiplied by; by default LongRoPE's sqrt(1 + ln s / ln L).
        on_existing: what to do with a scaling that the config names: "error" or "replace".
        batch_size: sequences in one forward; planned by the free memory by default.
        output: a folder for `search.jsonl` (every scored candidate, as soon as it is), `best.json` and `search.png`.
            The same call goes on with what it holds and ends as an uninterrupted one.
        overwrite: write to an output folder that holds something else.

    Raises:
        OptionError: a length within the window, numbers that contradict each other, a start outside the space, or an
            output folder of a search with other settings.
        OutputError: an output folder that is the model or the text, or that holds something else.
        UnsupportedError: a model without rotation, or with several.
        PePatchError: a text that is too short.
    """
    if output is not None:
        output = Path(output).expanduser()
        check_output(output, SEARCH, inputs=[model.config._name_or_path, text], overwrite=overwrite)
    schedule = schedule or Schedule()
    check_samples(samples, needles)
    target = make_target(model, length, attention_factor)
    space, starts = make_space(method, target.shape, target.factor)
    if start is not None:
        starts = [space.given(start), *starts]
    schedule.check(len(starts))
    material = make_material(method, tokenizer, text, length, samples, needles, seed, targets)
    subject = EvaluatedModel(model, tokenizer, batch_size)
    subject.batch_size = subject.plan_batch_size(length, logits=material.targets + 1, cached=False)
    settings = {
        "method": method, "length": length, "samples": samples, "needles": needles,
        "targets": material.targets, **asdict(schedule), "seed": seed,
        "start": start and list(start), "attention_factor": target.attention_factor, "on_existing": on_existing,
        "text": material.text, "text_hash": material.hash, "model_hash": model_fingerprint(model),
        "window": target.window, "device": subject.device.type,
    }  # fmt: skip
    if output is not None:
        subject.batch_size = settle(Path(output), settings, subject.batch_size, asked=batch_size is not None)
    found = SearchResult(
        method=method, target=target, known=known_factors(target.shape, target.factor),
        measured_on=material.measured_on, model=_called(model), settings=settings,
    )  # fmt: skip
    with Progress(len(KNOWN) + schedule.candidates, schedule.iterations, progress) as bar:
        scorer = Scorer(Objective(subject, material, on_existing), SearchJournal(output), target, bar)
        found.baselines.update({paper: scorer.baseline(paper, scheme) for paper, scheme in KNOWN.items()})
        for born in evolve(space, starts, schedule, seed, scorer):
            found.history.extend(born)
            if output is not None:
                write_best(Path(output), found.options)
    if output is not None:
        found.save(output, overwrite=True)  # checked at the start
    return found


def _called(model: Any) -> str:
    name = getattr(model.config, "_name_or_path", "") or type(model).__name__
    return Path(name).name if Path(name).is_dir() else name
