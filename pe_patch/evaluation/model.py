"""The evaluated model: its windows and identity, its greedy answers and losses, and its memory."""

from __future__ import annotations

import contextlib
import copy
import gc
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, cast

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from .. import compat
from ..adapters.trained_window import trained_window
from ..errors import PePatchError, UnsupportedError
from ..patching.description import describe
from ..patching.output_head import Layer, OutputHead
from ..patching.prefill import follows_length
from ..patching.targets import unwrap
from .question import Question

WEIGHTS_SAMPLED = 512
"""Numbers read from each weight for a fingerprint."""
MIN_SHARED_FRACTION = 0.25
"""Fraction of a prompt that must match another one before its cache is reused."""
MIN_SHARED_TOKENS = 64
"""With fewer shared tokens, copying the cache costs more than reading them again."""
USABLE_MEMORY = 0.8
"""Fraction of the free memory to plan with. The rest covers what the estimate leaves out."""
LOGITS_PER_CHUNK = 2**28
"""Logits that are computed at once for a loss, 1 GiB in float32."""
TOKENS_PER_BATCH = {"cpu": 8192, "cuda": 131072}
"""Tokens per forward pass above which a larger batch is not faster."""


# Identity


def windows(model: Any) -> tuple[int | None, int | None]:
    """Return the native and the effective window of a model.

    Returns:
        The trained length in tokens, or None if unknown, and the length in tokens that the model supports now, or None
        if it is unknown or unbounded.
    """
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if getattr(model.config, "pe_patch", None):
        effective = describe(model).effective
        trained, bound = effective.get("trained_window"), effective.get("effective_window")
        return cast("int | None", trained) or limit, bound if isinstance(bound, int) else None
    return trained_window(model, config).length, limit


def scheme_label(model: Any) -> str:
    """Return a short name for the positions of a model: the patched scheme, or the scaling in its configuration."""
    record = getattr(model.config, "pe_patch", None)
    if record:
        options = ", ".join(f"{key}={value}" for key, value in (record.get("options") or {}).items())
        return f"{record['scheme']}({options})" if options else str(record["scheme"])
    scaling = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    kind = scaling.get("rope_type", "default")
    return "native" if kind == "default" else f"native {kind}"


