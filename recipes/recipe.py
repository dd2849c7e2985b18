"""What a recipe may say: a tree of dataclasses, read from one YAML file and dotted overrides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pe_patch.errors import PePatchError

SCHEDULES = ("constant", "linear", "cosine", "warmup_stable_decay")


class RecipeError(PePatchError, ValueError):
    """A recipe says something that cannot be trained."""


@dataclass
class Model:
    """Either `source` or `config`."""

    source: str | None = None
    """A local folder or a hub name; `demo` is the small model that comes with pe_patch."""
    config: dict[str, Any] | None = None
    """The fields of a Transformers config, `model_type` among them: a model with fresh weights."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights. Mixed precision keeps them in float32 and computes in bfloat16."""
    attention: str | None = None
    """Transformers' `attn_implementation`; null takes its default."""
    gradient_checkpointing: bool = False
    """Recompute each layer in the backward pass: less memory, about a third more time."""


@dataclass
class Tokenizer:
    """By default the model's own."""

    source: str | None = None
    """A local folder or a hub name; null is where the model came from."""
    train_size: int | None = None
    """Train a byte-level BPE of this many tokens on the documents instead, digits apart."""
    retrieval_tokens: bool = False
    """Add the tokens `<k0>`.. and `<v0>`.. that the `tokens` wording of retrieval is made of."""


@dataclass
class Scheme:
    """What is handed to `pe_patch.patch_model`."""

    name: str
    """A name from `pe_patch.SCHEMES`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Its options, spelled as `patch_model` takes them (`factor: 8`, `on_existing: replace`)."""
    calibration_tokens: int | None = None
    """How many tokens of the first phase's sequences are handed to the scheme as its option `calibration`."""


@dataclass
class Distill:
    """A teacher, beside the text: the loss adds the divergence from its distribution over the next token."""

    weight: float = 1.0
    """Of the divergence; the cross-entropy has weight 1."""
    temperature: float = 1.0
    """T: both distributions are softmax(logits / T), and the divergence counts T^2 times (Hinton et al. 2015)."""
    source: str | None = None
    """A local folder or a hub name with the same vocabulary; null is `model.source` as it was before the scheme."""


@dataclass
class Lora:
    """Low-rank adapters (PEFT) in place of full fine-tuning."""

    rank: int = 8
    alpha: int = 16
    """The update is scaled by alpha / rank."""
    dropout: float = 0.0
    targets: str | list[str] = "all-linear"
    """Names of the linear layers that get an adapter, or `all-linear`."""
    norms: bool = True
    """Train the normalisation layers in full, as LongLoRA does."""
    embeddings: bool = True
    """Train the input embeddings in full, as LongLoRA does."""
    merge: bool = True
    """Save one plain model; otherwise save the adapter alone."""


@dataclass
class Data:
    """Which text, and how it becomes training sequences."""

    source: str = "stdlib"
    """`stdlib`, a folder, a file, or a hub name, as `pe_patch.text.load_documents` takes them."""
    text_column: str = "text"
    limit: int | None = None
    """The greatest number of documents."""
    boundaries: bool = True
    """Neither attention nor positions cross from one document to the next; false packs contiguous text."""
    workers: int = 0
    """Processes that prepare batches ahead of time."""


@dataclass
class Source:
    """One part of a phase's mixture."""

    share: float
    """Weight in the draw of each sequence, relative to the others."""
    kind: Literal["text", "needles"] = "text"
    """Plain text; or text with facts hidden in it, asked for at its end."""
    needles: tuple[int, int] = (1, 16)
    """The least and the greatest number of hidden facts; all of them are asked for."""
    targets: Literal["all", "answers"] = "all"
    """What the loss sees: all that can be predicted, or the answers alone."""


@dataclass
class Phase:
    """A stretch of training with one length, one mixture and one schedule."""

    length: int
    """Tokens in a sequence."""
    batch: int
    """Sequences in an optimiser step, over all processes."""
    micro_batch: int | None = None
    """Sequences in one forward pass of one process, for what memory allows; null is a process's whole share."""
    steps: int = 1000
    """Optimiser steps; with `until_accuracy` the most that are allowed."""
    mixture: dict[str, Source] = field(default_factory=dict)
    """What the sequences are drawn from, under names of your own."""
    until_accuracy: float | None = None
    """End once this share of the targets was predicted right over the last 25 steps; not reaching it is an error."""
    learning_rate: float = 2e-5
    schedule: Literal["constant", "linear", "cosine", "warmup_stable_decay"] = "cosine"
    warmup: int = 20
    """Steps over which the learning rate rises from zero."""
    decay: float = 0.4
    """Share of the steps in which `warmup_stable_decay` falls."""
    decay_shape: Literal["linear", "cosine", "1-sqrt"] = "linear"
    """How it falls."""
    floor: float = 0.0
    """Where `cosine` and `warmup_stable_decay` end, and the latter starts, as a share of the learning rate."""
    vocabulary: tuple[int, int] | None = None
    """First and one past the last token id that compete in the softmax; null is all of them."""


