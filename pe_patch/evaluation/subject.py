"""What evaluation asks of the model it measures: its windows, its scheme, its answers and its losses."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from ..adapters.trained_window import trained_window
from ..patching.description import describe
from . import planning
from .generation import greedy_answers

if TYPE_CHECKING:
    from .questions import Question

SAMPLED = 512
"""Numbers read of each weight for a fingerprint."""


def windows(model: Any) -> tuple[int | None, int | None]:
    """(native, effective) window in tokens: what the model was trained at, and what it is meant for now.

    None stands for "nothing says so" or, as the effective window of a patched model, for "nothing bounds it".
    """
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if getattr(model.config, "pe_patch", None):
        effective = describe(model).to_dict()["effective"]
        bound = effective.get("effective_window")
        return effective.get("trained_window") or limit, bound if isinstance(bound, int) else None
    return trained_window(model, config).length, limit


def scheme_label(model: Any) -> str:
    """A short name of the model's positions: the patch's scheme, or the scaling its configuration names."""
    record = getattr(model.config, "pe_patch", None)
    if record:
        options = ", ".join(f"{key}={value}" for key, value in (record.get("options") or {}).items())
        return f"{record['scheme']}({options})" if options else str(record["scheme"])
    scaling = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    kind = scaling.get("rope_type", "default")
    return "native" if kind == "default" else f"native {kind}"


def tokenizer_hash(tokenizer: Any) -> str:
    """Twelve hexadecimal digits that change with anything in the tokenizer that changes ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(state.encode()).hexdigest()[:12]


def model_fingerprint(model: Any) -> str:
    """Twelve hexadecimal digits that change with the configuration, the scheme, the dtype or the weights.

    Of each weight `SAMPLED` numbers are read, evenly spread: training changes nearly all of them.
    """
    config = {key: value for key, value in model.config.to_dict().items() if key != "_name_or_path"}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in model.state_dict().items():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        flat = weight.detach().reshape(-1)
        step = max(1, flat.numel() // SAMPLED)
        digest.update(flat[::step].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


@dataclass
class Subject:
    """A model with its tokenizer, asked for answers and losses in as large batches as memory allows.

    `batch_size` overrides what is planned. `advance(tokens)` is called after every forward. `autocast` is a dtype for
    torch.autocast, or None.
    """

    model: Any
    tokenizer: Any
    batch_size: int | None = None
    autocast: torch.dtype | None = None
    advance: Any = field(default=lambda tokens: None)

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @cached_property
    def cache_bytes(self) -> int:
        """What a token leaves in the cache, measured once; 0 for a model that keeps none."""
        with self.ready():
            return planning.cache_size(self.model).bytes if planning.keeps_cache(self.model) else 0

    def batch(self, length: int, *, logits: int = 1, cached: bool = True) -> int:
        """How many sequences of `length` tokens to take at once."""
        if self.batch_size is not None:
            return self.batch_size
        kept = self.cache_bytes if cached else 0
        return planning.batch_size(self.model, self.device, length, cache_bytes=kept, logits=logits)

    def filler(self) -> int:
        """The token that fills the left of shorter rows, which nothing attends to."""
        candidates = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(token for token in candidates if token is not None)

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """Evaluation mode without gradients; the training mode is put back afterwards."""
        was_training = self.model.training
        self.model.eval()
        enabled = self.autocast is not None
        try:
            with torch.inference_mode(), torch.autocast(self.device.type, self.autocast, enabled=enabled):
                yield
        finally:
            self.model.train(was_training)

    def answers(self, questions: Sequence[Question]) -> list[str]:
        """What the model writes after each prompt, greedily, at most as many tokens as the question allows."""
        return greedy_answers(self, questions)

    def losses(self, sequences: Sequence[np.ndarray], targets: int) -> np.ndarray:
        """The loss in nats of the last `targets` tokens of each sequence [sequences, targets]; all equally long."""
        length, rows = len(sequences[0]), []
        size = self.batch(length, logits=targets + 1, cached=False)
        for start in range(0, len(sequences), size):
            ids = torch.from_numpy(np.stack(sequences[start : start + size])).to(self.device)
            with self.ready():
                logits = self.model(input_ids=ids, use_cache=False, logits_to_keep=targets + 1).logits[
                    :, -targets - 1 : -1
                ]
            wanted = ids[:, -targets:]
            loss = F.cross_entropy(logits.float().flatten(0, 1), wanted.flatten(), reduction="none")
            rows.append(loss.view(wanted.shape).double().cpu().numpy())
            self.advance(ids.numel())
        return np.concatenate(rows)


class Rehearsal(Subject):
    """Stands in for a model that is not to be run: it answers nothing and has no loss.

    Everything else of an evaluation happens: texts are read, questions made, answers scored.
    """

    def answers(self, questions: Sequence[Question]) -> list[str]:
        return [""] * len(questions)

    def losses(self, sequences: Sequence[np.ndarray], targets: int) -> np.ndarray:
        return np.zeros((len(sequences), targets))
