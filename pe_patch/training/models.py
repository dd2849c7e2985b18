"""Build the tokenizer and the model that a recipe trains."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from ..checkpoints.load import load_patched, read_config
from ..data.packaged import DEMO_MODEL
from ..evaluation.retrieval import TOKEN_KEYS
from ..patching.api import patch_model
from ..patching.peft_record import scheme_modules, train_scheme
from .quantise import prepare_quantised, quantisation_config
from .recipe import Lora, Model, Recipe, RecipeError, Scheme
from .shifted_attention import shift_attention
from .warm_start import warm_start as fit


def locate(source: str) -> str:
    """Return the path or hub name of a model; `demo` is the checkpoint inside the package."""
    return str(DEMO_MODEL) if source == "demo" else source


def build_tokenizer(recipe: Recipe, texts: Callable[[], Sequence[str]]) -> Any:
    """Load the recipe's tokenizer, or train a new one on `texts()`.

    Raises:
        RecipeError: the tokenizer cannot be loaded, or the text is too small for its size.
    """
    wanted = recipe.tokenizer
    if wanted.train_size is not None:
        tokenizer = train_tokenizer(texts(), wanted.train_size)
    else:
        source = locate(wanted.source or recipe.model.source or "")
        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise RecipeError(
                f"tokenizer: cannot load one from {source!r}: {str(error)[:300]} Set tokenizer.source to a local "
                "folder or a hub name."
            ) from error
    if wanted.retrieval_tokens:
        add_retrieval_tokens(tokenizer)
    return tokenizer


def train_tokenizer(texts: Sequence[str], size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of `size` tokens that keeps digits separate; `<pad>` is 0 and `<eos>` is 1.

    Raises:
        RecipeError: the text does not give `size` tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    bytes_apart = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_apart])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != size:
        raise RecipeError(
            f"tokenizer.train_size is {size}, but the text gives {tokenizer.get_vocab_size()} tokens; use a size "
            f"above {len(alphabet) + 2}, or more text."
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", clean_up_tokenization_spaces=False
    )


def add_retrieval_tokens(tokenizer: Any) -> None:
    """Add `<k0>`.. and `<v0>`.., one token each, for the `tokens` wording of retrieval."""
    from tokenizers import AddedToken

    names = [f"<{kind}{index}>" for kind in "kv" for index in range(TOKEN_KEYS)]
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in names])


def load_model(recipe: Recipe, tokenizer: Any) -> Any:
    """Load or create the recipe's model, without its scheme."""
    quantised = quantisation_config(recipe)
    model = _fresh(recipe.model, tokenizer) if recipe.model.config is not None else _pretrained(recipe.model, quantised)
    if recipe.model.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def with_scheme(
    model: Any, recipe: Recipe, calibration: list[list[int]], warm_start: list[list[int]], device: Any
) -> Any:
    """Return the model with its scheme and adapters; only parameters to train require gradients.

    Args:
        model: the model from `load_model`.
        recipe: the recipe of the run.
        calibration: rows of token ids for a scheme that converts weights; empty if not needed.
        warm_start: rows of token ids on which to fit the scheme to the model's original attention; empty if not
            needed.
        device: the device on which to calibrate or fit.
    """
    scheme = recipe.scheme
    if scheme is not None:
        options = {**options_of(scheme), **({"calibration": calibration} if calibration else {})}
        patch_model(model.to(device) if calibration or warm_start else model, scheme.name, **options)
        if warm_start:
            fit(model, warm_start, limit=sum(map(len, warm_start)))
    if recipe.model.shifted_groups is not None:
        shift_attention(model, recipe.model.shifted_groups)
    if recipe.model.quantization is not None:
        prepare_quantised(model, recipe)
    return model if recipe.lora is None else _with_lora(model, recipe.lora)


