"""Read how the script was launched, and refuse what the launch would drop: processes, devices, kind of parallelism."""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from datetime import timedelta
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DistributedType, patch_environment
from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.integrations.integration_utils import get_available_reporting_integrations

from .. import compat
from ..errors import nearest
from ..patching.api import find_patch
from .quantise import INSTALL
from .recipe import Recipe, RecipeError

WAIT = timedelta(days=2)
"""Longest time that processes wait for the main process, which may evaluate, export or save meanwhile."""
OPTIMIZERS = {"adamw": "adamw_torch_fused", "adamw_8bit": "adamw_bnb_8bit"}
"""Transformers' name of each optimiser."""
INSTEAD = "Use Ulysses (sp_size instead of cp_size), which supports it."


class Launch:
    """The processes of a run, and Transformers' arguments for them. Creating it joins the process group.

    Args:
        recipe: the recipe of the run.

    Raises:
        RecipeError: the launch asks for something that would be ignored or is not supported.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.parallelism = ParallelismConfig() if is_enabled("ACCELERATE_USE_PARALLELISM_CONFIG") else None
        sizes = {kind: getattr(self.parallelism, f"{kind}_size", 1) for kind in ("tp", "sp", "cp")}
        uses_deepspeed = is_enabled("ACCELERATE_USE_DEEPSPEED")
        if uses_deepspeed and is_enabled("ACCELERATE_USE_CPU"):
            raise RecipeError(
                "DeepSpeed does not run on a CPU if accelerate's use_cpu is set, which runs DDP instead: remove "
                "use_cpu from accelerate's configuration (ACCELERATE_USE_CPU)."
            )
        if sizes["tp"] > 1:
            raise RecipeError("tp_size: recipes do not support tensor parallelism; use FSDP2, ZeRO-3 or Ulysses.")
        if sizes["sp"] > 1 and not uses_deepspeed:
            raise RecipeError("sp_size: Ulysses needs DeepSpeed; launch with recipes/accelerate/ulysses.yaml.")
        if recipe.optimizer.name == "adamw_8bit" and find_spec("bitsandbytes") is None:
            raise RecipeError(f"optimizer.name: adamw_8bit needs bitsandbytes: {INSTALL}.")
        self.cut_by_ring, self.cut_by_heads = sizes["cp"] > 1, sizes["sp"] > 1
        self.parts = max(sizes["cp"], sizes["sp"])
        """Number of parts, each on one process, that a sequence is cut into."""
        self.arguments = _arguments(recipe, self.parallelism, uses_deepspeed)
        self.device: torch.device = self.arguments.device
        self.rank, self.world = self.arguments.process_index, self.arguments.world_size
        self.deepspeed: dict[str, Any] | None = None
        """DeepSpeed's configuration; None without DeepSpeed."""
        if uses_deepspeed:
            self.deepspeed = self._configured_deepspeed(recipe)
        self.stage = int(self.deepspeed["zero_optimization"]["stage"]) if self.deepspeed is not None else 0
        self.uses_fsdp = self._uses_fsdp()
        if self.cut_by_ring and not self.uses_fsdp:
            raise RecipeError("cp_size: context parallelism needs FSDP2; enable it in accelerate's configuration.")
        # A separate group has a longer time limit than the steps, whose limit finds processes that hang.
        self.waiting: Any = dist.new_group(backend="gloo", timeout=WAIT) if self.world > 1 else None

    def _configured_deepspeed(self, recipe: Recipe) -> dict[str, Any]:
        """Return DeepSpeed's configuration with what the recipe decides, whatever the launcher says."""
        plugin: Any = self.arguments.deepspeed_plugin
        if self.arguments.distributed_state.distributed_type != DistributedType.DEEPSPEED:  # pyright: ignore
            raise RecipeError("DeepSpeed needs a launcher, such as accelerate launch or torchrun.")
        if plugin.zero3_init_flag:
            raise RecipeError(
                "zero3_init_flag: a model loaded in parts cannot be patched, warm started or converted; set it to "
                "false in accelerate's configuration (ACCELERATE_DEEPSPEED_ZERO3_INIT)."
            )
        unset_hf_deepspeed_config()  # otherwise Transformers still loads models in parts
        config = plugin.hf_ds_config.config
        # A step of the trainer passes its micro-batches itself, and marks the last one.
        config.update(train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1, train_batch_size="auto")
        config["gradient_clipping"] = recipe.optimizer.clip
        if int(config["zero_optimization"]["stage"]) == 3:  # its two modes divide gradients by different numbers
            config["zero_optimization"]["reduce_scatter"] = True
        if self.device.type == "cpu":  # otherwise DeepSpeed compiles its CPU optimiser
            config["zero_force_ds_cpu_optimizer"] = False
        return config

    def _uses_fsdp(self) -> bool:
        if not is_enabled("ACCELERATE_USE_FSDP"):
            return False
        if self.world == 1 and "LOCAL_RANK" not in os.environ:
            raise RecipeError("FSDP needs several processes, and there is one process; launch more, or disable FSDP.")
        if self.device.type == "cpu":
            raise RecipeError(
                "FSDP does not run on CPUs: accelerate would run DDP instead without a warning. Launch with "
                "recipes/accelerate/cpu_ddp.yaml."
            )
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise RecipeError("fsdp_version: 1 is not supported; set fsdp_version: 2.")
        return True

    @property
    def is_main(self) -> bool:
        """True on the one process that writes and prints."""
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        """True if each process holds only a part of the weights, so that all must run every forward together."""
        return self.uses_fsdp or self.stage == 3

    @property
    def shards(self) -> int:
        """Number of processes that share gradients and optimiser state."""
        return self.world if self.uses_fsdp or self.stage else 1

    @property
    def data_rank(self) -> int:
        """Index of this process's group among the groups that see different sequences."""
        return self.rank // self.parts

    @property
    def data_world(self) -> int:
        """Number of groups that see different sequences."""
        return self.world // self.parts

    @property
    def local_world(self) -> int:
        """Number of processes on this machine."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", 1))

    @property
    def gradient_factor(self) -> int:
        """Factor of a loss whose gradients are to be summed over processes; it undoes the mean that is taken.

        DDP and FSDP2 take the mean over all processes. DeepSpeed takes the mean over the groups that see different
        sequences, and the sum over the parts of a sequence; where it reduces and scatters in one operation (ZeRO-3),
        the mean over all processes.
        """
        return self.data_world if self.deepspeed is not None and self.stage != 3 else self.world

    def describe(self) -> str:
        """Return the devices and the kind of parallelism in words."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None
        name = name or f"{self.device} ({platform.machine()})"
        if self.deepspeed is None:
            kind = "context parallelism" if self.cut_by_ring else "FSDP2" if self.uses_fsdp else "DDP"
            return f"{self.world} x {name}, {kind}" if self.world > 1 else name
        cut = f", sequences in {self.parts} parts (Ulysses)" if self.cut_by_heads else ""
        return f"{self.world} x {name}, DeepSpeed ZeRO-{self.stage}{cut}"

    @property
    def memory_of(self) -> str:
        """A description of what `memory` measures."""
        return "this process, including all that it loaded," if self.device.type != "cuda" else "a device"

    def memory(self) -> int:
        """Return the peak memory in bytes of this process's device, or of the whole process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        import resource  # not available on Windows

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over all processes."""
        if self.world > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def failed_anywhere(self, failed: bool) -> bool:
        """Return whether any process failed. All processes wait here for each other, for as long as `WAIT`."""
        return bool(self._agreed(float(failed), dist.ReduceOp.MAX))

    def least(self, number: int) -> int:
        """Return the smallest of a number over all processes."""
        return int(self._agreed(number, dist.ReduceOp.MIN))

    def wait(self) -> None:
        """Wait for all processes, for as long as `WAIT`."""
        self._agreed(0.0, dist.ReduceOp.MAX)

    def leave(self) -> None:
        """Leave the process group. Nothing that needs other processes may come after it."""
        if self.world > 1:
            dist.destroy_process_group()

    def _agreed(self, value: float, operation: Any) -> float:
        if self.world == 1:
            return value
        values = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(values, operation, group=self.waiting)
        return float(values)

    def refuse(self, recipe: Recipe, model: nn.Module) -> None:
        """Raise `RecipeError` for what this launch would ignore or cannot run."""
        if self.sharded and recipe.model.quantization is not None:
            kind = "ZeRO-3" if self.deepspeed is not None else "FSDP2"
            raise RecipeError(f"model.quantization: {kind} cannot shard 4-bit weights; use DDP.")
        if self.uses_fsdp and recipe.optimizer.name == "adamw_8bit":
            raise RecipeError(
                "optimizer.name: adamw_8bit cannot read FSDP2's sharded parameters; use adamw, whose moments are "
                "sharded too, or train with DDP."
            )
        if self.deepspeed is not None and recipe.mixed_precision == "bf16" and self.stage == 0:
            raise RecipeError(
                "mixed_precision=bf16: DeepSpeed's optimiser for zero_stage 0 gives other results than its "
                "other stages, which agree with DDP; set zero_stage to 1 or more."
            )
        if self.cut_by_heads:
            refuse_under_ulysses(recipe, model, self.parts)
        if self.cut_by_ring:
            refuse_under_context_parallel(recipe, model, self.parts)


