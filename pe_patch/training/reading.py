"""Read a recipe from a YAML file and dotted overrides, check it, and write it back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import yaml

from ..data.packaged import shipped_recipes
from ..errors import nearest, quoted
from ..evaluation.results import write_atomically
from ..schemes.registry import SCHEMES
from .libraries import DictConfig, OmegaConf, OmegaConfBaseException
from .recipe import VERSION, Recipe, RecipeError


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        path: a YAML file, or the name of a shipped recipe such as `tiny_yarn`.
        overrides: `key=value` or `nested.key=value`; a number is the index of a list item.

    Raises:
        RecipeError: the recipe does not exist, a key is unknown, or a value has the wrong type or contradicts another.
            The error names the key, where it was given and the nearest existing key.
    """
    path = _find(Path(path).expanduser())
    config = OmegaConf.structured(Recipe)
    _check_nesting(str(path), _checked(str(path), lambda: path.read_text(encoding="utf-8", errors="replace")))
    content = _checked(str(path), lambda: OmegaConf.load(path))
    _check_version(content, path)
    if content.get(NO_FIELD) is False:
        content[NO_FIELD] = "no"
    config = _checked(str(path), lambda: cast(DictConfig, OmegaConf.merge(config, content)))
    for override in overrides:
        if "=" not in override:
            raise RecipeError(f"An override must be key=value, got {override!r}.")
        _check_nesting(override.partition("=")[0], override)
        config = _checked(override, lambda config=config, override=override: _overridden(config, override))
    recipe = cast(Recipe, _checked(str(path), lambda: OmegaConf.to_object(config)))
    if recipe.scheme is not None and recipe.scheme.options_file is not None:
        beside = path.parent / recipe.scheme.options_file
        recipe.scheme.options_file = str(beside) if beside.is_file() else recipe.scheme.options_file
    check(recipe, str(path))
    return recipe


DEEPEST = 50
"""Levels of nesting up to which a recipe is read."""
NO_FIELD = "mixed_precision"
"""The field whose value may be the word "no", which YAML reads as false."""


def _find(path: Path) -> Path:
    """Return the file of a recipe, given as a path or as the name of a shipped recipe.

    Raises:
        RecipeError: neither exists.
    """
    if path.is_file():
        return path
    shipped = shipped_recipes()
    if path.stem in shipped and path.suffix in ("", ".yaml") and path.parts[:-1] in ((), ("recipes", "configs")):
        return shipped[path.stem]
    raise RecipeError(
        f"The recipe {path.absolute()} does not exist.{nearest(path.stem, shipped)} Recipes that come with pe_patch: "
        f"{', '.join(shipped)}."
    )


def _check_nesting(where: str, text: str) -> None:
    """Raise `RecipeError` if brackets or dashes are nested so deep that YAML's reader would crash the process."""
    steps = (1 if character in "[{" else -1 for character in text if character in "[{]}")
    if max(accumulate(steps), default=0) > DEEPEST or "- " * DEEPEST in text:
        raise RecipeError(
            f"{where}: lists are nested more than {DEEPEST} deep. A recipe needs no more than five levels."
        )


def _check_version(content: Any, path: Path) -> None:
    """Raise `RecipeError` unless the file states the supported version."""
    if not isinstance(content, DictConfig):
        raise RecipeError(f"{path}: a recipe must be a mapping of keys, such as `output: runs/mine`.")
    version = content.get("version")
    if version is None:
        raise RecipeError(
            f"{path}: `version` is missing; add `version: {VERSION}`, the format that this pe_patch reads."
        )
    if version != VERSION:
        raise RecipeError(
            f"{path}: format version {version!r} is not supported; this pe_patch reads version {VERSION}."
        )


