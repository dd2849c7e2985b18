"""Search the factors for a model and a text, and resume an interrupted search."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..checkpoints.folders import SEARCH, check_output, sole_writer
from ..compat import require_extra
from ..evaluation.corpus import Corpus
from ..evaluation.model import EvaluatedModel, model_fingerprint
from .evolution import Schedule, evolve
from .folder import SearchJournal, write_or_check_settings
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
    """Search the rescale factors that give a rotary model the lowest loss at `length` tokens, without training.

    Args:
        model: a rotary model without a patch.
        tokenizer: its tokenizer.
        length: the target length in tokens, beyond the trained window.
        method: "longrope" (Ding et al. 2024, arXiv 2402.13753) scores the loss of documents; "longrope2" (Shang et al.
            2025, arXiv 2502.20082) scores the loss of answers to questions about hidden facts.
        text: documents, a source that `pe_patch.data.text.load_documents` takes, or a Corpus.
        samples: the number of documents of `length` tokens that score a candidate.
        needles: the number of facts hidden in each document of longrope2; each document asks for all of them.
        targets: the number of tokens at the end of longrope's documents whose loss counts; None takes an eighth of the
            document, at most 2048.
        schedule: the numbers of candidates; None takes the paper's.
        seed: the random seed of candidates, facts and places in the text.
        start: additional factors to start from, one per rotated pair.
        attention_factor: the factor on cos and sin; None takes LongRoPE's sqrt(1 + ln s / ln L).
        on_existing: "replace" drops a scaling in the config; "error" raises if there is one.
        batch_size: sequences per forward pass; None plans it from the free memory.
        output: a folder for `search.jsonl` (each candidate as soon as it is scored), `best.json` and `search.png`. The
            same call resumes an interrupted search there and gives the same result.
        progress: False hides the progress bar.
        overwrite: True to write to an output folder that holds something else.

    Returns:
        The best candidate, the baselines and the whole history.

    Raises:
        OptionError: if the length lies within the window, numbers contradict each other, the start lies outside the
            space, or the output folder holds a search with other settings.
        OutputError: if the output folder is the model or the text, or holds something else.
        UnsupportedError: if the model has no rotation, or several different ones.
        PePatchError: if the text is too short.
    """
    if output is not None:
        output = Path(output).expanduser()
        require_extra("report")  # the picture comes last, and nothing may be lost then
        check_output(output, SEARCH, inputs=[model.config.name_or_path, text], overwrite=overwrite)
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
        subject.batch_size = write_or_check_settings(
            Path(output), settings, subject.batch_size, batch_size_given=batch_size is not None
        )
    result = SearchResult(
        method=method, target=target, known=known_factors(target.shape, target.factor),
        measured_on=material.measured_on, model=_model_name(model), settings=settings,
    )  # fmt: skip
    with sole_writer(output), Progress(len(KNOWN) + schedule.candidates, schedule.iterations, progress) as bar:
        scorer = Scorer(Objective(subject, material, on_existing), SearchJournal(output), target, bar)
        result.baselines.update({paper: scorer.baseline(paper, scheme) for paper, scheme in KNOWN.items()})
        for generation in evolve(space, starts, schedule, seed, scorer):
            result.history.extend(generation)
            if output is not None:
                write_best(Path(output), result.options)
        if output is not None:
            result.save(output, overwrite=True)  # the check ran at the start
    return result


def _model_name(model: Any) -> str:
    name = getattr(model.config, "name_or_path", "") or type(model).__name__
    return Path(name).name if Path(name).is_dir() else name
