"""Greedy answers to many prompts: left-padded batches, and a text that several prompts begin with read once."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import DynamicCache, GenerationConfig

from .. import compat
from ..errors import PePatchError
from ..patching.api import find_patch
from ..patching.targets import unwrap

if TYPE_CHECKING:
    from .questions import Question
    from .subject import Subject

WORTH_SHARING = 0.25
"""Share of a prompt that another must begin with for its cache to be reused."""
LEAST_SHARED = 64
"""Tokens below which reading twice costs less than copying a cache."""
LENGTH_DEPENDENT = ("dynamic", "longrope")
"""Transformers' own rotary types whose frequencies follow the length of a pass: reading in parts would change them."""


def greedy_answers(subject: Subject, questions: Sequence[Question]) -> list[str]:
    """What the model writes after each prompt, at most `budget` tokens of it, up to an end-of-text token."""
    written: dict[int, list[int]] = {}
    alone: list[int] = []
    for group in _groups(questions) if _reads_in_parts(subject) else [[i] for i in range(len(questions))]:
        found = _from_common_text(subject, questions, group) if len(group) > 1 else None
        if found is None:
            alone += group
        else:
            written |= found
    for batch in _batches(subject, questions, alone):
        written |= _together(subject, questions, batch)
    ends = _end_tokens(subject)
    return [subject.tokenizer.decode(_before(written[index], ends)) for index in range(len(questions))]


def _before(tokens: list[int], ends: set[int]) -> list[int]:
    stop = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:stop]


def _end_tokens(subject: Subject) -> set[int]:
    """The tokenizer's end of text and those that the checkpoint stops at (chat models have several)."""
    own = getattr(getattr(subject.model, "generation_config", None), "eos_token_id", None)
    several = own if isinstance(own, list | tuple) else [own]
    return {int(token) for token in (subject.tokenizer.eos_token_id, *several) if token is not None}


# Batches of prompts that have nothing in common


def _batches(subject: Subject, questions: Sequence[Question], indices: list[int]) -> Iterator[list[int]]:
    """Prompts of one budget and of about one length, as many as fit in memory."""
    order = sorted(indices, key=lambda i: (questions[i].budget, -len(questions[i].prompt), i))
    while order:
        first = questions[order[0]]
        size = subject.batch(len(first.prompt) + first.budget)
        take = [i for i in order[:size] if questions[i].budget == first.budget]
        yield take
        order = order[len(take) :]


def _together(subject: Subject, questions: Sequence[Question], batch: list[int]) -> dict[int, list[int]]:
    prompts, budget = [questions[i].prompt for i in batch], questions[batch[0]].budget
    longest = max(map(len, prompts))
    ids = np.full((len(batch), longest), subject.filler(), dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :], mask[row, longest - len(prompt) :] = prompt, 1
    found = _continue(subject, _tensor(subject, ids), _tensor(subject, mask), budget)
    subject.advance(sum(len(prompt) + budget for prompt in prompts))
    return dict(zip(batch, found, strict=True))


def _continue(
    subject: Subject, ids: torch.Tensor, mask: torch.Tensor, budget: int, cache: Any = None
) -> list[list[int]]:
    """The next `budget` tokens of each row; `ids` [batch, n] are the whole prompts, whatever `cache` holds of them."""
    with subject.ready():
        if budget == 1 and cache is None and bool(mask.all()):
            # One greedy token is the argmax after the prompt: no cache needed.
            logits = subject.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
            return logits[:, -1:].argmax(-1).tolist()
        greedy = GenerationConfig(
            max_new_tokens=budget,
            do_sample=False,
            num_beams=1,
            pad_token_id=subject.filler(),
            eos_token_id=sorted(_end_tokens(subject)) or None,
        )
        more = compat.cache_keyword(unwrap(subject.model), cache)
        with _generating_by(subject.model, greedy):
            written = subject.model.generate(input_ids=ids, attention_mask=mask, generation_config=greedy, **more)
    if not torch.equal(written[:, : ids.shape[1]], ids):
        raise PePatchError("generate() did not return the prompt it was given: the prompt was cut or changed.")
    return written[:, ids.shape[1] :].tolist()


# Prompts that begin with the same text


