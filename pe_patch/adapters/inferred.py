"""Hold the adapters that were inferred from a model, for families without a row, and name those that were verified."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

from torch import nn

from .adapter import Adapter

INFERRED: weakref.WeakKeyDictionary[nn.Module, Adapter] = weakref.WeakKeyDictionary()
"""The adapter that was inferred for each base model. A row of `ADAPTERS` takes precedence."""
LATEST: weakref.WeakKeyDictionary[type, Adapter] = weakref.WeakKeyDictionary()
"""The adapter that was verified last on a model of each class, which the next model tries first."""


VERIFIED: Mapping[str, str] = MappingProxyType(
    {
        "afmoe": "Trinity",
        "bailing_hybrid": "Ling and Ring 2.5",
        "bamba": "Bamba 9B",
        "bart": "BART's decoder",
        "bert": "BERT, MiniLM and E5 encoders",
        "cwm": "Code World Model",
        "dbrx": "DBRX",
        "deepseek_v32": "DeepSeek-V3.2",
        "diffllama": "DiffLlama",
        "doge": "Doge",
        "dots1": "dots.llm1",
        "electra": "ELECTRA",
        "emu3_text_model": "Emu3",
        "ernie4_5": "ERNIE 4.5 0.3B",
        "ernie4_5_moe": "ERNIE 4.5 21B-A3B",
        "exaone_moe": "K-EXAONE",
        "falcon_h1": "Falcon-H1",
        "flex_olmo": "FlexOlmo",
        "gemma3n_text": "Gemma 3n",
        "gemma4_text": "Gemma 4",
        "glm4_moe": "GLM-4.5, GLM-4.6",
        "glm_moe_dsa": "GLM-5",
        "granitemoehybrid": "Granite 4",
        "hyperclovax": "HyperCLOVA X SEED",
        "internlm3": "InternLM3 8B",
        "jais2": "Jais 2",
        "jamba": "Jamba",
        "jetmoe": "JetMoE 8B",
        "kimi_linear": "Kimi Linear",
        "lfm2": "LFM2",
        "lfm2_moe": "LFM2 8B-A1B",
        "longcat_flash": "LongCat-Flash",
        "marian": "OPUS-MT's decoder",
        "mimo_v2_flash": "MiMo-V2-Flash",
        "minimax": "MiniMax-Text-01, MiniMax-M1",
        "minimax_m2": "MiniMax-M2",
        "ministral3": "Ministral 3",
        "mllama_text_model": "Llama 3.2 Vision",
        "modernbert-decoder": "Ettin decoders",
        "moshi": "Moshi",
        "nemotron_h": "Nemotron-H, Nemotron 3 Nano",
        "olmo_hybrid": "OLMo Hybrid",
        "phi4_multimodal": "Phi-4 multimodal",
        "qwen3_5_moe_text": "Qwen3.5 MoE",
        "qwen3_5_text": "Qwen3.5",
        "qwen3_next": "Qwen3-Next 80B-A3B",
        "recurrent_gemma": "RecurrentGemma",
        "roberta": "RoBERTa",
        "solar_open": "Solar Open",
        "vaultgemma": "VaultGemma",
        "whisper": "Whisper's decoder",
        "xlm-roberta": "XLM-R, BGE-M3 and E5 multilingual encoders",
        "zamba2": "Zamba2",
    }
)
"""Well-known models of the families without a row whose inferred adapter was verified (`tests/test_model_types.py`)."""


@dataclass(frozen=True)
class RotatingLayers:
    """A value of `Adapter.rotates` for a family whose attentions have no attribute that says whether they rotate."""

    layers: frozenset[int]
    """Indices of the layers that rotate."""

    def __call__(self, attention: Any) -> bool:
        """Return whether this attention rotates."""
        return attention.layer_idx in self.layers


def adapter_row(adapter: Adapter) -> str:
    """Return an adapter as the Python expression that builds it."""
    given = (
        f"{each.name}={getattr(adapter, each.name)!r}"
        for each in fields(adapter)
        if getattr(adapter, each.name) != each.default
    )
    return f"Adapter({', '.join(given)})"
