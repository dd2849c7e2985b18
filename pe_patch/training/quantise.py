"""Train adapters on frozen 4-bit weights (QLoRA, arXiv 2305.14314) with bitsandbytes."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from ..checkpoints.load import load_adapted
from .recipe import Recipe, RecipeError

INSTALL = 'pip install "pe_patch[qlora]"'


def quantisation_config(recipe: Recipe) -> BitsAndBytesConfig | None:
    """Return the `quantization_config` for `from_pretrained`, or None if the recipe does not quantise.

    It uses NF4 with double quantisation, as in the paper (sections 2 and 3). Matrix products run in bfloat16 if the
    recipe trains in bfloat16, and in float32 otherwise.

    Raises:
        RecipeError: `lora` or `model.source` is missing, or bitsandbytes is not installed.
    """
    if recipe.model.quantization is None:
        return None
    if recipe.lora is None:
        raise RecipeError("model.quantization freezes the weights in 4 bits; add a lora: section to train adapters.")
    if recipe.model.source is None:
        raise RecipeError("model.quantization needs model.source: it cannot quantise fresh weights.")
    if find_spec("bitsandbytes") is None:
        raise RecipeError(f"model.quantization: {recipe.model.quantization} needs bitsandbytes: {INSTALL}.")
    narrow = recipe.mixed_precision == "bf16" or recipe.model.dtype == "bfloat16"
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=recipe.model.quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if narrow else torch.float32,
    )


def prepare_quantised(model: Any, recipe: Recipe) -> Any:
    """Prepare a patched, quantised model for `get_peft_model`.

    Freezes all weights, casts norms, embeddings and the scheme's parameters to float32, and lets gradients reach the
    first checkpointed layer.
    """
    from peft import prepare_model_for_kbit_training

    for module in model.modules():
        # On a CPU with bfloat16 instructions, the first pass in evaluation mode repacks the weights permanently, and
        # later training gets wrong gradients.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return prepare_model_for_kbit_training(
        model,
        use_gradient_checkpointing=recipe.model.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )


def merge_saved(adapter: Path, dtype: torch.dtype) -> Any:
    """Load the base model unquantised, with its scheme, and merge a saved adapter into it.

    A merge into 4-bit weights would round the update away.
    """
    return load_adapted(adapter, dtype=dtype).merge_and_unload()