def _arguments(recipe: Recipe, parallelism: ParallelismConfig | None, uses_deepspeed: bool) -> TrainingArguments:
    """Return Transformers' arguments for a recipe; creating them joins the process group."""
    without_accelerator = not torch.accelerator.is_available()
    extra: dict[str, Any] = {}
    if without_accelerator and (uses_deepspeed or int(os.environ.get("WORLD_SIZE", 1)) > 1):
        extra["ddp_backend"] = "gloo"
    if without_accelerator and uses_deepspeed:
        _prepare_deepspeed_on_cpu()
    # These settings of the launcher would change the numbers behind the recipe's back.
    settings = {"accelerate_mixed_precision": recipe.mixed_precision, "accelerate_gradient_accumulation_steps": "1"}
    with patch_environment(**settings):
        arguments = TrainingArguments(
            # A dry run writes nothing, and Trainer creates its output folder.
            output_dir=tempfile.gettempdir() if recipe.dry_run else recipe.output,
            max_steps=max(1, sum(phase.steps for phase in recipe.phases)),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=1,
            optim=OPTIMIZERS[recipe.optimizer.name],
            adam_beta1=recipe.optimizer.betas[0],
            adam_beta2=recipe.optimizer.betas[1],
            weight_decay=recipe.optimizer.weight_decay,
            max_grad_norm=recipe.optimizer.clip,
            learning_rate=0.0,  # set before each step
            lr_scheduler_type="constant",
            seed=recipe.seed,
            logging_strategy="no",
            logging_nan_inf_filter=False,
            eval_strategy="no",
            save_strategy="no",
            report_to=_trackers(recipe),
            disable_tqdm=True,
            label_names=["labels"],
            remove_unused_columns=False,
            ignore_data_skip=True,
            ddp_find_unused_parameters=False,
            parallelism_config=parallelism,
            use_cpu=without_accelerator and not uses_deepspeed,
            **extra,
        )
    arguments.bf16 = recipe.mixed_precision == "bf16"  # checked here, and not by a rule that knows only GPUs
    compat.use_one_gpu(arguments)
    return arguments


