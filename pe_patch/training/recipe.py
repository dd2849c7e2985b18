"""What a recipe may say: a tree of dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import PePatchError

VERSION = 1
"""Of what a recipe may say; a file of another version is refused."""


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
    shifted_groups: int | None = None
    """LongLoRA's shifted sparse attention while training: attention within this many groups of each sequence, in half
    of the heads shifted by half a group (arXiv 2309.12307, section 3.2). Evaluation has full attention."""
    gradient_checkpointing: bool = False
    """Recompute each layer in the backward pass: less memory, about a third more time."""
    activation_offload: bool = False
    """What the backward pass needs waits in the host's memory."""
    quantization: Literal["nf4"] | None = None
    """Keep the frozen weights in 4 bits (QLoRA, arXiv 2305.14314); needs `lora` and bitsandbytes."""


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
    options_file: str | None = None
    """A JSON file of options, as `pe-patch search` writes it, from the recipe's folder or where the run starts;
    those in `options` go before."""
    calibration_tokens: int | None = None
    """How many tokens of the first phase's sequences are handed to the scheme as its option `calibration`."""
    warm_start_tokens: int | None = None
    """Start the scheme's bias from what the model's own positions do to its scores over so many tokens."""


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
    """`stdlib`, a folder, a file, or a hub name, as `pe_patch.data.text.load_documents` takes them."""
    text_column: str = "text"
    limit: int | None = None
    """The greatest number of documents."""
    boundaries: bool = True
    """Neither attention nor positions cross from one document to the next; false packs contiguous text."""
    workers: int = 0
    """Processes that prepare batches ahead of time."""
    cache: str | None = None
    """A folder for tokenised text, found again by its content; null is `~/.cache/pe_patch`."""
    streaming: bool = False
    """Read a data set of the hub as it comes, for what does not fit on the disk."""


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
    source: str | None = None
    """Another source of text than `data.source`."""
    text_column: str | None = None
    """Another column than `data.text_column`."""
    min_length: int | None = None
    """Take only documents of at least so many tokens."""


@dataclass
class Pose:
    """Positions that skip, so that short sequences train the distances of long ones (PoSE, arXiv 2309.10400)."""

    target: int
    """Positions go up to here, not included."""
    chunks: int = 2
    """Into how many a sequence is cut; between them positions skip."""


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
    pose: Pose | None = None
    """Null: positions are consecutive."""


@dataclass
class Loss:
    """How the loss is computed; none of this changes its value."""

    chunk: int = 1024
    """Targets whose logits exist at once; 0 makes them all at once."""
    fused: Literal["auto", "never"] = "auto"
    """Use Liger's fused kernel on a GPU where it is installed."""


@dataclass
class Optimizer:
    """AdamW; vectors (norms, biases) are not decayed."""

    name: Literal["adamw", "adamw_8bit"] = "adamw"
    """`adamw_8bit` keeps its state in 8 bits, of bitsandbytes."""
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
    """In tokens; empty is the model's native length and the longest trained one."""
    samples: int = 32
    before: bool = False
    """Measure the model with its scheme before the first step, too."""
    original: bool = False
    """Measure it without the scheme first: what a change of scheme has to come back to."""


@dataclass
class Checkpoints:
    """Everything a resumed run needs, in `<output>/checkpoints`."""

    every: int | None = None
    """Steps between checkpoints; null writes none."""
    keep: int = 2
    """How many of the newest are kept."""


@dataclass
class Guard:
    """When to stop a run that has gone wrong. A loss that is no number always stops it."""

    rise: float | None = 2.0
    """Stop where the mean loss of the last `window` steps is so many nats above the lowest such mean of the phase; null
    never does."""
    window: int = 10
    memory: bool = True
    """Refuse a run that by arithmetic cannot fit the memory there is."""


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
    loss: Loss = field(default_factory=Loss)
    guard: Guard = field(default_factory=Guard)
    export: list[str] = field(default_factory=list)
    """Targets of `pe_patch.export`, each written to `<output>/export/<target>`."""
    mixed_precision: Literal["no", "bf16"] = "no"
    seed: int = 0
    resume: str | None = None
    """`auto` goes on from the newest checkpoint in `output` if there is one; or the path of a checkpoint."""
    trackers: list[str] | None = None
    """Of accelerate: `tensorboard`, `wandb` and others; null is tensorboard where it is installed. `<output>/log.jsonl`
    is always written."""
    progress: bool = True
    """Show a progress bar."""
    overwrite: bool = False
    """Write into an output folder that holds something else than a run."""
    dry_run: bool = False
    """Print what would be trained and what it would cost, and stop."""
    version: int = VERSION
    """Of the recipe's format; every file says it."""
