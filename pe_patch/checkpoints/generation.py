"""Generate text with a loaded model, for the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import OptionError
from ..patching.prefill import check_prefill_chunk


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Without a temperature, `top_p` or `top_k` it is the likeliest one."""

    temperature: float | None = None
    """0 chooses the likeliest token; None is 1 if another option asks for sampling."""
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise OptionError(f"top_p={self.top_p:g} must be above 0 and at most 1.")
        if self.temperature == 0 and (self.top_p is not None or self.top_k is not None):
            raise OptionError(
                "temperature=0 always takes the likeliest token, so top_p and top_k have no effect: leave them out, or "
                "raise the temperature."
            )
        if self.seed is not None and not self.samples:
            raise OptionError("seed has no effect without sampling. Example: temperature=0.7.")

    @property
    def samples(self) -> bool:
        """Return whether tokens are drawn at random."""
        return bool(self.temperature) or self.top_p is not None or self.top_k is not None

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of `generate`, which replace the defaults of the model's generation config."""
        if not self.samples:
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        temperature = 1.0 if self.temperature is None else self.temperature
        return {"do_sample": True, "temperature": temperature, "top_p": self.top_p or 1.0, "top_k": self.top_k or 0}


@dataclass(frozen=True)
class Generated:
    """New text, without special tokens, and the number of new tokens."""

    text: str
    tokens: int


def encode(tokenizer: Any, text: str, *, chat: bool = False, system: str | None = None) -> Tensor:
    """Return the token ids of a prompt, `[1, tokens]`.

    Args:
        tokenizer: the model's tokenizer.
        text: the prompt, or the user's message.
        chat: put the message into the tokenizer's chat template.
        system: system message before it.

    Raises:
        OptionError: the tokenizer has no chat template, or its template does not take the messages.
    """
    if not text:
        raise OptionError("The prompt is empty.")
    if not chat:
        return tokenizer(text, return_tensors="pt", verbose=False)["input_ids"]
    if not getattr(tokenizer, "chat_template", None):
        raise OptionError("chat=True needs a tokenizer with a chat template; this one has none. Leave it out.")
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": text})
    try:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    except Exception as error:  # templates raise their own errors, such as "System role not supported"
        raise OptionError(f"This tokenizer's chat template does not take these messages: {error}") from error
    return torch.tensor([ids])


def continue_ids(
    model: Any,
    tokenizer: Any,
    ids: Tensor,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stream: Callable[[str], None] | None = None,
    prefill_chunk: int | None = None,
) -> Generated:
    """Generate after a prompt.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        ids: token ids of the prompt, `[1, tokens]`.
        max_new_tokens: maximum number of new tokens.
        sampling: how tokens are chosen; None takes the likeliest.
        stream: called with each piece of text as it is generated.
        prefill_chunk: most tokens of the prompt that one forward pass reads; None for all.

    Raises:
        OptionError: `prefill_chunk` would change the logits.
    """
    new = new_ids(model, tokenizer, ids, max_new_tokens, sampling, stream, prefill_chunk)
    return Generated(tokenizer.decode(new, skip_special_tokens=True), len(new))


def new_ids(
    model: Any,
    tokenizer: Any,
    ids: Tensor,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stream: Callable[[str], None] | None = None,
    prefill_chunk: int | None = None,
) -> Tensor:
    """Return the token ids that a model generates after a prompt, `[tokens]`; the arguments are `continue_ids`'s."""
    from transformers import TextStreamer

    check_prefill_chunk(model, prefill_chunk)
    sampling, ids = sampling or Sampling(), ids.to(model.device)
    streamer = None
    if stream is not None:
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        streamer.on_finalized_text = lambda text, stream_end=False: stream(text)
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            streamer=streamer,
            prefill_chunk_size=prefill_chunk if prefill_chunk and ids.shape[1] > prefill_chunk else None,
            **sampling.arguments(),
        )
    return output[0, ids.shape[1] :]