def _trackers(recipe: Recipe) -> list[str]:
    """Return the recipe's trackers; by default tensorboard if it is installed."""
    if recipe.dry_run:
        return []
    available = get_available_reporting_integrations()
    if recipe.trackers is None:
        return [name for name in available if name == "tensorboard"]
    for name in recipe.trackers:
        if name not in available:
            raise RecipeError(
                f"trackers: {name!r} is not installed or not known to Transformers.{nearest(name, available)} "
                f"Available here: {', '.join(available) or 'none'}."
            )
    return list(recipe.trackers)


def _prepare_deepspeed_on_cpu() -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    # DeepSpeed would compile this on first use, which not every machine can.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def is_enabled(name: str) -> bool:
    """Return whether the launcher enabled this environment variable."""
    return os.environ.get(name, "false").lower() in ("true", "1")


def attention_of(model: nn.Module) -> Any:
    """Return the name of the attention function that Ulysses wraps. It is ours, which restores what Ulysses drops."""
    patch = find_patch(model)
    if patch is None:
        raise RecipeError(
            "Ulysses drops the masks that separate packed documents, and without a scheme nothing restores them: set "
            "scheme: {name: rope}, which changes nothing else."
        )
    return compat.attention_implementation(patch.base.config)


def set_rows(ulysses: Any, rows: int) -> None:
    """Set the number of rows, which Ulysses fixes at construction."""
    if ulysses.batch_size == rows:
        return
    ulysses.batch_size = rows
    for name in compat.ULYSSES_SHAPES:
        length, _, *rest = getattr(ulysses, name)
        setattr(ulysses, name, torch.Size([length, rows, *rest]))


