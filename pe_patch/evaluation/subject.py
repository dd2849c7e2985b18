"""What evaluation asks of the model it measures: its windows, its scheme, its answers and its losses."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import GenerationConfig

from pe_patch.adapters.adapter import native_window
from pe_patch.describe import describe
from pe_patch.errors import PePatchError

TOKENS_PER_BATCH = 8192
"""How many tokens a forward takes where no batch size is given."""


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
    return native_window(config) or None, limit


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


@dataclass
class Subject:
    """A model with its tokenizer, asked for answers and losses in batches of equal length, so that nothing is padded.

    `advance(tokens)` is called after every forward. `autocast` is a dtype for torch.autocast, or None.
    """

    model: Any
    tokenizer: Any
    batch_size: int | None = None
    autocast: torch.dtype | None = None
    advance: Any = field(default=lambda tokens: None)

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

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

    def answers(self, samples: list[Any]) -> list[str]:
        """What the model writes after each prompt, greedily, as many tokens as the right answer has."""
        answers = [""] * len(samples)
        sizes = {(len(sample.input_ids), len(sample.answer_ids)) for sample in samples}
        for prompt_length, budget in sorted(sizes):
            alike = [
                index
                for index, sample in enumerate(samples)
                if (len(sample.input_ids), len(sample.answer_ids)) == (prompt_length, budget)
            ]
            for chunk in self._chunks(alike, prompt_length + budget):
                ids = self._tensor([samples[index].input_ids for index in chunk])
                for index, answer in zip(chunk, self._continue(ids, budget), strict=True):
                    answers[index] = self.tokenizer.decode(answer, skip_special_tokens=False)
                self.advance(len(chunk) * (prompt_length + budget))
        return answers

    def _continue(self, ids: torch.Tensor, budget: int) -> list[list[int]]:
        with self.ready():
            if budget == 1:
                # One greedy token is the argmax after the prompt: no cache needed.
                logits = self.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
                return logits[:, -1:].argmax(-1).tolist()
            greedy = GenerationConfig(
                max_new_tokens=budget,
                do_sample=False,
                num_beams=1,
                pad_token_id=self._filler(),
                eos_token_id=self.tokenizer.eos_token_id,
            )
            with _generating_by(self.model, greedy):
                written = self.model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=greedy
                )
        if not torch.equal(written[:, : ids.shape[1]], ids):
            raise PePatchError("generate() did not return the prompt it was given: the prompt was cut or changed.")
        return written[:, ids.shape[1] :].tolist()

    def losses(self, sequences: list[np.ndarray], targets: int) -> np.ndarray:
        """The loss in nats of the last `targets` tokens of each sequence [sequences, targets]; all equally long."""
        length = len(sequences[0])
        rows = []
        for chunk in self._chunks(list(range(len(sequences))), length):
            ids = self._tensor([sequences[index] for index in chunk])
            with self.ready():
                logits = self.model(input_ids=ids, use_cache=False, logits_to_keep=targets + 1).logits[
                    :, -targets - 1 : -1
                ]
            wanted = ids[:, -targets:]
            loss = F.cross_entropy(logits.float().flatten(0, 1), wanted.flatten(), reduction="none")
            rows.append(loss.view(wanted.shape).double().cpu().numpy())
            self.advance(ids.numel())
        return np.concatenate(rows)

    def _filler(self) -> int:
        candidates = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(token for token in candidates if token is not None)

    def _chunks(self, items: list[int], length: int) -> Iterator[list[int]]:
        size = self.batch_size or max(1, TOKENS_PER_BATCH // length)
        for start in range(0, len(items), size):
            yield items[start : start + size]

    def _tensor(self, rows: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.stack(rows)).to(self.device)


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
