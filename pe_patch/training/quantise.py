"""Frozen weights in 4 bits under trained adapters (QLoRA, arXiv 2305.14314), by bitsandbytes."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from ..checkpoints.load import load_patched
from ..patching.peft_record import read_record
from .recipe import Recipe, RecipeError

INSTALL = 'pip install "pe_patch[qlora]"'


def quantisation_config(recipe: Recipe) -> BitsAndBytesConfig | None:
    """What `from_pretrained` takes as `quantization_config`; None where the recipe does not quantise.

    NF4 with doubly quantised scales, as the paper (sections 2 and 3); matrices are multiplied in bfloat16 where the
    recipe trains in it, else in float32.

    Raises:
        RecipeError: without `lora` or `model.source`, or where bitsandbytes is not installed.
    """
    if recipe.model.quantization is None:
        return None
    if recipe.lora is None:
        raise RecipeError(
            "model.quantization freezes the weights in 4 bits, so there must be a lora: section to train."
        )
    if recipe.model.source is None:
        raise RecipeError("model.quantization needs model.source: fresh weights in 4 bits are worth nothing.")
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
    """A quantised model made ready for `get_peft_model`, after it was patched: everything is frozen, norms, embeddings
    and the scheme's own weights are in float32, and gradients reach the first checkpointed layer."""
    from peft import prepare_model_for_kbit_training

    for module in model.modules():
        # On a CPU with bfloat16 instructions the first pass in evaluation mode packs the weights for good, and what is
        # trained after that gets wrong gradients.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return prepare_model_for_kbit_training(
        model,
        use_gradient_checkpointing=recipe.model.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )


def merge_saved(adapter: Path, dtype: torch.dtype) -> Any:
    """The base model as it was before quantisation, under its scheme, with a saved adapter merged into it.

    Merging into 4-bit weights would round the update away with them.
    """
    if read_record(adapter) is not None:
        return load_patched(adapter, dtype=dtype).merge_and_unload()
    from peft import AutoPeftModelForCausalLM

    return AutoPeftModelForCausalLM.from_pretrained(str(adapter), dtype=dtype).merge_and_unload()