def tokenizer_hash(tokenizer: Any) -> str:
    """Return twelve hexadecimal digits that identify the tokenizer (its backend, or else its vocabulary)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(state.encode()).hexdigest()[:12]


def model_fingerprint(model: Any) -> str:
    """Return twelve hexadecimal digits that identify the configuration, the scheme, the dtype and the weights."""
    config = compat.values_without_source(model.config)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    digest.update(weights_fingerprint(model).encode())
    return digest.hexdigest()[:12]


def weights_fingerprint(model: Any) -> str:
    """Return twelve hexadecimal digits that identify names, shapes, dtypes and values of the weights.

    It reads `WEIGHTS_SAMPLED` evenly spaced numbers of each weight, since training changes nearly all of them.
    """
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        flat = weight.detach().reshape(-1)
        step = max(1, flat.numel() // WEIGHTS_SAMPLED)
        digest.update(flat[::step].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


# Answers and losses


@dataclass
class Work:
    """Count the work of an evaluation, including its controls."""

    prompts: int = 0
    """Prompts to answer."""
    windows: int = 0
    """Sequences whose loss is computed."""
    tokens: int = 0
    """Tokens of all prompts, answers and windows."""
    forward_passes: int = 0
    """Forward passes without batches and shared text: one for a window and for each token of an answer, at most."""

    def __sub__(self, other: Work) -> Work:
        return Work(*(getattr(self, entry.name) - getattr(other, entry.name) for entry in fields(Work)))


@dataclass(frozen=True)
class Sampling:
    """How to draw the tokens of a continuation."""

    temperature: float = 1.0
    """0 takes the most probable token."""
    top_p: float = 1.0
    """Draw from the most probable tokens that together have at least this probability."""
    seed: int = 0

    def processors(self, texts: Sequence[int], prompt: int) -> LogitsProcessorList:
        """Return what turns the logits of a greedy generation into those of draws.

        Args:
            texts: The number of each row's text.
            prompt: Tokens of the prompts.
        """
        if self.temperature == 0:
            return LogitsProcessorList()
        warpers = [TemperatureLogitsWarper(self.temperature)] if self.temperature != 1 else []
        nucleus = [TopPLogitsWarper(self.top_p)] if self.top_p < 1 else []
        return LogitsProcessorList([*warpers, *nucleus, _Gumbel(self.seed, texts, prompt)])


class _Gumbel(LogitsProcessor):
    """Add Gumbel noise, so that the largest logit is a draw from the softmax.

    The noise depends on the seed, the number of the text and the place alone. So a text is continued the same way in
    every batch.
    """

    def __init__(self, seed: int, texts: Sequence[int], prompt: int) -> None:
        self.seed, self.texts, self.prompt = seed, texts, prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step, noise = input_ids.shape[1] - self.prompt, np.empty(scores.shape, dtype=np.float32)
        for row, text in enumerate(self.texts):
            noise[row] = np.random.default_rng([self.seed, text, step]).gumbel(size=scores.shape[1])
        return scores.float() + torch.from_numpy(noise).to(scores.device)


@dataclass
class EvaluatedModel:
    """A model with its tokenizer. It answers questions and computes losses in the largest batches that fit."""

    model: Any
    tokenizer: Any
    batch_size: int | None = None
    """Sequences per forward pass. None plans it from the free memory."""
    autocast: torch.dtype | None = None
    """Dtype for torch.autocast. None disables it."""
    prefill_chunk: int | None = None
    """Most tokens of a text that one forward pass reads, which bounds the memory of its activations. None reads a text
    in one pass."""
    advance: Callable[[int], Any] = field(default=lambda tokens: None)
    """Progress callback. It receives the number of tokens after every forward pass."""
    work: Work = field(default_factory=Work)
    """The work done so far."""

    @property
    def device(self) -> torch.device:
        """Device of the input embeddings."""
        return self.model.get_input_embeddings().weight.device

    @property
    def layers(self) -> list[nn.Module]:
        """The layers of the model, for the progress of a pass; empty if they are not in one list."""
        count = getattr(self.model.config.get_text_config(), "num_hidden_layers", None)
        lists = (each for each in self.model.modules() if isinstance(each, nn.ModuleList) and len(each) == count)
        return list(next(lists, ()))

    @cached_property
    def cache_bytes(self) -> int:
        """Bytes that one token takes in the cache, measured once; 0 if the model keeps no cache."""
        with self.inference_mode():
            return cache_size(self.model).bytes if keeps_cache(self.model) else 0

    @property
    def pad_token(self) -> int:
        """Id for left padding. The attention mask hides it."""
        candidates = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(token for token in candidates if token is not None)

    @property
    def end_tokens(self) -> set[int]:
        """Ids that end an answer: the tokenizer's EOS and those of the checkpoint (chat models have several)."""
        configured = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        several = configured if isinstance(configured, list | tuple) else [configured]
        return {int(token) for token in (self.tokenizer.eos_token_id, *several) if token is not None}

    @property
    def can_reuse_prefix(self) -> bool:
        """True if reading a text in two passes gives the same result as reading it in one.

        This needs a cache, and frequencies that do not depend on the length of a pass.
        """
        if self.cache_bytes == 0:
            return False
        return not follows_length(self.model)

    def plan_batch_size(self, length: int, *, logits: int = 1, cached: bool = True) -> int:
        """Return the number of sequences of `length` tokens for one forward pass.

        Args:
            length: Tokens of each sequence, answer included.
            logits: Positions per sequence whose logits the forward pass returns.
            cached: True if the forward pass fills a cache.
        """
        if self.batch_size is not None:
            return self.batch_size
        cache_bytes = self.cache_bytes if cached or self.prefill_chunk else 0
        return max_batch_size(
            self.model, self.device, length, cache_bytes=cache_bytes, logits=logits, chunk=self.prefill_chunk
        )

    @contextlib.contextmanager
    def inference_mode(self) -> Iterator[None]:
        """Switch to evaluation mode without gradients, and restore the training mode afterwards."""
        was_training = self.model.training
        self.model.eval()
        enabled = self.autocast is not None
        try:
            with torch.inference_mode(), torch.autocast(self.device.type, self.autocast, enabled=enabled):
                yield
        finally:
            self.model.train(was_training)

    def losses(self, sequences: Sequence[np.ndarray], targets: int) -> np.ndarray:
        """Compute the loss of the last `targets` tokens of each sequence.

        Args:
            sequences: Token ids [n], all of the same length.
            targets: Number of tokens to score at the end of each sequence.

        Returns:
            Losses in nats [sequences, targets].
        """
        self._count_windows(sequences)
        length, rows = len(sequences[0]), []
        size = self.plan_batch_size(length, logits=self.logits_at_once(targets), cached=False)
        for start in range(0, len(sequences), size):
            ids = torch.from_numpy(np.stack(sequences[start : start + size])).to(self.device)
            with self.inference_mode():
                rows.append(self._losses(ids, targets).double().cpu().numpy())
            self.advance(ids.numel())
        return np.concatenate(rows)

    @cached_property
    def output_head(self) -> OutputHead | None:
        """The output layer, if it can be called on chunks of the hidden states."""
        try:
            head = OutputHead(self.model)
            with self.inference_mode():
                head.learn(self.model)
        except UnsupportedError:  # then `losses` computes all logits at once
            return None
        return head

    def logits_at_once(self, targets: int) -> int:
        """Return the number of positions per sequence whose logits are in memory at the same time."""
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        chunk = max(1, LOGITS_PER_CHUNK // vocabulary)
        return targets + 1 if targets < chunk or self.output_head is None else chunk

    def _losses(self, ids: torch.Tensor, targets: int) -> torch.Tensor:
        """Return the losses of the last targets [batch, targets] of ids [batch, n]."""
        labels = ids[:, -targets:]
        if self.prefill_chunk is not None and ids.shape[1] > self.prefill_chunk:
            return self._losses_in_chunks(ids, targets)
        inputs = {"input_ids": ids, "use_cache": False, "logits_to_keep": targets + 1}
        chunk = self.logits_at_once(targets)
        if chunk > targets or (head := self.output_head) is None:
            return _cross_entropy(self.model(**inputs).logits[:, -targets - 1 : -1], labels)

        def in_chunks(hidden: torch.Tensor, layer: Layer) -> torch.Tensor:
            hidden_rows, wanted = hidden[:, -targets - 1 : -1].flatten(0, 1), labels.flatten()
            pieces = zip(hidden_rows.split(chunk), wanted.split(chunk), strict=True)
            return torch.cat([_cross_entropy(head.logits(rows, layer), tokens) for rows, tokens in pieces])

        with head.replaced(in_chunks):
            return self.model(**inputs).loss.view(labels.shape)

    def _losses_in_chunks(self, ids: torch.Tensor, targets: int) -> torch.Tensor:
        """Return the losses of the last targets [batch, targets] of ids [batch, n], read chunk by chunk."""
        first = ids.shape[1] - targets - 1  # the token whose logits predict the first target
        head, losses = ids[:, :first], []
        cache = self._read(head) if head.shape[1] else None
        assert self.prefill_chunk is not None
        width = min(self.prefill_chunk, self.logits_at_once(self.prefill_chunk))
        for start in range(first, ids.shape[1] - 1, width):
            part = ids[:, start : min(start + width, ids.shape[1] - 1)]
            output = self.model(input_ids=part, use_cache=True, **compat.cache_keyword(unwrap(self.model), cache))
            cache = compat.cache_of(output)
            losses.append(_cross_entropy(output.logits, ids[:, start + 1 : start + 1 + part.shape[1]]))
        return torch.cat(losses, 1)

    def _read(self, ids: torch.Tensor) -> Any:
        """Read texts without padding [batch, n] into a new cache, and return it."""
        cache = None
        for part in ids.split(self.prefill_chunk or ids.shape[1], dim=1):
            known = compat.cache_keyword(unwrap(self.model), cache)
            cache = compat.cache_of(self.model(input_ids=part, use_cache=True, logits_to_keep=1, **known))
        return cache

    def answers(self, questions: Sequence[Question]) -> list[str]:
        """Answer each question greedily, with at most `budget` tokens and up to an end-of-text token.

        Prompts that begin with the same text share its cache. All other prompts are answered in left-padded batches.
        """
        self._count_prompts(questions)
        tokens: dict[int, list[int]] = {}
        remaining: list[int] = []
        for group in group_by_prefix(questions) if self.can_reuse_prefix else [[i] for i in range(len(questions))]:
            answered = self._answer_from_shared_prefix(questions, group) if len(group) > 1 else None
            if answered is None:
                remaining += group
            else:
                tokens |= answered
        for batch in self._padded_batches(questions, remaining):
            tokens |= self._answer_padded(questions, batch)
        ends = self.end_tokens
        return [self.tokenizer.decode(_until(tokens[index], ends)) for index in range(len(questions))]

    def continuations(self, prompts: Sequence[np.ndarray], tokens: int, sampling: Sampling) -> list[list[int]]:
        """Continue each prompt by exactly `tokens` tokens; end-of-text tokens are suppressed.

        Args:
            prompts: Token ids [n], all of the same length.
            tokens: Number of new tokens.
            sampling: How to draw them.

        Returns:
            The new token ids of each prompt.
        """
        self._count_continuations(prompts, tokens)
        length, rows = len(prompts[0]), []
        size = self.plan_batch_size(length + tokens)
        for start in range(0, len(prompts), size):
            ids = self._tensor(np.stack(prompts[start : start + size]))
            texts = range(start, start + len(ids))
            rows += self._generate(
                ids, torch.ones_like(ids), tokens, least=tokens, processors=sampling.processors(texts, length)
            )
            self.advance(len(ids) * (length + tokens))
        return rows

    def _count_continuations(self, prompts: Sequence[np.ndarray], tokens: int) -> None:
        self.work.prompts += len(prompts)
        self.work.forward_passes += len(prompts) * tokens
        self.work.tokens += sum(len(prompt) + tokens for prompt in prompts)

    def _count_windows(self, sequences: Sequence[np.ndarray]) -> None:
        self.work.windows += len(sequences)
        self.work.forward_passes += len(sequences)
        self.work.tokens += sum(map(len, sequences))

    def _count_prompts(self, questions: Sequence[Question]) -> None:
        self.work.prompts += len(questions)
        self.work.forward_passes += sum(question.budget for question in questions)
        self.work.tokens += sum(len(question.prompt) + question.budget for question in questions)

    def _padded_batches(self, questions: Sequence[Question], indices: list[int]) -> Iterator[list[int]]:
        """Group prompts of equal budget and similar length, as many as fit in memory."""
        order = sorted(indices, key=lambda i: (questions[i].budget, -len(questions[i].prompt), i))
        while order:
            first = questions[order[0]]
            size = self.plan_batch_size(len(first.prompt) + first.budget)
            batch = [i for i in order[:size] if questions[i].budget == first.budget]
            yield batch
            order = order[len(batch) :]

    def _answer_padded(self, questions: Sequence[Question], batch: list[int]) -> dict[int, list[int]]:
        prompts, budget = [questions[i].prompt for i in batch], questions[batch[0]].budget
        longest = max(map(len, prompts))
        ids = np.full((len(batch), longest), self.pad_token, dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :], mask[row, longest - len(prompt) :] = prompt, 1
        generated = self._generate(self._tensor(ids), self._tensor(mask), budget)
        self.advance(sum(len(prompt) + budget for prompt in prompts))
        return dict(zip(batch, generated, strict=True))

    def _answer_from_shared_prefix(
        self, questions: Sequence[Question], group: list[int]
    ) -> dict[int, list[int]] | None:
        """Answer a group of prompts whose shared text is read once.

        The model reads the leader's prompt. Its cache is then cropped step by step to the prefix that the next prompt
        shares with the leader. A cache with sliding layers cannot be cropped: the model then reads only what all
        prompts share.

        Returns:
            Answer tokens by question index, or None if the cache cannot be cropped and the prompts share too little.
        """
        leader = _most_shared(questions, group)
        prompt = questions[leader].prompt
        members = [
            _Member(i, len(prompt) - 1 if i == leader else shared_prefix_length(prompt, questions[i].prompt))
            for i in group
        ]
        if any(DynamicCache(config=unwrap(self.model).config).is_sliding):
            least = min(member.shared for member in members)
            if least < _least_shared(max(len(questions[i].prompt) for i in group)):
                return None
            members = [_Member(member.index, least) for member in members]
        longest = max(member.shared for member in members)
        with self.inference_mode():
            shared_cache = self._read(self._tensor(prompt[None, :longest]))
        cropped = any(member.shared < longest for member in members)
        if not isinstance(shared_cache, DynamicCache) or (cropped and any(shared_cache.is_sliding)):
            return None
        # What they share is read for all of them; so the time left is that of the rest.
        self.advance(sum(member.shared for member in members))
        answered: dict[int, list[int]] = {}
        for members_alike in _members_by_shape(questions, members):
            cached, needed = shared_cache.get_seq_length(), members_alike[0].shared
            if needed < cached:
                shared_cache.crop(needed - cached)
            first = questions[members_alike[0].index]
            size = self.plan_batch_size(len(first.prompt) + first.budget)
            for start in range(0, len(members_alike), size):
                batch = [member.index for member in members_alike[start : start + size]]
                cache = copy.deepcopy(shared_cache)
                if len(batch) > 1:
                    cache.batch_repeat_interleave(len(batch))
                ids = self._tensor(np.stack([questions[i].prompt for i in batch]))
                generated = self._generate(ids, torch.ones_like(ids), first.budget, cache)
                answered |= zip(batch, generated, strict=True)
                self.advance(len(batch) * (ids.shape[1] - needed + first.budget))
        return answered

    def _generate(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        budget: int,
        cache: Any = None,
        *,
        least: int = 0,
        processors: LogitsProcessorList | None = None,
    ) -> list[list[int]]:
        """Generate `budget` tokens for each row.

        Args:
            ids: Complete prompts [batch, n], including the tokens that `cache` already holds.
            mask: Attention mask [batch, n].
            budget: Maximum number of new tokens.
            cache: Cache of a common prefix of all rows, or None.
            least: Minimum number of new tokens.
            processors: Change the logits before the largest is taken.

        Returns:
            New token ids for each row.
        """
        with self.inference_mode():
            in_chunks = self.prefill_chunk is not None and ids.shape[1] > self.prefill_chunk
            if budget == 1 and cache is None and not processors and bool(mask.all()) and not in_chunks:
                # One greedy token is the argmax after the prompt and needs no cache.
                logits = self.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
                return logits[:, -1:].argmax(-1).tolist()
            greedy = GenerationConfig(
                max_new_tokens=budget,
                min_new_tokens=least or None,
                do_sample=False,
                num_beams=1,
                pad_token_id=self.pad_token,
                eos_token_id=sorted(self.end_tokens) or None,
                prefill_chunk_size=self.prefill_chunk if in_chunks else None,
            )
            cache_argument = compat.cache_keyword(unwrap(self.model), cache)
            with _generation_config(self.model, greedy):
                sequences = self.model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    generation_config=greedy,
                    logits_processor=processors,
                    **cache_argument,
                )
        if not torch.equal(sequences[:, : ids.shape[1]], ids):
            raise PePatchError("generate() did not return the prompt that it received: the prompt was cut or changed.")
        return sequences[:, ids.shape[1] :].tolist()

    def _tensor(self, rows: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(rows, dtype=np.int64)).to(self.device)


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the loss of each label, in the shape of the labels."""
    loss = F.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), reduction="none")
    return loss.view(labels.shape)


class DryRunModel(EvaluatedModel):
    """A model that returns empty answers and zero losses without a forward pass.

    The rest of an evaluation runs as usual: it reads the texts, makes the questions and scores the answers.
    """

    def answers(self, questions: Sequence[Question]) -> list[str]:
        """Return an empty answer for each question."""
        self._count_prompts(questions)
        return [""] * len(questions)

    def continuations(self, prompts: Sequence[np.ndarray], tokens: int, sampling: Sampling) -> list[list[int]]:
        """Return an empty continuation for each prompt."""
        self._count_continuations(prompts, tokens)
        return [[] for _ in prompts]

    def losses(self, sequences: Sequence[np.ndarray], targets: int) -> np.ndarray:
        """Return zeros [sequences, targets]."""
        self._count_windows(sequences)
        return np.zeros((len(sequences), targets))


@dataclass(frozen=True)
class _Member:
    """A question of a group whose prompts begin with the same text."""

    index: int
    shared: int
    """Tokens that its prompt shares with the leader's. At least one token of the prompt is left to read."""


