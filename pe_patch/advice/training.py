"""How the authors of a scheme trained with it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainingRecipe:
    """What a paper trained. None is what it does not say."""

    schemes: tuple[str, ...]
    paper: str
    ran: str
    """What the paper ran."""
    sequences: int
    """In an optimiser step."""
    learning_rate: float
    steps: int | None = None
    fixed_tokens: int | None = None
    """Tokens in all, where the paper counts these rather than steps."""
    schedule: str | None = None
    warmup: int | None = None
    betas: tuple[float, float] | None = None
    weight_decay: float | None = None
    window: str = "target"
    """The length of the sequences: that of the target, or the original one."""
    note: str = ""

    def length(self, target: int, original: int) -> int:
        """Tokens in a sequence."""
        return target if self.window == "target" else original

    def tokens(self, target: int, original: int) -> int:
        """Tokens in all: as many sequences and steps as in the paper, or its own number."""
        if self.fixed_tokens is not None:
            return self.fixed_tokens
        assert self.steps is not None
        return self.sequences * self.steps * self.length(target, original)


RECIPES: tuple[TrainingRecipe, ...] = (
    TrainingRecipe(
        ("yarn",), "Peng et al. 2023, arXiv 2309.00071",
        "Llama-2 from 4,096 to 65,536 tokens on PG19",
        sequences=64, steps=400, learning_rate=2e-5, schedule="linear", warmup=20, betas=(0.9, 0.95), weight_decay=0.0,
        note="about 0.1 % of the tokens of pre-training; 200 steps more made factor 32 of factor 16",
    ),
    TrainingRecipe(
        ("linear",), "Chen et al. 2023, arXiv 2306.15595",
        "LLaMA from 2,048 to 8,192 tokens on the Pile; to 32,768 with 128 sequences",
        sequences=64, steps=1000, learning_rate=2e-5, warmup=20, betas=(0.9, 0.95), weight_decay=0.0,
        note="retrieval reached the whole window after 200 steps; learning rate 1e-5 from 33 billion weights on",
    ),
    TrainingRecipe(
        ("linear",), "LongLoRA: Chen et al. 2023, arXiv 2309.12307",
        "Llama-2 to 8,192 up to 100,000 tokens on RedPajama",
        sequences=64, steps=1000, learning_rate=2e-5, schedule="constant", warmup=20, weight_decay=0.0,
        note="adapters of rank 8, embeddings and norms in full, shifted groups: recipes/configs/longlora_8b_32k.yaml",
    ),
    TrainingRecipe(
        ("linear", "ntk", "yarn"), "PoSE: Zhu et al. 2023, arXiv 2309.10400",
        "windows of 2,048 tokens, their positions skipping up to 16,384 and to 131,072",
        sequences=64, steps=1000, learning_rate=2e-5, warmup=10, window="original",
        note="memory and time of the original window; recipes/configs/pose_7b_32k.yaml",
    ),
    TrainingRecipe(
        ("longrope", "ntk", "yarn"), "LongRoPE2: Shang et al. 2025, arXiv 2502.20082",
        "Llama-3-8B and Phi3-mini to 131,072 tokens",
        sequences=64, fixed_tokens=10_000_000_000, learning_rate=2e-5, schedule="cosine",
        note="its searched factors and, as baselines, ntk and yarn; short documents kept the original rotation",
    ),
    TrainingRecipe(
        ("ntk",), "ProLong: Gao et al. 2024, arXiv 2410.02660",
        "Llama-3-8B to 65,536 tokens with the base raised to 8e6",
        sequences=64, steps=5000, learning_rate=1e-5, schedule="cosine", betas=(0.9, 0.95), weight_decay=0.1,
        note="30 % code repositories, 30 % books, 37 % short text; 10 % of the steps are warm-up",
    ),
    TrainingRecipe(
        ("drope",), "Gelberg et al. 2025, arXiv 2512.12167",
        "Llama-2-7B at its own 4,096 tokens on FineWeb-Edu",
        sequences=512, steps=5000, learning_rate=1e-4, schedule="cosine", warmup=100, betas=(0.9, 0.999),
        weight_decay=0.0, window="original", note="10 billion tokens; the window is extended by what is not trained",
    ),
)  # fmt: skip
"""In the order in which they are shown: the fewest tokens first."""


def recipes_for(schemes: set[str]) -> list[TrainingRecipe]:
    """Those that train one of the schemes."""
    return [recipe for recipe in RECIPES if schemes & set(recipe.schemes)]
