"""lm-eval's model, with an error wherever it would cut a prompt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from lm_eval.models import huggingface
from lm_eval.models.utils import normalize_gen_kwargs

from ...errors import PePatchError

HFLM: Any = huggingface.HFLM  # its decorator hides its type


class UncutLM(HFLM):
    """A loaded model and its tokenizer for lm-eval; `max_length` tokens are the most that it is given.

    HFLM drops the beginning of what is longer, with a warning. Here all requests are counted before the first is run,
    and one that would be cut raises `PePatchError`. `longest[task]` is the most tokens that a request of a task took,
    its answer included. `made_to_length` is the length that the task was made at, if it was.
    """

    def __init__(
        self, model: Any, tokenizer: Any, max_length: int, batch_size: int, autocast: torch.dtype | None
    ) -> None:
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            max_length=max_length,
            batch_size=batch_size,
            mixed_precision_dtype=autocast,
        )
        self.longest: dict[str, int] = {}
        self.made_to_length: int | None = None
        self._asked: list[str] = []
        self._uncounted = 0

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        needed = [len(self.tok_encode(request.args[0])) + self._room(request.args[1]) for request in requests]
        if self.made_to_length is not None:
            counted = [request.doc.get("length", 0) for request in requests]
            self._uncounted = max(tokens - own for tokens, own in zip(needed, counted, strict=True))
        self._check([request.task_name for request in requests], needed)
        return super().generate_until(requests, disable_tqdm)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self._asked = [request.task_name for request in requests]
        try:
            return super().loglikelihood(requests, disable_tqdm)
        finally:
            self._asked = []

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        # Cut into windows by definition: nothing is too long.
        needed = [min(len(self.tok_encode(request.args[0])), self.max_length) for request in requests]
        self._check([request.task_name for request in requests], needed)
        return super().loglikelihood_rolling(requests, disable_tqdm)

    def _loglikelihood_tokens(self, requests: list[Any], *arguments: Any, **options: Any) -> list[tuple[float, bool]]:
        if self._asked:
            # The last token is predicted, not read.
            self._check(self._asked, [len(context) + len(answer) - 1 for _, context, answer in requests])
        return super()._loglikelihood_tokens(requests, *arguments, **options)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **kwargs: Any
    ) -> list[int]:
        ids = super().tok_encode(string, add_special_tokens, **kwargs)
        self._check_room(len(ids), left_truncate_len)
        return ids

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ids, mask = super().tok_batch_encode(strings, padding_side, truncation=truncation)
        self._check_room(ids.shape[1], left_truncate_len)
        return ids, mask

    def _room(self, generation: Mapping[str, Any]) -> int:
        """How many tokens an answer may take."""
        settings: Any = normalize_gen_kwargs(dict(generation), self.max_gen_toks)
        return settings["max_gen_toks"]

    def _check(self, tasks: Sequence[str], needed: Iterable[int]) -> None:
        """Note how many tokens the requests need, and refuse them if one needs more than the model is given."""
        counted = list(zip(tasks, needed, strict=True))
        for task, tokens in counted:
            self.longest[task] = max(tokens, self.longest.get(task, 0))
        over = [(task, tokens) for task, tokens in counted if tokens > self.max_length]
        if over:
            task, tokens = max(over, key=lambda pair: pair[1])
            raise PePatchError(
                f"lm-eval would cut {len(over)} of {len(counted)} prompts from the left: the longest, of {task}, takes "
                f"{tokens} tokens with its answer, and the model is given {self.max_length}. {self._remedy()}"
            )

    def _check_room(self, tokens: int, room: int | None) -> None:
        if room is not None and tokens > room:
            raise PePatchError(
                f"lm-eval would cut a prompt of {tokens} tokens to its last {room}: the model is given "
                f"{self.max_length} with the answer. {self._remedy()}"
            )

    def _remedy(self) -> str:
        usual = "Extend the window with patch_model(...), raise max_length if it is below the window, or leave it out."
        if self.made_to_length is None:
            return usual
        return (
            f"lm-eval does not count the {self._uncounted} tokens that it puts behind RULER's questions to begin the "
            f"answer: ask for a length of {self.max_length - self._uncounted} or less. {usual}"
        )