def group_by_prefix(questions: Sequence[Question]) -> list[list[int]]:
    """Group neighbouring questions whose prompts begin with mostly the same text; returns lists of indices."""
    groups: list[list[int]] = []
    for index, question in enumerate(questions):
        leader = questions[groups[-1][0]] if groups else None
        if leader is not None and _worth_sharing(leader.prompt, question.prompt):
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def _worth_sharing(leader: np.ndarray, prompt: np.ndarray) -> bool:
    return shared_prefix_length(leader, prompt) >= _least_shared(len(prompt))


def _least_shared(length: int) -> float:
    """Return how many tokens of a prompt of `length` tokens must be shared before its cache is reused."""
    return max(MIN_SHARED_TOKENS, MIN_SHARED_FRACTION * length)


def shared_prefix_length(first: np.ndarray, second: np.ndarray) -> int:
    """Count the tokens that two prompts begin with in common, leaving at least one token of each prompt."""
    size = min(len(first), len(second)) - 1
    differs = np.flatnonzero(first[:size] != second[:size])
    return int(differs[0]) if len(differs) else size


def _most_shared(questions: Sequence[Question], group: list[int]) -> int:
    """Return the first or the last question of a group, whichever shares more tokens with the others."""
    return max(
        (group[0], group[-1]),
        key=lambda i: sum(shared_prefix_length(questions[i].prompt, questions[j].prompt) for j in group),
    )