@dataclass(frozen=True)
class _Member:
    index: int
    shared: int
    """Tokens that its prompt has in common with the leader's; at least one of its own is left to be read."""


def _reads_in_parts(subject: Subject) -> bool:
    """Whether a text read in two passes gives what it gives in one: not where frequencies follow a pass's length."""
    patch = find_patch(subject.model)
    if subject.cache_bytes == 0 or patch is not None:
        return subject.cache_bytes > 0 and patch is not None and not patch.scheme.length_dependent
    parameters = getattr(subject.model.config.get_text_config(), "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    return not any(part.get("rope_type") in LENGTH_DEPENDENT for part in nested)


def _groups(questions: Sequence[Question]) -> list[list[int]]:
    """Neighbouring questions whose prompts begin with much the same text, each in one group."""
    groups: list[list[int]] = []
    for index, question in enumerate(questions):
        leader = questions[groups[-1][0]] if groups else None
        if leader is not None and _worth_sharing(_common(leader.prompt, question.prompt), len(question.prompt)):
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def _worth_sharing(shared: int, length: int) -> bool:
    return shared >= max(LEAST_SHARED, WORTH_SHARING * length)


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens two prompts begin with alike, leaving each at least one of its own."""
    size = min(len(one), len(other)) - 1
    differs = np.flatnonzero(one[:size] != other[:size])
    return int(differs[0]) if len(differs) else size


def _from_common_text(subject: Subject, questions: Sequence[Question], group: list[int]) -> dict[int, list[int]] | None:
    """Answers of a group whose text is read once; None where the cache keeps too little of it to be gone back in.

    The leader's prompt is read, and its cache cut back further and further: to what the next member shares with it.
    """
    leader = max(
        (group[0], group[-1]), key=lambda i: sum(_common(questions[i].prompt, questions[j].prompt) for j in group)
    )
    prompt = questions[leader].prompt
    members = [_Member(i, len(prompt) - 1 if i == leader else _common(prompt, questions[i].prompt)) for i in group]
    longest = max(member.shared for member in members)
    with subject.ready():
        trunk = compat.cache_of(
            subject.model(input_ids=_tensor(subject, prompt[None, :longest]), use_cache=True, logits_to_keep=1)
        )
    if not isinstance(trunk, DynamicCache) or any(trunk.is_sliding):
        return None
    found: dict[int, list[int]] = {}
    for alike in _alike(questions, members):
        held, wanted = trunk.get_seq_length(), alike[0].shared
        if wanted < held:
            trunk.crop(wanted - held)
        size = subject.batch(len(questions[alike[0].index].prompt) + questions[alike[0].index].budget)
        for start in range(0, len(alike), size):
            batch = [member.index for member in alike[start : start + size]]
            cache = copy.deepcopy(trunk)
            if len(batch) > 1:
                cache.batch_repeat_interleave(len(batch))
            ids = _tensor(subject, np.stack([questions[i].prompt for i in batch]))
            budget = questions[batch[0]].budget
            found |= zip(batch, _continue(subject, ids, torch.ones_like(ids), budget, cache), strict=True)
            subject.advance(len(batch) * (ids.shape[1] + budget))
    return found


def _alike(questions: Sequence[Question], members: list[_Member]) -> Iterator[list[_Member]]:
    """Members that one batch can hold, those that share most first."""
    kinds: dict[tuple[int, int, int], list[_Member]] = {}
    for member in members:
        question = questions[member.index]
        kinds.setdefault((-member.shared, len(question.prompt), question.budget), []).append(member)
    for kind in sorted(kinds):
        yield kinds[kind]


def _tensor(subject: Subject, rows: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(rows, dtype=np.int64)).to(subject.device)


@contextlib.contextmanager
def _generating_by(model: Any, settings: GenerationConfig) -> Iterator[None]:
    """Put the checkpoint's own generation settings aside.

    generate() fills whatever its argument leaves open from them, a repetition penalty or suppressed tokens among it.
    """
    owners = [
        module for module in model.modules() if isinstance(vars(module).get("generation_config"), GenerationConfig)
    ]
    kept = [owner.generation_config for owner in owners]
    try:
        for owner in owners:
            owner.generation_config = settings
        yield
    finally:
        for owner, own in zip(owners, kept, strict=True):
            owner.generation_config = own