def refuse_under_ulysses(recipe: Any, model: nn.Module, parts: int) -> None:
    """Raise `RecipeError` for what Ulysses would drop or cannot cut."""
    attention_of(model)
    patch: Any = find_patch(model)
    config = patch.base.config
    heads, key_heads = patch.shape.num_heads, patch.shape.num_key_value_heads
    if heads % parts:
        raise RecipeError(f"Ulysses shares {heads} heads among {parts} processes; use an sp_size that divides them.")
    if key_heads % parts and parts % key_heads:
        raise RecipeError(f"Ulysses cannot share {key_heads} key heads among {parts} processes.")
    if recipe.distill is not None:
        raise RecipeError("distill: under Ulysses a teacher would see only a part of each sequence.")
    if getattr(recipe.model, "shifted_groups", None):
        raise RecipeError("model.shifted_groups needs whole sequences, which Ulysses cuts; remove one of them.")
    if compat.attention_implementation(config) in ("pe_eager", "pe_flex_attention"):
        raise RecipeError("model.attention: Ulysses supports neither eager nor flex; use sdpa or flash, or remove it.")
    if patch.base.pe_runtime.unsplittable is not None:
        raise RecipeError(
            f"scheme {patch.scheme.name}: Ulysses cannot cut sequences: {patch.base.pe_runtime.unsplittable}."
        )
    for number, phase in enumerate(recipe.phases):
        if phase.length % parts:
            raise RecipeError(f"phases[{number}].length={phase.length} cannot be cut into {parts} equal parts.")


def refuse_under_context_parallel(recipe: Any, model: nn.Module, parts: int) -> None:
    """Raise `RecipeError` unless attention is plain and causal, and queries and keys arrive rotated.

    The ring of torch's context parallelism drops masks and biases.
    """
    patch = find_patch(model)
    if patch is not None:
        attentions = patch.adapter.attentions(patch.base).values()
        if any(attention.__dict__["pe_scheme"] is not None for attention in attentions):
            raise RecipeError(
                f"scheme {patch.scheme.name} acts at the scores, and context parallelism would drop it. {INSTEAD}"
            )
        if compat.attention_implementation(patch.base.config) != "pe_sdpa":
            raise RecipeError("model.attention: context parallelism supports only sdpa.")
    if recipe.data.boundaries:
        raise RecipeError(
            "data.boundaries: context parallelism drops the masks that separate packed documents. Set it to false, "
            "or use Ulysses (sp_size instead of cp_size)."
        )
    if recipe.distill is not None:
        raise RecipeError("distill: under context parallelism a teacher would see only parts of sequences.")
    for number, phase in enumerate(recipe.phases):
        if phase.pose is not None:
            raise RecipeError(f"phases[{number}].pose needs a mask of ones, which context parallelism drops.")
        if phase.length % (2 * parts):
            raise RecipeError(
                f"phases[{number}].length={phase.length}: context parallelism needs a multiple of {2 * parts}."
            )