@dataclass
class Optimizer:
    """AdamW; vectors (norms, biases) are not decayed."""

    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    clip: float = 1.0
    """Greatest norm of the gradient."""


@dataclass
class Evaluation:
    """What is measured on held-out text while training and at its end."""

    every: int | None = None
    """Steps between evaluations; null evaluates never."""
    tasks: list[str] = field(default_factory=lambda: ["perplexity", "needle"])
    lengths: list[int] = field(default_factory=list)
    """In tokens; empty is the model's native length and that of the last phase."""
    samples: int = 32


@dataclass
class Checkpoints:
    """Everything a resumed run needs, in `<output>/checkpoints`."""

    every: int | None = None
    """Steps between checkpoints; null writes none."""
    keep: int = 2
    """How many of the newest are kept."""


@dataclass
class Recipe:
    """One training run."""

    output: str
    """A folder for the log, the checkpoints and the trained model."""
    model: Model = field(default_factory=Model)
    tokenizer: Tokenizer = field(default_factory=Tokenizer)
    scheme: Scheme | None = None
    """Null trains the model as it is."""
    lora: Lora | None = None
    """Null trains every weight."""
    distill: Distill | None = None
    """Null learns from the text alone."""
    data: Data = field(default_factory=Data)
    phases: list[Phase] = field(default_factory=list)
    """Run one after the other, on one optimiser."""
    optimizer: Optimizer = field(default_factory=Optimizer)
    evaluation: Evaluation = field(default_factory=Evaluation)
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    mixed_precision: Literal["no", "bf16"] = "no"
    seed: int = 0
    resume: str | None = None
    """`auto` goes on from the newest checkpoint in `output` if there is one; or the path of a checkpoint."""
    trackers: list[str] = field(default_factory=list)
    """Of accelerate: `tensorboard`, `wandb` and others. `<output>/log.jsonl` is always written."""
    progress: bool = True
    """Show a progress bar."""
    dry_run: bool = False
    """Print what would be trained, and stop."""


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, with `key=value` or `nested.key=value` overrides (list items by number).

    An unknown key or a value of another type raises `RecipeError`, naming the key, where it was given and the nearest
    key there is.
    """
    path = Path(path)
    if not path.is_file():
        near = ", ".join(sorted(file.name for file in (Path(__file__).parent / "configs").glob("*.yaml")))
        raise RecipeError(f"There is no recipe {path.absolute()}. Those that come with pe_patch: {near}.")
    config = OmegaConf.structured(Recipe)
    config = _checked(str(path), lambda: cast(DictConfig, OmegaConf.merge(config, OmegaConf.load(path))))
    for override in overrides:
        if "=" not in override:
            raise RecipeError(f"An override is written key=value, got {override!r}.")
        config = _checked(override, lambda config=config, override=override: _overridden(config, override))
    recipe = cast(Recipe, _checked(str(path), lambda: OmegaConf.to_object(config)))
    check(recipe, str(path))
    return recipe


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
        (bool(recipe.phases), "phases is empty; give at least one"),
        (recipe.checkpoints.keep > 0, "checkpoints.keep must be at least 1"),
        (recipe.scheme is None or recipe.scheme.calibration_tokens is None or recipe.scheme.calibration_tokens > 0,
         "scheme.calibration_tokens must be at least 1"),
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
            (phase.vocabulary is None or 0 <= phase.vocabulary[0] < phase.vocabulary[1], f"{name}.vocabulary is "
             "[first, one past the last]"),
        ]  # fmt: skip
    broken = [message for holds, message in demands if not holds]
    if broken:
        raise RecipeError(f"{where}: {'; '.join(broken)}.")


def _has_tokenizer(recipe: Recipe) -> bool:
    return recipe.tokenizer.source is not None or recipe.tokenizer.train_size is not None
