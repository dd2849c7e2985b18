"""Reading a recipe from one YAML file and dotted overrides, and writing it back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..data.packaged import shipped_recipes
from ..errors import nearest
from ..schemes.registry import SCHEMES
from .recipe import VERSION, Recipe, RecipeError


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        path: a YAML file, or the name of a shipped recipe such as `tiny_yarn`.
        overrides: `key=value` or `nested.key=value`; a number counts the items of a list.

    Raises:
        RecipeError: there is no such recipe, or it has an unknown key or a value of another type. The error names the
            key, where it was given and the nearest existing key.
    """
    path = _find(Path(path).expanduser())
    config = OmegaConf.structured(Recipe)
    said = _checked(str(path), lambda: OmegaConf.load(path))
    _check_version(said, path)
    config = _checked(str(path), lambda: cast(DictConfig, OmegaConf.merge(config, said)))
    for override in overrides:
        if "=" not in override:
            raise RecipeError(f"An override is written key=value, got {override!r}.")
        config = _checked(override, lambda config=config, override=override: _overridden(config, override))
    recipe = cast(Recipe, _checked(str(path), lambda: OmegaConf.to_object(config)))
    if recipe.scheme is not None and recipe.scheme.options_file is not None:
        beside = path.parent / recipe.scheme.options_file
        recipe.scheme.options_file = str(beside) if beside.is_file() else recipe.scheme.options_file
    check(recipe, str(path))
    return recipe


def _find(path: Path) -> Path:
    """Return the file of a recipe, which may be given by the name of a shipped one.

    Raises:
        RecipeError: there is neither such a file nor such a recipe.
    """
    if path.is_file():
        return path
    shipped = shipped_recipes()
    if path.stem in shipped and path.suffix in ("", ".yaml") and path.parts[:-1] in ((), ("recipes", "configs")):
        return shipped[path.stem]
    raise RecipeError(
        f"There is no recipe {path.absolute()}.{nearest(path.stem, shipped)} Those that come with pe_patch: "
        f"{', '.join(shipped)}."
    )


def _check_version(said: Any, path: Path) -> None:
    """Raise `RecipeError` unless the file says that it is of the version that is read here."""
    if not isinstance(said, DictConfig):
        raise RecipeError(f"{path}: a recipe is a mapping of keys, such as `output: runs/mine`.")
    version = said.get("version")
    if version is None:
        raise RecipeError(
            f"{path}: say which version of the format this is; the one read here is `version: {VERSION}`."
        )
    if version != VERSION:
        raise RecipeError(f"{path}: version {version!r} of the format, and this pe_patch reads version {VERSION}.")


def _overridden(config: DictConfig, override: str) -> DictConfig:
    override = override.removeprefix("--")
    key, _, value = override.partition("=")
    if not any(part.isdigit() for part in key.split(".")):
        return cast(DictConfig, OmegaConf.merge(config, OmegaConf.from_dotlist([override])))
    # A merge replaces a list as a whole, an update reaches into it.
    OmegaConf.update(config, key, OmegaConf.from_dotlist([f"value={value}"]).value)
    return config


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the recipe as YAML, every default spelled out."""
    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(recipe)), encoding="utf-8")


def _checked(where: str, action: Any) -> Any:
    """The action's result; what OmegaConf has to say against it becomes a `RecipeError` that starts with `where`."""
    try:
        return action()
    except yaml.YAMLError as error:
        raise RecipeError(f"{where}: not YAML, {' '.join(str(error).split())}") from error
    except (OmegaConfBaseException, TypeError, ValueError, IndexError) as error:
        message, *details = str(error).splitlines()
        key = next((line.split(":", 1)[1].strip() for line in details if "full_key" in line), "")
        raise RecipeError(f"{where}: {key + ': ' if key else ''}{message}") from error


def check(recipe: Recipe, where: str = "recipe") -> None:
    """Raise `RecipeError` where the values of a recipe contradict each other."""
    demands = [
        ((recipe.model.source is None) != (recipe.model.config is None), "give one of model.source and model.config"),
        (bool(recipe.phases) or _needs_no_training(recipe), "phases is empty; give at least one (only a scheme that "
         "needs no training can do without)"),
        (bool(recipe.phases) or bool(recipe.evaluation.lengths), "without phases, say at which evaluation.lengths to "
         "measure"),
        (recipe.model.dtype == "float32" or recipe.lora is not None or not recipe.phases, "model.dtype bfloat16 would "
         "train weights that lose every step below 1/256 of them: take float32 with mixed_precision bf16, or lora"),
        (recipe.model.dtype == "float32" or recipe.mixed_precision == "bf16" or not recipe.phases, "model.dtype "
         "bfloat16 keeps what is trained in float32 and computes in bfloat16: give mixed_precision bf16"),
        (recipe.lora is None or recipe.lora.merge or not recipe.export, "an adapter that is not merged cannot be "
         "exported: lora.merge: true, or no export"),
        (recipe.checkpoints.keep > 0, "checkpoints.keep must be at least 1"),
        (recipe.scheme is None or recipe.scheme.calibration_tokens is None or recipe.scheme.calibration_tokens > 0,
         "scheme.calibration_tokens must be at least 1"),
        (recipe.scheme is None or recipe.scheme.warm_start_tokens is None or recipe.scheme.warm_start_tokens > 0,
         "scheme.warm_start_tokens must be at least 1"),
        (recipe.model.quantization is None or recipe.lora is not None, "model.quantization freezes the weights: give "
         "lora, such as lora: {rank: 8}"),
        ((recipe.model.shifted_groups or 2) > 1, "model.shifted_groups must be at least 2"),
        (recipe.loss.chunk >= 0, "loss.chunk cannot be negative; 0 makes all logits at once"),
        (recipe.guard.rise is None or recipe.guard.rise > 0, "guard.rise must be above 0, or null"),
        (recipe.guard.window > 0, "guard.window must be at least 1"),
        (recipe.scheme is None or not (recipe.scheme.calibration_tokens and "calibration" in recipe.scheme.options),
         "give one of scheme.calibration_tokens and scheme.options.calibration"),
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
            (min(phase.steps, phase.batch, phase.micro_batch or 1) > 0, f"{name}: steps, batch and micro_batch must be "
             "at least 1"),
            (phase.length > 1, f"{name}.length must be at least 2"),
            (sum(source.share for source in sources) > 0, f"{name}.mixture: the shares add up to nothing"),
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


def _needs_no_training(recipe: Recipe) -> bool:
    known = SCHEMES.get(recipe.scheme.name) if recipe.scheme is not None else None
    return known is not None and known.training_free


def _has_tokenizer(recipe: Recipe) -> bool:
    return recipe.tokenizer.source is not None or recipe.tokenizer.train_size is not None
