"""Fixtures for evaluation tests: a small tokenizer, a text, and models with known answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationMixin, LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerFast as FastTokenizer
from transformers.modeling_outputs import CausalLMOutput

from pe_patch.evaluation.run import evaluate

WORDS = (
    "the a of door river stone lamp under over runs walks falls bright cold seven small quickly and then but".split()
)


def make_text(lines: int = 400, seed: int = 0) -> str:
    rng = np.random.default_rng(seed)
    return "\n".join(" ".join(rng.choice(WORDS, rng.integers(4, 12))) for _ in range(lines))


def make_tokenizer(**options: Any) -> FastTokenizer:
    """Train byte-level BPE on the text above, with single digits and the demo's key and value tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([make_text()], trainer)
    backend.add_tokens([f"<{kind}{index}>" for kind in "kv" for index in range(64)])
    return FastTokenizer(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>", **options)


class DoubleConfig(PreTrainedConfig):
    model_type = "pe_patch_test_double"


class _Double(PreTrainedModel, GenerationMixin):
    """A model with a dummy weight that predicts the token that `next_token` returns."""

    config_class = DoubleConfig
    main_input_name = "input_ids"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.embedding = torch.nn.Embedding(config.vocab_size, 1)

    def get_input_embeddings(self) -> Any:
        return self.embedding

    def next_token(self, ids: list[int]) -> int:
        raise NotImplementedError

    def forward(
        self, input_ids: torch.Tensor, attention_mask: Any = None, logits_to_keep: int = 0, **kwargs: Any
    ) -> Any:
        kept = logits_to_keep or input_ids.shape[1]
        logits = torch.zeros(input_ids.shape[0], kept, self.config.vocab_size)
        for row, ids in enumerate(input_ids.tolist()):
            logits[row, -1, self.next_token(ids)] = 1.0
        return CausalLMOutput(logits=logits)

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        return {"input_ids": input_ids, "logits_to_keep": 1}

    def _update_model_kwargs_for_generation(self, outputs: Any, model_kwargs: Any, *rest: Any, **more: Any) -> Any:
        return model_kwargs


class Copier(_Double):
    """A model that finds the longest earlier occurrence of the last ids, and repeats the token after it.

    It reads only the last `config.sees` ids, as a pipeline that truncates would leave it.
    """

    def next_token(self, ids: list[int]) -> int:
        ids = ids[-self.config.sees :]
        best, best_length = 0, 0
        for end in range(len(ids) - 1):
            length = 0
            while length <= end and ids[end - length] == ids[-1 - length]:
                length += 1
            if length >= best_length and length > 0:
                best, best_length = ids[end + 1], length
        return best


class Mute(_Double):
    """A model that always predicts the end of the text."""

    def next_token(self, ids: list[int]) -> int:
        return 0


def double(kind: type[_Double], tokenizer: Any, window: int = 4096, sees: int = 10**9) -> Any:
    config = DoubleConfig(
        vocab_size=len(tokenizer), max_position_embeddings=window, num_hidden_layers=1, sees=sees, use_cache=False
    )
    return kind(config).eval()


def tiny_llama(vocabulary: int, window: int = 64, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=window,
        initializer_range=0.2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


TEXT = [make_text(400, seed) for seed in range(3)]


def measure(model: Any, tokenizer: Any, tasks: Any, lengths: Any, **options: Any) -> Any:
    """Run a small evaluation on the texts above."""
    return evaluate(model, tokenizer, tasks, lengths, **{"text": TEXT, "progress": False, "samples": 4} | options)