def _overridden(config: DictConfig, override: str) -> DictConfig:
    override = override.removeprefix("--")
    key, _, value = override.partition("=")
    if key == NO_FIELD and value == "no":
        override = f"{key}='no'"
    if not any(component.isdigit() for component in key.split(".")):
        return cast(DictConfig, OmegaConf.merge(config, OmegaConf.from_dotlist([override])))
    # A merge replaces a whole list; an update changes one item.
    OmegaConf.update(config, key, OmegaConf.from_dotlist([f"value={value}"]).value)
    return config


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the recipe as YAML, including all defaults."""
    write_atomically(path, OmegaConf.to_yaml(OmegaConf.structured(recipe)))


def _checked(where: str, action: Any) -> Any:
    """Return the action's result; raise OmegaConf's errors as `RecipeError` that starts with `where`."""
    try:
        return action()
    except yaml.YAMLError as error:
        raise RecipeError(f"{where}: invalid YAML: {' '.join(str(error).split())}") from error
    except (OmegaConfBaseException, OSError, TypeError, ValueError, IndexError, RecursionError) as error:
        message, *details = str(error).splitlines()
        key = next((line.split(":", 1)[1].strip() for line in details if "full_key" in line), "")
        raise RecipeError(f"{where}: {key + ': ' if key else ''}{message}") from error


def check(recipe: Recipe, where: str = "recipe") -> None:
    """Raise `RecipeError` if values of the recipe contradict each other."""
    pairs = {"optimizer.betas": recipe.optimizer.betas}  # OmegaConf does not check what is in a tuple
    for number, phase in enumerate(recipe.phases):
        pairs |= {f"phases.{number}.mixture.{name}.needles": each.needles for name, each in phase.mixture.items()}
    for name, pair in pairs.items():
        if len(pair) != 2 or not all(type(value) in (int, float) for value in pair):
            raise RecipeError(f"{where}: {name} must be two numbers, got {quoted(pair)}.")
    demands = [
        ((recipe.model.source is None) != (recipe.model.config is None), "give either model.source or model.config"),
        (bool(recipe.phases) or _needs_no_training(recipe), "phases is empty; give at least one (only a training-free "
         "scheme works without phases)"),
        (bool(recipe.phases) or bool(recipe.evaluation.lengths), "without phases, give the lengths to measure in "
         "evaluation.lengths"),
        (recipe.model.dtype == "float32" or recipe.lora is not None or not recipe.phases, "model.dtype bfloat16 would "
         "round away updates below 1/256 of a weight: use float32 with mixed_precision bf16, or lora"),
        (recipe.model.dtype == "float32" or recipe.mixed_precision == "bf16" or not recipe.phases, "model.dtype "
         "bfloat16 keeps trained weights in float32 and computes in bfloat16: set mixed_precision bf16"),
        (recipe.lora is None or recipe.lora.merge or not recipe.export, "an unmerged adapter cannot be "
         "exported: set lora.merge: true, or remove export"),
        (recipe.checkpoints.keep > 0, "checkpoints.keep must be at least 1"),
        (_every(recipe.checkpoints.every), "checkpoints.every must be at least 1, or null to write none"),
        (_every(recipe.evaluation.every), "evaluation.every must be at least 1, or null to never evaluate"),
        (all(length > 1 for length in recipe.evaluation.lengths), "evaluation.lengths must be at least 2"),
        (_finite(recipe.optimizer.clip) and recipe.optimizer.clip >= 0, "optimizer.clip must be a number above 0, or 0 "
         "to clip nothing"),
        (all(0 <= beta < 1 for beta in recipe.optimizer.betas), "optimizer.betas must be from 0 to below 1"),
        (_finite(recipe.optimizer.weight_decay) and recipe.optimizer.weight_decay >= 0, "optimizer.weight_decay cannot "
         "be negative"),
        (recipe.lora is None or (recipe.lora.rank > 0 and recipe.lora.alpha > 0), "lora.rank and lora.alpha must be at "
         "least 1"),
        (recipe.lora is None or 0 <= recipe.lora.dropout < 1, "lora.dropout must be from 0 to below 1"),
        (recipe.seed >= 0, "seed cannot be negative"),
        (recipe.data.workers >= 0, "data.workers cannot be negative"),
        (recipe.tokenizer.train_size is None or recipe.tokenizer.train_size > 0, "tokenizer.train_size must be at "
         "least 1"),
        (recipe.scheme is None or recipe.scheme.calibration_tokens is None or recipe.scheme.calibration_tokens > 0,
         "scheme.calibration_tokens must be at least 1"),
        (recipe.scheme is None or recipe.scheme.warm_start_tokens is None or recipe.scheme.warm_start_tokens > 0,
         "scheme.warm_start_tokens must be at least 1"),
        (recipe.model.quantization is None or recipe.lora is not None, "model.quantization freezes the weights: give "
         "lora, such as lora: {rank: 8}"),
        ((recipe.model.shifted_groups or 2) > 1, "model.shifted_groups must be at least 2"),
        (recipe.loss.chunk >= 0, "loss.chunk cannot be negative; 0 computes all logits in one piece"),
        (recipe.guard.rise is None or recipe.guard.rise > 0, "guard.rise must be above 0, or null"),
        (recipe.guard.window > 0, "guard.window must be at least 1"),
        (0 < recipe.average <= 1, f"average must be above 0 and at most 1, got {recipe.average}"),
        (recipe.average == 1 or bool(recipe.model.source and recipe.phases), "average mixes trained weights with those "
         "of model.source: it needs both a source and phases"),
        (recipe.average == 1 or recipe.lora is None, "average has no effect on adapters: lower lora.alpha, or train "
         "without lora"),
        (recipe.scheme is None or not (recipe.scheme.calibration_tokens and "calibration" in recipe.scheme.options),
         "give either scheme.calibration_tokens or scheme.options.calibration"),
        (recipe.distill is None or bool(recipe.distill.source or recipe.model.source), "a model from a config has no "
         "teacher: give distill.source"),
        (recipe.distill is None or recipe.distill.weight >= 0 < recipe.distill.temperature, "distill.weight cannot be "
         "negative, and distill.temperature must be above 0"),
        (recipe.model.config is None or _has_tokenizer(recipe), "a model from a config needs a tokenizer: give "
         "tokenizer.source or tokenizer.train_size"),
    ]  # fmt: skip
    for number, phase in enumerate(recipe.phases):
        name, sources = f"phases.{number}", phase.mixture.values()
        demands += [
            (
                recipe.distill is not None or source.learn_from != "teacher",
                f"{name}.mixture.{key}.learn_from is teacher, "
                "but the recipe has no teacher: add distill: {}, or remove learn_from",
            )
            for key, source in phase.mixture.items()
        ]
        demands += [
            (min(phase.steps, phase.batch, phase.micro_batch or 1) > 0, f"{name}: steps, batch and micro_batch must be "
             "at least 1"),
            (phase.length > 1, f"{name}.length must be at least 2"),
            (_finite(phase.learning_rate) and phase.learning_rate > 0, f"{name}.learning_rate must be above 0"),
            (phase.warmup >= 0, f"{name}.warmup cannot be negative"),
            (0 <= phase.decay <= 1 and 0 <= phase.floor <= 1, f"{name}: decay and floor must be from 0 to 1"),
            (phase.until_accuracy is None or 0 <= phase.until_accuracy <= 1, f"{name}.until_accuracy must be from 0 "
             "to 1"),
            (all(_finite(source.share) for source in sources), f"{name}.mixture: a share must be a finite number"),
            (sum(source.share for source in sources) > 0, f"{name}.mixture: the shares must add up to more than 0"),
            (all(source.share >= 0 for source in sources), f"{name}.mixture: a share cannot be negative"),
            (all(1 <= source.needles[0] <= source.needles[1] for source in sources), f"{name}.mixture: needles is "
             "[least, greatest], at least 1"),
            (all(source.min_length is None or source.min_length > 0 for source in sources), f"{name}.mixture: "
             "min_length must be at least 1"),
            (phase.pose is None or phase.pose.chunks > 1, f"{name}.pose.chunks must be at least 2"),
            (phase.pose is None or phase.pose.target > phase.length, f"{name}.pose.target must be above the length"),
            (phase.vocabulary is None or 0 <= phase.vocabulary[0] < phase.vocabulary[1], f"{name}.vocabulary is "
             "[first, one past the last]"),
        ]  # fmt: skip
    broken = [message for holds, message in demands if not holds]
    if broken:
        raise RecipeError(f"{where}: {'; '.join(broken)}.")


def _every(steps: int | None) -> bool:
    return steps is None or steps > 0


def _finite(number: float) -> bool:
    return math.isfinite(number)


def _needs_no_training(recipe: Recipe) -> bool:
    known = SCHEMES.get(recipe.scheme.name) if recipe.scheme is not None else None
    return known is not None and known.training_free


def _has_tokenizer(recipe: Recipe) -> bool:
    return recipe.tokenizer.source is not None or recipe.tokenizer.train_size is not None
