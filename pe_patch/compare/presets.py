"""Define prepared comparisons with their own models, for `--preset`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.packaged import DEMO_MODEL, shipped_recipes
from ..errors import OptionError, unknown
from ..evaluation.perplexity import Perplexity
from . import survey
from .compared_scheme import parse_schemes
from .settings import Settings, Training

RULER = ("niah_single_1", "niah_single_2", "niah_multikey_1", "niah_multikey_2", "niah_multiquery")
EXTENSIONS = ("linear", "ntk", "yarn", "dynamic_ntk", "self_extend", "dca")
WINDOW, FACTOR, STEPS = 256, 8, 60


@dataclass(frozen=True)
class Preset:
    """A named comparison."""

    title: str
    settings: Callable[..., Settings]
    """Returns the settings for an output folder, with keywords `seed` and `quick`."""
    takes: str
    """Time that it took, for the line before it starts."""
    notes: Sequence[str] = ()


def demo(output: Path, *, seed: int = 0, quick: bool = False) -> Settings:
    """Return a comparison of the packaged model on a part of RULER, before and after the same short training."""
    steps = 2 if quick else STEPS
    lengths = (WINDOW, 2 * WINDOW) if quick else tuple(WINDOW * factor for factor in (1, 2, 4, 8, 16))
    overrides = [f"phases.0.steps={steps}", f"phases.0.warmup={min(10, steps // 2)}"]
    if quick:
        overrides.append(f"phases.0.length={2 * WINDOW}")
    return Settings(
        model=str(DEMO_MODEL),
        contenders=parse_schemes(EXTENSIONS, factor=FACTOR),
        lengths=lengths,
        tasks=(*RULER, Perplexity(measures=("fixed",), spots=2 if quick else 16)),
        samples=2 if quick else 16,
        seed=seed,
        training=Training(shipped_recipes()["tiny_yarn"], tuple(overrides)),
        dtype="float32",
        device="cpu",
        window=WINDOW,
        rounds=1 if quick else 3,
    )


PRESETS: Mapping[str, Preset] = {
    "survey": Preset(
        "Positional encodings, trained from scratch", survey.survey, "53 minutes on two cores", survey.NOTES
    ),
    "demo": Preset(
        "Eight times the window of a small model",
        demo,
        "11 minutes on two cores",
        (
            "One small model and one seed: the order of the schemes may hold for other models, their numbers do not.",
            "All schemes and the unpatched model saw the same tokens in the same order.",
            "The training reaches 2,048 tokens, eight windows; 4,096 tokens exceed every scheme's target length.",
        ),
    ),
}


def find(name: str, output: Path, *, seed: int, quick: bool) -> tuple[Preset, Settings]:
    """Return a preset and its settings.

    Raises:
        UnknownNameError: the preset does not exist; the message names the nearest one.
    """
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    return PRESETS[name], PRESETS[name].settings(output, seed=seed, quick=quick)


def refuse(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raise `OptionError` for options that the preset sets."""
    if taken := [f"--{key.replace('_', '-')}" for key, value in given.items() if value != defaults[key]]:
        raise OptionError(
            f"A preset sets its own options: remove {', '.join(taken).replace('--model', 'MODEL')}, or remove --preset."
        )
