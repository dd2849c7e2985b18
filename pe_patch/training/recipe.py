"""Define the recipe format as a tree of dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import PePatchError

VERSION = 1
"""Version of the recipe format. A file with another version raises an error."""


class RecipeError(PePatchError, ValueError):
    """Raised for a recipe that cannot be trained."""


@dataclass
class Model:
    """The model to train: give either `source` or `config`."""

    source: str | None = None
    """A local folder, a GGUF file or a hub name. `demo` is the small model that comes with pe_patch."""
    config: dict[str, Any] | None = None
    """The fields of a Transformers config, including `model_type`. Creates a model with fresh weights."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the weights. Mixed precision keeps them in float32 and computes in bfloat16."""
    attention: str | None = None
    """Transformers' `attn_implementation`. Null uses `flash_attention_2` on a GPU in bfloat16 if it is installed, the
    scheme allows it and micro-batches have one sequence, and otherwise Transformers' default."""
    shifted_groups: int | None = None
    """Number of groups for LongLoRA's shifted sparse attention during training: each token attends in its group, and
    half of the heads use groups shifted by half a group (arXiv 2309.12307, section 3.2). Evaluation uses full
    attention. Null trains with full attention."""
    gradient_checkpointing: bool = False
    """Recompute each layer in the backward pass. Uses less memory and about a third more time."""
    activation_offload: bool = False
    """Keep activations for the backward pass in host memory."""
    quantization: Literal["nf4"] | None = None
    """Keep the frozen weights in 4 bits (QLoRA, arXiv 2305.14314). Needs `lora` and bitsandbytes."""


@dataclass
class Tokenizer:
    """The tokenizer; by default the model's."""

    source: str | None = None
    """A local folder, a GGUF file or a hub name; null uses the model's source."""
    train_size: int | None = None
    """Train a byte-level BPE of this many tokens on the documents instead. It keeps digits separate."""
    retrieval_tokens: bool = False
    """Add the tokens `<k0>`.. and `<v0>`.., which the `tokens` wording of retrieval uses."""


@dataclass
class Scheme:
    """The arguments of `pe_patch.patch_model`."""

    name: str
    """A name from `pe_patch.SCHEMES`."""
    options: dict[str, Any] = field(default_factory=dict)
    """The scheme's options, spelled as in `patch_model` (`factor: 8`, `on_existing: replace`)."""
    options_file: str | None = None
    """A JSON file of options, as `pe-patch search` writes it. The path is relative to the recipe's folder or to the
    current folder. `options` override it."""
    calibration_tokens: int | None = None
    """Number of tokens of the first phase's sequences to pass to the scheme as its option `calibration`."""
    warm_start_tokens: int | None = None
    """Number of tokens on which to fit the scheme's bias to the model's original attention before training."""


@dataclass
class Distill:
    """Distillation: the loss adds the divergence from a teacher's next-token distribution.

    With PoSE, the teacher reads the same tokens at consecutive positions.
    """

    weight: float = 1.0
    """Weight of the divergence; the cross-entropy has weight 1."""
    temperature: float = 1.0
    """Temperature T: both distributions are softmax(logits / T), and the divergence is scaled by T^2 (Hinton et al.
    2015)."""
    source: str | None = None
    """A folder, a GGUF file or a hub name with the same vocabulary; null uses `model.source` without the scheme."""


@dataclass
class Lora:
    """Low-rank adapters (PEFT) instead of full fine-tuning."""

    rank: int = 8
    alpha: int = 16
    """The update is scaled by alpha / rank."""
    dropout: float = 0.0
    targets: str | list[str] = "all-linear"
    """Names of the linear layers to adapt, or `all-linear`."""
    norms: bool = True
    """Train the normalisation layers in full, as in LongLoRA."""
    embeddings: bool = True
    """Train the input embeddings in full, as in LongLoRA."""
    merge: bool = True
    """Merge the adapter and save one plain model; false saves the adapter alone."""