def options_of(scheme: Scheme) -> dict[str, Any]:
    """Return the scheme's options: those of its file, overridden by the recipe's."""
    if scheme.options_file is None:
        return scheme.options
    path = Path(scheme.options_file)
    try:
        options = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"scheme.options_file: {path.absolute()} is not a JSON file of options: {error}") from error
    if not isinstance(options, dict):
        raise RecipeError(f"scheme.options_file: {path.absolute()} must hold a JSON object of options by name.")
    return {**options, **scheme.options}


def build_teacher(recipe: Recipe, student: Any, device: Any) -> Any:
    """Load the frozen teacher: a second copy of the model, or `distill.source`, without scheme and adapters."""
    assert recipe.distill is not None
    dtype = "bfloat16" if recipe.mixed_precision == "bf16" else recipe.model.dtype
    wanted = replace(recipe.model, source=recipe.distill.source or recipe.model.source, dtype=dtype)
    teacher = _pretrained(wanted).requires_grad_(False).eval().to(device)
    theirs, ours = (model.config.get_text_config().vocab_size for model in (teacher, student))
    if theirs != ours:
        raise RecipeError(
            f"distill: the teacher {wanted.source} has {theirs} tokens and the model has {ours}; they must share one "
            "vocabulary."
        )
    return teacher


def _pretrained(wanted: Model, quantised: Any = None) -> Any:
    source = locate(wanted.source or "")
    extra: dict[str, Any] = {} if wanted.attention is None else {"attn_implementation": wanted.attention}
    if quantised is not None:
        extra["quantization_config"] = quantised
    load = load_patched if "pe_patch" in read_config(source) else AutoModelForCausalLM.from_pretrained
    return load(source, dtype=getattr(torch, wanted.dtype), use_safetensors=True, **extra)


def _fresh(wanted: Model, tokenizer: Any) -> Any:
    fields = {"vocab_size": len(tokenizer), **(wanted.config or {})}
    if fields["vocab_size"] < len(tokenizer):
        raise RecipeError(
            f"model.config.vocab_size is {fields['vocab_size']}, but the tokenizer has {len(tokenizer)} tokens; "
            "give at least as many."
        )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        fields.setdefault(name, getattr(tokenizer, name))
    model_type = fields.pop("model_type", None)
    if model_type is None:
        raise RecipeError("model.config needs a model_type, such as llama.")
    try:
        config = AutoConfig.for_model(model_type, **fields)
    except ValueError as error:
        raise RecipeError(f"model.config: {str(error)[:300]}") from error
    extra = {} if wanted.attention is None else {"attn_implementation": wanted.attention}
    return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, wanted.dtype), **extra)


def _with_lora(model: Any, lora: Lora) -> Any:
    from peft import LoraConfig, get_peft_model

    entire = _norms(model) if lora.norms else set()
    if lora.embeddings:
        embeddings = model.get_input_embeddings()
        entire |= {name.rpartition(".")[2] for name, module in model.named_modules() if module is embeddings}
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets,
        exclude_modules=_retired(model) or None,
        modules_to_save=sorted(entire) or None,
        ensure_weight_tying=lora.embeddings and model.config.tie_word_embeddings,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "position_schemes.original." in name:  # PEFT matches modules to train in full by the ends of their names
            parameter.requires_grad_(False)
    for parameter in adapted.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()  # PEFT leaves norms and embeddings in the base's dtype
    if (modules := scheme_modules(model)) is not None and any(True for _ in modules.parameters()):
        train_scheme(adapted)
    return adapted


def _retired(model: nn.Module) -> list[str]:
    """Return the names of modules that a patch has replaced."""
    return [name for name, _ in model.named_modules() if "position_schemes.original." in name]


def _norms(model: nn.Module) -> set[str]:
    """Return the last name components of the normalisation layers, by which PEFT matches them."""
    retired = set(_retired(model))
    named = [(name, module) for name, module in model.named_modules() if name not in retired]
    return {name.rpartition(".")[2] for name, module in named if "norm" in type(module).__name__.lower()}
