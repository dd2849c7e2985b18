"""Build the tokenizer and the model that a recipe trains."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils.import_utils import is_flash_attn_2_available

from .. import compat
from ..checkpoints.load import load_model as load_saved_model
from ..checkpoints.load import load_tokenizer
from ..checkpoints.sources import check_source
from ..data.packaged import DEMO, DEMO_MODEL
from ..errors import UnsupportedError, nearest
from ..evaluation.retrieval import TOKEN_KEYS
from ..mla.protocol import replaces_projections
from ..patching.api import find_patch, patch_model
from ..patching.peft import attach
from ..patching.peft_record import scheme_modules, train_scheme
from ..schemes.registry import ALIASES, SCHEMES
from ..schemes.rotary import Rotary
from .quantise import prepare_quantised, quantisation_config
from .recipe import Lora, Model, Phase, Recipe, RecipeError, Scheme
from .shifted_attention import shift_attention
from .warm_start import warm_start as fit

FLASH = "flash_attention_2"
"""Transformers' name of flash attention with variable lengths."""


def locate(source: str) -> str:
    """Return the path or hub name of a model; `demo` is the checkpoint inside the package."""
    return str(DEMO_MODEL) if source == DEMO else source


def build_tokenizer(recipe: Recipe, texts: Callable[[], Iterable[str]]) -> Any:
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
            tokenizer = load_tokenizer(source if wanted.source else check_source(source))
        except (OSError, ValueError) as error:
            raise RecipeError(
                f"tokenizer: cannot load one from {source!r}: {str(error)[:300]} Set tokenizer.source to a local "
                "folder or a hub name."
            ) from error
    if wanted.retrieval_tokens:
        add_retrieval_tokens(tokenizer)
    return tokenizer


def train_tokenizer(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
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
    model: Any, recipe: Recipe, calibration: list[list[int]], warm_start: list[list[int]], device: Any, world: int = 1
) -> Any:
    """Return the model with its scheme and adapters; only parameters to train require gradients.

    Args:
        model: the model from `load_model`.
        recipe: the recipe of the run.
        calibration: rows of token ids for a scheme that converts weights; empty if not needed.
        warm_start: rows of token ids on which to fit the scheme to the model's original attention; empty if not
            needed.
        device: the device on which to calibrate or fit.
        world: number of groups of processes that see different sequences.
    """
    scheme, flash = recipe.scheme, can_default_to_flash(recipe, device, world)
    if scheme is not None:
        options = {**options_of(scheme), **({"calibration": calibration} if calibration else {})}
        model = model.to(device) if calibration or warm_start else model
        _patch(model, scheme.name, options, flash and "backend" not in options, trains=bool(recipe.phases))
        if warm_start:
            fit(model, warm_start, limit=sum(map(len, warm_start)))
    elif flash:
        with suppress(ImportError, ValueError):  # this family has no flash attention
            model.set_attn_implementation(FLASH)
    if recipe.model.shifted_groups is not None:
        shift_attention(model, recipe.model.shifted_groups)
    if recipe.model.quantization is not None:
        prepare_quantised(model, recipe)
    return model if recipe.lora is None else _with_lora(model, recipe.lora)


def can_default_to_flash(recipe: Recipe, device: Any, world: int) -> bool:
    """Return whether training uses flash attention if the scheme allows it, because the recipe names no attention.

    It needs a GPU and half precision. It separates packed documents in micro-batches of one sequence alone.
    """
    half = recipe.mixed_precision == "bf16" or recipe.model.dtype == "bfloat16"
    single = all(rows_of(phase, world) == 1 for phase in recipe.phases) or not recipe.data.boundaries
    free = recipe.model.attention is None and recipe.model.shifted_groups is None and bool(recipe.phases)
    return free and half and single and torch.device(device).type == "cuda" and is_flash_attn_2_available()