@dataclass
class Data:
    """The training text and how it becomes sequences."""

    source: str = "stdlib"
    """`stdlib`, a folder, a file or a hub name, as `pe_patch.data.text.load_documents` takes them."""
    text_column: str = "text"
    encoding: str | None = None
    """Encoding of files that are not UTF-8 and have no byte order mark, such as `cp1252`; null refuses such files."""
    skip_unreadable: bool = False
    """Skip files that cannot be read and rows without text, and list them, instead of refusing them."""
    bos: bool = True
    """Begin every training row as the tokenizer begins a text (with BOS, for tokenizers that add one). False leaves the
    start tokens out everywhere."""
    split_special_tokens: bool = True
    """Read the names of control tokens in the text, such as `</s>`, as plain text. False reads them as control tokens,
    for text that was written with them, such as chats after a chat template."""
    limit: int | None = None
    """Maximum number of documents; null uses all."""
    boundaries: bool = True
    """Keep attention and positions within each document; false packs contiguous text."""
    workers: int = 0
    """Number of processes that prepare batches in advance."""
    cache: str | None = None
    """Folder that caches tokenised text by its content; null uses `~/.cache/pe_patch`."""
    streaming: bool = False
    """Stream a hub data set instead of downloading it, for data that does not fit on the disk."""


@dataclass
class Source:
    """One source of a phase's mixture."""

    share: float
    """Sampling weight relative to the other sources."""
    kind: Literal["text", "needles"] = "text"
    """`text` is plain text; `needles` hides facts in the text and asks for them at its end."""
    needles: tuple[int, int] = (1, 16)
    """Minimum and maximum number of hidden facts. The sequence asks for all of them."""
    targets: Literal["all", "answers"] = "all"
    """Tokens in the loss: all targets, or only those of the answers."""
    learn_from: Literal["both", "text", "teacher"] = "both"
    """With `distill`, what the targets are learnt from: the text (cross-entropy), the teacher (divergence) or both. A
    teacher alone keeps what the model does on this text; the text alone teaches what the teacher cannot do."""
    source: str | None = None
    """Text source that replaces `data.source`; null uses `data.source`."""
    text_column: str | None = None
    """Text column that replaces `data.text_column`; null uses `data.text_column`."""
    min_length: int | None = None
    """Minimum length in tokens of a document; null takes all documents."""


@dataclass
class Pose:
    """Positions with skips, so that short sequences train long distances (PoSE, arXiv 2309.10400)."""

    target: int
    """Upper bound of the positions, exclusive."""
    chunks: int = 2
    """Number of chunks in each sequence; positions skip between chunks."""


@dataclass
class Phase:
    """A stretch of training with one sequence length, one mixture and one learning-rate schedule."""

    length: int
    """Tokens in a sequence."""
    batch: int
    """Sequences in an optimiser step, summed over all processes."""
    micro_batch: int | None = None
    """Sequences in one forward pass of one process; null uses the process's whole share of the batch."""
    steps: int = 1000
    """Optimiser steps; with `until_accuracy`, the maximum number of steps."""
    mixture: dict[str, Source] = field(default_factory=dict)
    """Sources of the sequences, by a name that you choose."""
    until_accuracy: float | None = None
    """End the phase once the accuracy over the last 25 steps reaches this share; it is an error to miss it. Null trains
    all `steps`."""
    learning_rate: float = 2e-5
    schedule: Literal["constant", "linear", "cosine", "warmup_stable_decay"] = "cosine"
    warmup: int = 20
    """Steps over which the learning rate rises from zero."""
    decay: float = 0.4
    """Share of the steps in which `warmup_stable_decay` decays."""
    decay_shape: Literal["linear", "cosine", "1-sqrt"] = "linear"
    """Shape of that decay."""
    floor: float = 0.0
    """Final learning rate of `cosine` and `warmup_stable_decay`, and the initial one of the latter, as a share of
    `learning_rate`."""
    vocabulary: tuple[int, int] | None = None
    """First token id and one past the last token id in the softmax; null uses the whole vocabulary."""
    pose: Pose | None = None
    """Null uses consecutive positions."""


