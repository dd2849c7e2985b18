"""lm-eval's model class, with an error wherever it would cut a prompt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from lm_eval.models import huggingface
from lm_eval.models.utils import normalize_gen_kwargs

from ... import compat
from ...errors import PePatchError

HFLM: Any = huggingface.HFLM  # its decorator hides its type


class NoTruncationLM(compat.ChecksRequests, HFLM):
    """A loaded model and its tokenizer for lm-eval, which raises `PePatchError` rather than cut a prompt.

    HFLM drops the beginning of a longer prompt with a warning. This class counts the tokens of all requests before it
    runs the first one.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        max_length: Maximum tokens of a prompt and its answer.
        batch_size: Sequences per forward pass.
        autocast: Dtype for torch.autocast, or None.
        bos: Start every prompt with BOS. None does as the tokenizer does.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        max_length: int,
        batch_size: int,
        autocast: torch.dtype | None,
        bos: bool | None = None,
    ) -> None:
        inner: Any = super()
        inner.__init__(
            pretrained=model,
            tokenizer=tokenizer,
            max_length=max_length,
            batch_size=batch_size,
            mixed_precision_dtype=autocast,
            add_bos_token=bos,
        )
        self.longest: dict[str, int] = {}
        """Maximum tokens of a request by task, answer included."""
        self.generated_length: int | None = None
        """Length at which RULER's task made its prompts; None for other tasks."""
        self._task_names: list[str] = []
        self._uncounted = 0

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Generate answers after checking the length of every request."""
        needed = [len(self.tok_encode(request.args[0])) + self._max_new_tokens(request.args[1]) for request in requests]
        if self.generated_length is not None:
            counted = [request.doc.get("length", 0) for request in requests]
            self._uncounted = max(tokens - length for tokens, length in zip(needed, counted, strict=True))
        self._check_requests([request.task_name for request in requests], needed)
        return super().generate_until(requests, disable_tqdm)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Score answers. `check_tokens` checks their lengths."""
        self._task_names = [request.task_name for request in requests]
        try:
            return super().loglikelihood(requests, disable_tqdm)
        finally:
            self._task_names = []

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Score whole texts in windows. No text is too long for that."""
        needed = [min(len(self.tok_encode(request.args[0])), self.max_length) for request in requests]
        self._check_requests([request.task_name for request in requests], needed)
        return super().loglikelihood_rolling(requests, disable_tqdm)

    def check_tokens(self, requests: list[Any]) -> None:
        """Check the lengths of the requests of `loglikelihood`."""
        if self._task_names:
            # The model predicts the last token without reading it.
            self._check_requests(self._task_names, [len(context) + len(answer) - 1 for _, context, answer in requests])

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **kwargs: Any
    ) -> list[int]:
        """Encode a string. Raises `PePatchError` instead of truncating to `left_truncate_len`."""
        ids = super().tok_encode(string, add_special_tokens, **kwargs)
        self._check_truncation(len(ids), left_truncate_len)
        return ids

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode and pad strings. Raises `PePatchError` instead of truncating to `left_truncate_len`."""
        ids, mask = super().tok_batch_encode(strings, padding_side, truncation=truncation)
        self._check_truncation(ids.shape[1], left_truncate_len)
        return ids, mask

    def _max_new_tokens(self, generation: Mapping[str, Any]) -> int:
        settings: Any = normalize_gen_kwargs(dict(generation), self.max_gen_toks)
        return settings["max_gen_toks"]

    def _check_requests(self, tasks: Sequence[str], needed: Iterable[int]) -> None:
        """Record the tokens of each task's longest request, and raise if a request exceeds `max_length`."""
        requests = list(zip(tasks, needed, strict=True))
        for task, tokens in requests:
            self.longest[task] = max(tokens, self.longest.get(task, 0))
        too_long = [(task, tokens) for task, tokens in requests if tokens > self.max_length]
        if too_long:
            task, tokens = max(too_long, key=lambda pair: pair[1])
            raise PePatchError(
                f"lm-eval would cut {len(too_long)} of {len(requests)} prompts from the left: the longest, of {task}, "
                f"takes {tokens} tokens with its answer, and the model is given {self.max_length}. {self._remedy()}"
            )

    def _check_truncation(self, tokens: int, limit: int | None) -> None:
        if limit is not None and tokens > limit:
            raise PePatchError(
                f"lm-eval would cut a prompt of {tokens} tokens to its last {limit}: the model is given "
                f"{self.max_length} with the answer. {self._remedy()}"
            )

    def _remedy(self) -> str:
        general = (
            "Extend the window with patch_model(...), raise max_length if it is below the window, or leave the task "
            "out."
        )
        if self.generated_length is None:
            return general
        return (
            f"lm-eval does not count the {self._uncounted} tokens that it appends to RULER's questions to begin the "
            f"answer: use a length of {self.max_length - self._uncounted} or less. {general}"
        )
