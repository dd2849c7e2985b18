"""How text becomes the ids that a model is given: special tokens, chat template, and nothing dropped on the way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import OptionError
from .corpus import whole_ids
from .retrieval import encode, start_ids

_MARK = "\N{SYMBOL FOR START OF TEXT}"


@dataclass(frozen=True)
class Frame:
    """What stands around a prompt. `head` comes before it; `tail` between it and the beginning of the answer."""

    head: str = ""
    tail: str = ""
    chat: bool = False

    @classmethod
    def of(cls, tokenizer: Any, chat: bool) -> Frame:
        """The tokenizer's chat template cut open, or an empty frame.

        Raises:
            OptionError: a chat template is asked for and the tokenizer has none.
        """
        if not chat:
            return cls()
        if not getattr(tokenizer, "chat_template", None):
            raise OptionError("chat=True needs a tokenizer with a chat template; this one has none. Leave it out.")
        message = [{"role": "user", "content": _MARK}]
        whole = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        head, mark, tail = whole.partition(_MARK)
        if not mark:
            raise OptionError("The tokenizer's chat template does not show the user's message: it cannot be used.")
        return cls(head, tail, chat=True)

    def head_ids(self, tokenizer: Any) -> np.ndarray:
        """What every prompt starts with: the head, or the token that the tokenizer starts a text with."""
        return encode(tokenizer, self.head) if self.chat else start_ids(tokenizer)

    def ids(self, tokenizer: Any, text: str, answer_prefix: str = "") -> np.ndarray:
        """The ids [n] of a whole prompt that ends where the answer starts; refused if the tokenizer drops a part."""
        if self.chat:
            return whole_ids(tokenizer, f"{self.head}{text}{self.tail}{answer_prefix}")
        return np.concatenate([start_ids(tokenizer), whole_ids(tokenizer, text + answer_prefix)])