def _members_by_shape(questions: Sequence[Question], members: list[_Member]) -> Iterator[list[_Member]]:
    """Yield members that fit into one batch, those with the longest shared prefix first."""
    by_shape: dict[tuple[int, int, int], list[_Member]] = {}
    for member in members:
        question = questions[member.index]
        by_shape.setdefault((-member.shared, len(question.prompt), question.budget), []).append(member)
    for shape in sorted(by_shape):
        yield by_shape[shape]


def _until(tokens: list[int], ends: set[int]) -> list[int]:
    stop = next((index for index, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:stop]


@contextlib.contextmanager
def _generation_config(model: Any, settings: GenerationConfig) -> Iterator[None]:
    """Replace the checkpoint's generation settings temporarily.

    generate() takes every setting that its argument leaves open from them, such as a repetition penalty or suppressed
    tokens.
    """
    owners = [
        module for module in model.modules() if isinstance(vars(module).get("generation_config"), GenerationConfig)
    ]
    originals = [owner.generation_config for owner in owners]
    try:
        for owner in owners:
            owner.generation_config = settings
        yield
    finally:
        for owner, original in zip(owners, originals, strict=True):
            owner.generation_config = original


# Memory


@dataclass(frozen=True)
class CacheSize:
    """Size of one token in a model's cache, summed over all layers."""

    numbers: int
    bytes: int
    layers: int

    @property
    def numbers_per_layer(self) -> float:
        """Mean over the layers."""
        return self.numbers / self.layers


def cache_size(model: Any) -> CacheSize:
    """Measure the cache that a model fills, as the difference between 16 and 8 tokens.

    Raises:
        PePatchError: The model returns no cache.
    """
    short, long = _cached_tensors(model, 8), _cached_tensors(model, 16)
    if not long:
        raise PePatchError(f"{type(model).__name__} returned no cache whose layers could be counted.")
    growth = [(after.numel() - before.numel(), after) for before, after in zip(short, long, strict=True)]
    return CacheSize(
        numbers=sum(count for count, _ in growth) // 8,
        bytes=sum(count * tensor.element_size() for count, tensor in growth) // 8,
        layers=len(long) // 2,
    )


def keeps_cache(model: Any) -> bool:
    """Return True if the model fills a cache."""
    return bool(_cached_tensors(model, 8))


@torch.inference_mode()
def _cached_tensors(model: Any, length: int) -> list[torch.Tensor]:
    """Return the cached keys and values of all layers after a forward pass over `length` tokens."""
    ids = torch.ones(1, length, dtype=torch.long, device=model.get_input_embeddings().weight.device)
    layers = getattr(compat.cache_of(model(input_ids=ids, use_cache=True)), "layers", None) or ()
    tensors = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    return [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]


def sequence_bytes(model: Any, length: int, cache_bytes: int, logits: int, chunk: int | None = None) -> int:
    """Estimate the memory of a forward pass over one sequence, without the weights.

    The estimate has the cache, the activations of the widest layer (residual stream, projections, MLP), the logits in
    float32 and, for eager attention, two score matrices of all heads.

    Args:
        model: The model.
        length: Tokens of the sequence.
        cache_bytes: Bytes per token in the cache.
        logits: Positions whose logits the forward pass returns.
        chunk: Most tokens of a forward pass; None for the whole sequence.

    Returns:
        Bytes.
    """
    config = model.config.get_text_config()
    hidden = getattr(config, "hidden_size", 1)
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    inner = max(inner) if isinstance(inner, list | tuple) else inner
    item = next(model.parameters()).element_size()
    at_once = min(length, chunk or length)
    total = length * cache_bytes + at_once * item * (8 * hidden + 3 * inner)
    total += 8 * min(logits, at_once) * config.vocab_size
    if "eager" in str(compat.attention_implementation(config)):
        total += 8 * getattr(config, "num_attention_heads", 1) * at_once * length
    return total


def free_bytes(device: torch.device) -> int:
    """Return the memory that new tensors can take on the device, in bytes."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    gc.collect()  # a cache that a patched model filled refers to itself, and holds its memory until then
    return psutil.virtual_memory().available


def max_batch_size(
    model: Any, device: torch.device, length: int, *, cache_bytes: int = 0, logits: int = 1, chunk: int | None = None
) -> int:
    """Return how many sequences of `length` tokens fit into one forward pass.

    Args:
        model: The model.
        device: Device of the forward pass.
        length: Tokens of each sequence.
        cache_bytes: Bytes per token in the cache.
        logits: Positions per sequence whose logits the forward pass returns.
        chunk: Most tokens of a sequence that one forward pass reads; None for all.

    Raises:
        PePatchError: Not even one sequence fits into the free memory.
    """
    needed, free = sequence_bytes(model, length, cache_bytes, logits, chunk), free_bytes(device)
    fitting = int(USABLE_MEMORY * free) // max(1, needed)
    if fitting < 1:
        raise PePatchError(
            f"A sequence of {length} tokens takes about {needed / 2**30:.1f} GiB in addition to the weights, and only "
            f"{free / 2**30:.1f} GiB are free on {device}. Use a shorter length, a smaller dtype, a scheme with a "
            "smaller cache or prefill_chunk=2048. batch_size=1 skips this check."
        )
    return max(1, min(fitting, TOKENS_PER_BATCH.get(device.type, TOKENS_PER_BATCH["cuda"]) // length))