def rows_of(phase: Phase, world: int) -> int:
    """Return the number of sequences in a micro-batch."""
    return phase.micro_batch or max(1, phase.batch // world)


def refuse_documents_that_leak(model: Any, recipe: Recipe, world: int) -> None:
    """Raise `RecipeError` if flash attention would let packed documents of a micro-batch see each other."""
    if (
        "flash" not in str(compat.attention_implementation(model.config.get_text_config()))
        or not recipe.data.boundaries
    ):
        return
    for number, phase in enumerate(recipe.phases):
        if phase.pose is None and rows_of(phase, world) > 1:
            raise RecipeError(
                f"phases.{number}.micro_batch is {rows_of(phase, world)}, but flash attention keeps packed documents "
                "apart only in micro-batches of one sequence. Set micro_batch: 1, or model.attention: sdpa, or "
                "data.boundaries: false."
            )


def _patch(model: Any, name: str, options: dict[str, Any], flash: bool, trains: bool) -> None:
    """Patch the model, with flash attention if that is wanted and the scheme allows it.

    A model that will be trained is patched in training mode, so that `patch_model` does not advise training. Schemes
    that run the model on calibration tokens keep its mode, since dropout would disturb them.
    """
    known, mode = SCHEMES.get(ALIASES.get(name, name)), model.training
    model.train(mode or (trains and known is not None and issubclass(known, Rotary)))
    try:
        if flash:
            with suppress(UnsupportedError):
                patch_model(model, name, **options, backend="flash")
                return
        patch_model(model, name, **options)
    finally:
        model.train(mode)


def options_of(scheme: Scheme) -> dict[str, Any]:
    """Return the scheme's options: those of its file, overridden by the recipe's."""
    if scheme.options_file is None:
        return scheme.options
    path = Path(scheme.options_file)
    try:
        options = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
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


def original_weights(recipe: Recipe) -> dict[str, Any]:
    """Return the parameters of the model as it was before training and before its scheme, by name."""
    return dict(_pretrained(recipe.model).named_parameters())


def check_average(recipe: Recipe, model: Any, sharded: bool) -> None:
    """Raise `RecipeError` if the weights cannot be mixed with those from before the training."""
    if recipe.average == 1:
        return
    if sharded:
        raise RecipeError("average: sharded weights cannot be mixed with those of the original model. Train with DDP.")
    patch = find_patch(model)
    if patch is not None and replaces_projections(patch.scheme):
        raise RecipeError(
            f"average: {patch.scheme.name!r} replaces projections, whose new weights have no counterpart before the "
            "training. Set average to 1."
        )


def _pretrained(wanted: Model, quantised: Any = None) -> Any:
    source = locate(wanted.source or "")
    extra: dict[str, Any] = {} if wanted.attention is None else {"attn_implementation": wanted.attention}
    if quantised is not None:
        extra["quantization_config"] = quantised
    return load_saved_model(check_source(source), dtype=getattr(torch, wanted.dtype), use_safetensors=True, **extra)


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

    _check_targets(model, lora)
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
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise RecipeError(f"lora: {' '.join(str(error).split())[:400]}") from error
    attach(adapted)
    for name, parameter in adapted.named_parameters():
        if "position_schemes.original." in name:  # PEFT matches modules to train in full by the ends of their names
            parameter.requires_grad_(False)
    for parameter in adapted.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()  # PEFT leaves norms and embeddings in the base's dtype
    if (modules := scheme_modules(model)) is not None and any(True for _ in modules.parameters()):
        train_scheme(adapted)
    return adapted


def _check_targets(model: Any, lora: Lora) -> None:
    """Raise `RecipeError` if a target matches no layer, or a layer that shares its weight with another."""
    if lora.targets == "all-linear":  # PEFT leaves the output layer out
        return
    retired = set(_retired(model))
    modules = {name: module for name, module in model.named_modules() if name and name not in retired}
    wanted = [lora.targets] if isinstance(lora.targets, str) else lora.targets
    by_expression = isinstance(lora.targets, str)  # PEFT reads a text as a regular expression
    chosen: set[str] = set()
    for target in wanted:
        found = {
            name
            for name in modules
            if (re.fullmatch(target, name) if by_expression else name == target or name.endswith(f".{target}"))
        }
        if not found:
            linear = {name.rpartition(".")[2] for name, module in modules.items() if isinstance(module, nn.Linear)}
            raise RecipeError(
                f"lora.targets: no layer is called {target!r}.{nearest(target, sorted(linear))} Linear layers of this "
                f"model: {', '.join(sorted(linear))}."
            )
        chosen |= found
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    shared = sorted(name for name in chosen if any(modules[name] is end for end in ends))
    if shared and model.config.get_text_config().tie_word_embeddings:
        other = "output" if modules[shared[0]] is ends[0] else "input"
        raise RecipeError(
            f"lora.targets: {shared[0]} shares its weight with the {other} "
            "embeddings, so that an adapter on it is lost or applied twice when the model is saved. Remove it from the "
            "targets; lora.embeddings: true trains the shared weight in full."
        )


def _retired(model: nn.Module) -> list[str]:
    """Return the names of modules that a patch has replaced."""
    return [name for name, _ in model.named_modules() if "position_schemes.original." in name]


def _norms(model: nn.Module) -> set[str]:
    """Return the last name components of the normalisation layers, by which PEFT matches them."""
    retired = set(_retired(model))
    named = [(name, module) for name, module in model.named_modules() if name not in retired]
    return {name.rpartition(".")[2] for name, module in named if "norm" in type(module).__name__.lower()}
