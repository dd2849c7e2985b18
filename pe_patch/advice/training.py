"""How the authors of each scheme trained with it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainingRecipe:
    """The training settings of a paper. None if the paper does not state a setting."""

    schemes: tuple[str, ...]
    paper: str
    ran: str
    """The models, lengths and data of the paper."""
    sequences: int
    """Sequences per optimizer step."""
    learning_rate: float
    steps: int | None = None
    fixed_tokens: int | None = None
    """Total tokens, if the paper states them instead of steps."""
    schedule: str | None = None
    warmup: int | None = None
    betas: tuple[float, float] | None = None
    weight_decay: float | None = None
    window: str = "target"
    """The length of the training sequences: "target" or "original"."""
    note: str = ""

    def length(self, target: int, original: int) -> int:
        """Return the tokens per sequence."""
        return target if self.window == "target" else original

    def tokens(self, target: int, original: int) -> int:
        """Return the total tokens: the paper's fixed number, or its sequences and steps at this length."""
        if self.fixed_tokens is not None:
            return self.fixed_tokens
        assert self.steps is not None
        return self.sequences * self.steps * self.length(target, original)


@dataclass(frozen=True)
class TrainingPlan:
    """A paper's training, scaled to a target length."""

    recipe: TrainingRecipe
    length: int
    """Tokens per sequence."""
    tokens: int
    """Total training tokens."""
    flops: float
    """Floating-point operations of the whole training."""


RECIPES: tuple[TrainingRecipe, ...] = (
    TrainingRecipe(
        ("yarn",), "Peng et al. 2023, arXiv 2309.00071",
        "Llama-2 from 4,096 to 65,536 tokens on PG19",
        sequences=64, steps=400, learning_rate=2e-5, schedule="linear", warmup=20, betas=(0.9, 0.95), weight_decay=0.0,
        note="about 0.1 % of the pre-training tokens; 200 more steps took factor 16 to 32",
    ),
    TrainingRecipe(
        ("linear",), "Chen et al. 2023, arXiv 2306.15595",
        "LLaMA from 2,048 to 8,192 tokens on the Pile; to 32,768 with 128 sequences",
        sequences=64, steps=1000, learning_rate=2e-5, warmup=20, betas=(0.9, 0.95), weight_decay=0.0,
        note="retrieval reached the whole window after 200 steps; learning rate 1e-5 at 33 billion weights and above",
    ),
    TrainingRecipe(
        ("linear",), "LongLoRA: Chen et al. 2023, arXiv 2309.12307",
        "Llama-2 to 8,192 up to 100,000 tokens on RedPajama",
        sequences=64, steps=1000, learning_rate=2e-5, schedule="constant", warmup=20, weight_decay=0.0,
        note="adapters of rank 8, full embeddings and norms, shifted groups: recipes/configs/longlora_8b_32k.yaml",
    ),
    TrainingRecipe(
        ("linear", "ntk", "yarn"), "PoSE: Zhu et al. 2023, arXiv 2309.10400",
        "windows of 2,048 tokens with positions that skip up to 16,384 and to 131,072",
        sequences=64, steps=1000, learning_rate=2e-5, warmup=10, window="original",
        note="needs the memory and time of the original window; recipes/configs/pose_7b_32k.yaml, and for 135 M "
        "weights on a CPU, in 50 minutes, smollm2_pose_32k.yaml",
    ),
    TrainingRecipe(
        ("longrope", "ntk", "yarn"), "LongRoPE2: Shang et al. 2025, arXiv 2502.20082",
        "Llama-3-8B and Phi3-mini to 131,072 tokens",
        sequences=64, fixed_tokens=10_000_000_000, learning_rate=2e-5, schedule="cosine",
        note="searched factors, with ntk and yarn as baselines; short documents kept the original rotation",
    ),
    TrainingRecipe(
        ("ntk",), "ProLong: Gao et al. 2024, arXiv 2410.02660",
        "Llama-3-8B to 65,536 tokens with the base raised to 8e6",
        sequences=64, steps=5000, learning_rate=1e-5, schedule="cosine", betas=(0.9, 0.95), weight_decay=0.1,
        note="30 % code repositories, 30 % books, 37 % short text; 10 % of the steps are warm-up",
    ),
    TrainingRecipe(
        ("drope",), "Gelberg et al. 2025, arXiv 2512.12167",
        "Llama-2-7B at its original 4,096 tokens on FineWeb-Edu",
        sequences=512, steps=5000, learning_rate=1e-4, schedule="cosine", warmup=100, betas=(0.9, 0.999),
        weight_decay=0.0, window="original",
        note="10 billion tokens at the original length; the extension itself needs no training",
    ),
)  # fmt: skip
"""The recipes in display order, roughly from few tokens to many."""


def recipes_for(schemes: set[str]) -> list[TrainingRecipe]:
    """Return the recipes that train at least one of the schemes."""
    return [recipe for recipe in RECIPES if schemes & set(recipe.schemes)]
