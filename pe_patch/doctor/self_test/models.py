"""The models of the self-test and their input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig, GPTNeoXConfig

from ...checkpoints.load import load_model, load_tokenizer
from ...checkpoints.sources import check_device, check_source, full_dtype
from ...data.packaged import DEMO_MODEL
from ...errors import CheckpointError, UnsupportedError
from ...patching.api import find_patch, unpatch_model
from ...patching.inference import known_adapter

DTYPES = ("float32", "bfloat16", "float16")
TOKENS = 74
"""Tokens of the sequence that the checks read."""
PROMPT = 58
"""Tokens read in the first pass, before the passes of one token."""
TOLERANCE = 1e-4
"""The relative difference due to rounding in float32, for models of a few layers."""
USER_MODEL_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02}
"""The same for a model of any depth, by dtype."""

TEXT = '''def parse(lines, separator=":"):
    """Return the pairs of a list of lines, in the order in which they stand."""
    pairs = {}
    for number, line in enumerate(lines):
        name, _, value = line.partition(separator)
        if not value:
            raise ValueError(f"line {number} has no separator")
        pairs[name.strip()] = value.strip()
    return pairs
'''


@dataclass(frozen=True)
class Case:
    """A model to check."""

    name: str
    model: Any
    ids: Tensor
    """`[1, TOKENS]`."""
    tolerance: float
    may_refuse: bool
    """True to skip a scheme that the family refuses; False to count a refusal as a failure."""
    refuses: frozenset[str] = field(default_factory=frozenset)
    """Schemes that this family always refuses."""
    tokenizer: Any = None
    counts_padding: bool = False
    """True if the unpatched model counts padding as positions without position ids, as learned positions do."""

    @property
    def padded(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """A batch of two rows, its mask and its position ids, each `[2, TOKENS]`.

        The first row is the last third of the sequence, padded on the left; the second is the whole sequence. The
        position ids are None unless the unpatched model needs them.
        """
        empty = TOKENS - TOKENS // 3
        ids, mask = self.ids.repeat(2, 1), torch.ones(2, TOKENS, dtype=torch.long, device=self.ids.device)
        ids[0, :empty], mask[0, :empty] = 0, 0
        return ids, mask, (mask.cumsum(1) - 1).clamp(min=0) if self.counts_padding else None


def built_in_cases() -> dict[str, Callable[[], Case]]:
    """Return functions that build the demo model and a random model of two other families, by name."""
    return {"demo": _demo, "random bloom": partial(_random, "bloom"), "random gpt_neox": partial(_random, "gpt_neox")}


def given_case(model: str | Path | None, dtype: str, device: str | None) -> list[Callable[[], Case]]:
    """Return the function that loads the user's model in a list, or an empty list if `model` is None."""
    dtype = full_dtype(dtype, DTYPES)
    device = check_device(device)
    return [] if model is None else [partial(_given, str(model), dtype, device)]


def _demo() -> Case:
    folder = DEMO_MODEL
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"There is no demo model in {folder}. Reinstall pe_patch.")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return Case("demo", model, _text_ids(tokenizer), TOLERANCE, may_refuse=False, tokenizer=tokenizer)


def _random(family: str) -> Case:
    """Build a seeded model of two layers, with weights large enough for positions to matter."""
    sizes: dict[str, Any] = {
        "vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
    }  # fmt: skip
    if family == "gpt_neox":
        rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
        config: Any = GPTNeoXConfig(**sizes, intermediate_size=128, max_position_embeddings=128, rope_parameters=rope)
    else:
        config = BloomConfig(**sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
    # Latent attention needs a rotation, which BLOOM does not have.
    refuses = frozenset({"mla"}) if family == "bloom" else frozenset()
    return Case(f"random {family}", model, _random_ids(97), TOLERANCE, may_refuse=False, refuses=refuses)


def _given(name: str, dtype: str, device: str | None) -> Case:
    name = check_source(name)
    model = load_model(name, dtype=getattr(torch, dtype))
    if find_patch(model) is not None:
        unpatch_model(model)
    text_config = model.config.get_text_config()
    adapter, window = known_adapter(model), getattr(text_config, "max_position_embeddings", None)
    if adapter is not None and adapter.learned and window and window < TOKENS:
        raise UnsupportedError(f"{name} has positions for {window} tokens; the self-test reads {TOKENS}.")
    model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    try:
        tokenizer = load_tokenizer(name)
        ids = _text_ids(tokenizer)
    except (OSError, ValueError):  # without a tokenizer, the model reads random tokens
        tokenizer, ids = None, _random_ids(text_config.vocab_size)
    tolerance = USER_MODEL_TOLERANCE[dtype]
    learned = adapter is not None and adapter.learned is not None
    return Case(
        name, model, ids.to(model.device), tolerance, may_refuse=True, tokenizer=tokenizer, counts_padding=learned
    )


def _text_ids(tokenizer: Any) -> Tensor:
    ids: list[int] = tokenizer(TEXT, add_special_tokens=False, verbose=False)["input_ids"]
    if not ids:
        raise ValueError("the tokenizer returns no tokens for the text")
    return torch.tensor([(ids * (TOKENS // len(ids) + 1))[:TOKENS]])


def _random_ids(vocabulary: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(min(3, vocabulary - 1), vocabulary, (1, TOKENS), generator=generator)
