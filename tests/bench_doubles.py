"""An evaluation context whose model gives the answers of a test function, for tests of tasks without a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from pe_patch.evaluation.context import EvaluationContext, PromptTemplate
from pe_patch.evaluation.corpus import Corpus
from pe_patch.evaluation.question import Question

CHAT = "{% for m in messages %}<user>{{ m.content }}</user>{% endfor %}{% if add_generation_prompt %}<model>{% endif %}"


class Answering:
    """A replacement for the model that answers each question with the function `answer`."""

    device = torch.device("cpu")
    autocast = None

    def __init__(self, tokenizer: Any, answer: Callable[[Question], str]) -> None:
        self.tokenizer, self.answer = tokenizer, answer

    def answers(self, questions: Sequence[Question]) -> list[str]:
        return [self.answer(question) for question in questions]


def make_bench(
    tokenizer: Any,
    *,
    answer: Callable[[Question], str] = lambda question: "",
    texts: Sequence[str] = ("some text of no consequence\n" * 20,),
    chat: bool = False,
    bos: bool | None = None,
    **options: Any,
) -> EvaluationContext:
    settings: dict[str, Any] = {"lengths": [1024], "depths": [0.0, 0.5, 1.0], "samples": 6, "seed": 0}
    settings |= {"control_length": 512, "scheme": "native", "tokenizer_hash": ""} | options
    model: Any = Answering(tokenizer, answer)
    corpus = Corpus.load(tokenizer, list(texts), needed=1)
    return EvaluationContext(model=model, corpus=corpus, template=PromptTemplate.of(tokenizer, chat, bos), **settings)