@dataclass
class Loss:
    """How the loss is computed. These settings do not change its value."""

    chunk: int = 1024
    """Number of targets whose logits are in memory together; 0 computes all logits in one piece."""
    fused: Literal["auto", "never"] = "auto"
    """`auto` uses Liger's fused kernel on a GPU if it is installed."""


@dataclass
class Optimizer:
    """AdamW without weight decay on vectors (norms, biases)."""

    name: Literal["adamw", "adamw_8bit"] = "adamw"
    """`adamw_8bit` is bitsandbytes' AdamW, which keeps its state in 8 bits."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    clip: float = 1.0
    """Maximum norm of the gradient; 0 clips nothing."""


@dataclass
class Evaluation:
    """Measurements on held-out text during and after training."""

    every: int | None = None
    """Steps between evaluations; null never evaluates."""
    tasks: list[str] = field(default_factory=lambda: ["perplexity", "needle"])
    lengths: list[int] = field(default_factory=list)
    """Lengths in tokens; an empty list uses the model's native length and the longest trained one."""
    samples: int = 32
    before: bool = False
    """Also measure the model with its scheme before the first step."""
    original: bool = False
    """Also measure the model without the scheme, as a reference for recovery."""


@dataclass
class Checkpoints:
    """Checkpoints for resuming, in `<output>/checkpoints`."""

    every: int | None = None
    """Steps between checkpoints; null writes none."""
    keep: int = 2
    """Number of newest checkpoints to keep."""


@dataclass
class Guard:
    """Conditions that stop a failing run. A loss that is not finite always stops it."""

    rise: float | None = 2.0
    """Stop if the mean loss of the last `window` steps is this many nats above the lowest such mean of the phase.
    Within the first window, the mean so far is compared with the first loss. Null never stops."""
    window: int = 10
    """Steps in that mean."""
    memory: bool = True
    """Refuse a run whose estimated memory exceeds the free memory."""


@dataclass
class Recipe:
    """One training run."""

    output: str
    """Folder for the log, the checkpoints and the trained model."""
    model: Model = field(default_factory=Model)
    tokenizer: Tokenizer = field(default_factory=Tokenizer)
    scheme: Scheme | None = None
    """Null keeps the model's original positions."""
    lora: Lora | None = None
    """Null trains all weights."""
    distill: Distill | None = None
    """Null trains on the text alone."""
    data: Data = field(default_factory=Data)
    phases: list[Phase] = field(default_factory=list)
    """Phases run in order with one optimiser."""
    optimizer: Optimizer = field(default_factory=Optimizer)
    evaluation: Evaluation = field(default_factory=Evaluation)
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    loss: Loss = field(default_factory=Loss)
    guard: Guard = field(default_factory=Guard)
    average: float = 1.0
    """Share of the trained weights in the saved ones; the rest are the weights before training. Below 1 keeps more of
    what the model did before, such as chat, and often all that was learnt (Wortsman et al. 2021, arXiv 2109.01903)."""
    export: list[str] = field(default_factory=list)
    """Targets of `pe_patch.export`; each is written to `<output>/export/<target>`."""
    mixed_precision: Literal["no", "bf16"] = "no"
    seed: int = 0
    resume: str | None = None
    """`auto` resumes from the newest checkpoint in `output` if there is one. A path resumes from that checkpoint."""
    accept_changed_data: bool = False
    """Resume although the training text is not the one that the run started with."""
    trackers: list[str] | None = None
    """Trackers of Transformers (`report_to`): `tensorboard`, `wandb` and others. Null uses tensorboard if it is
    installed. The run always writes `<output>/log.jsonl`."""
    progress: bool = True
    """Show a progress bar."""
    overwrite: bool = False
    """Write into an output folder that holds something other than a run."""
    dry_run: bool = False
    """Print the plan and its cost, and exit without training."""
    version: int = VERSION
    """Version of the recipe format. Every file must state it."""
