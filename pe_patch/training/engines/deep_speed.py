"""Train with DeepSpeed through accelerate: ZeRO shards weights and optimiser, and Ulysses cuts sequences."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from ... import compat
from ...attention.parallel import ulysses_of
from ...patching.api import find_patch
from ..recipe import RecipeError
from .engine import Engine


class DeepSpeed(Engine):
    """ZeRO of any stage. With `sp_size` above 1, Ulysses cuts sequences and shares attention by heads."""

    name = "DeepSpeed"

    def __init__(self, accelerator: Any) -> None:
        super().__init__(accelerator)
        if accelerator.distributed_type != DistributedType.DEEPSPEED:
            raise RecipeError(
                "DeepSpeed does not run on a CPU if accelerate's use_cpu is set, which runs DDP instead: remove "
                "use_cpu from accelerate's configuration (ACCELERATE_USE_CPU)."
            )
        if accelerator.deepspeed_plugin.zero3_init_flag:
            raise RecipeError(
                "zero3_init_flag: a model loaded in parts cannot be patched, warm started or converted; set it to "
                "false in accelerate's configuration (ACCELERATE_DEEPSPEED_ZERO3_INIT)."
            )
        unset_hf_deepspeed_config()  # otherwise Transformers still loads models in parts
        self.config: dict[str, Any] = accelerator.deepspeed_plugin.deepspeed_config
        self.stage = int(self.config["zero_optimization"]["stage"])
        self.sharded = self.stage == 3
        parallelism = accelerator.parallelism_config
        self.parts = parallelism.sp_size if parallelism is not None else 1
        self.last = True

    @property
    def shards(self) -> int:
        return self.accelerator.num_processes if self.stage else 1

    def describe(self) -> str:
        cut = f", sequences in {self.parts} parts (Ulysses)" if self.parts > 1 else ""
        return f"{super().describe()} ZeRO-{self.stage}{cut}"

    def refuse(self, recipe: Any, model: nn.Module) -> None:
        if recipe.model.quantization is not None and self.stage == 3:
            raise RecipeError("model.quantization: ZeRO-3 cannot shard 4-bit weights; use DDP.")
        if recipe.mixed_precision == "bf16" and self.stage == 0:
            raise RecipeError(
                "mixed_precision=bf16: DeepSpeed's optimiser for zero_stage 0 gives other results than its "
                "other stages, which agree with DDP; set zero_stage to 1 or more."
            )
        if self.parts > 1:
            refuse_under_ulysses(recipe, model, self.parts)

    def prepare(self, model: nn.Module, optimizer: Any) -> tuple[Any, Any]:
        # `inputs` sets the number of rows in each pass, and `micro_step` marks the last pass of a step.
        self.config.update(train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1)
        if self.stage == 3:  # its two modes divide gradients by different numbers; use the default
            self.config["zero_optimization"]["reduce_scatter"] = True
        if self.accelerator.device.type == "cpu":  # otherwise DeepSpeed compiles its CPU optimiser
            self.config["zero_force_ds_cpu_optimizer"] = False
        if self.parts > 1:
            parallelism = self.accelerator.parallelism_config
            # accelerate accepts only Transformers' names here, and counts sequences by sizes that are optional.
            parallelism.sp_handler.sp_attn_implementation = attention_of(model)
            parallelism.dp_replicate_size, parallelism.dp_shard_size = 1, self.data_world
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        return self.model, self.optimizer

    def inputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        whole = super().inputs(batch)
        rows, length = whole["input_ids"].shape
        if length % self.parts:
            raise RecipeError(f"A sequence of {length} tokens cannot be cut into {self.parts} equal parts.")
        if self.parts > 1:
            set_rows(self.ulysses, rows)
        index = self.accelerator.process_index % self.parts
        return {name: tensor.chunk(self.parts, 1)[index].contiguous() for name, tensor in whole.items()}

    @property
    def ulysses(self) -> Any:
        """The Ulysses wrapper of the attention function."""
        return ulysses_of(self.accelerator.parallelism_config.sp_handler.sp_attn_implementation)

    def micro_step(self, last: bool) -> AbstractContextManager[Any]:
        self.last = last
        self.model.set_gradient_accumulation_boundary(is_boundary=last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Scale the loss and run DeepSpeed's backward pass.

        DeepSpeed's gradient is the mean over groups that see different sequences, and the sum over parts of a sequence.
        Where it reduces and scatters in one operation (ZeRO-3), the gradient is the mean over all processes.
        """
        means = self.accelerator.num_processes if self.stage == 3 else self.data_world
        self.model.backward(loss * means, scale_wrt_gas=False)
        if not self.last:
            self.model.step()  # this only counts the micro-batch

    def clip(self, norm: float) -> float:
        """Clip the gradient. With sharded gradients this also takes the step, because their norm is known only then."""
        if self.is_unmodified:
            self._set_clipping(0.0)
            return float(nn.utils.clip_grad_norm_(self.model.parameters(), norm))
        self._set_clipping(norm)
        self.model.step()
        return float(self.model.get_global_grad_norm())

    def step(self) -> None:
        if self.is_unmodified:
            self.model.step()

    @property
    def is_unmodified(self) -> bool:
        """True if DeepSpeed left optimiser and gradients unchanged."""
        return isinstance(self.model.optimizer, torch.optim.Optimizer)

    def _set_clipping(self, norm: float) -> None:
        compat.set_gradient_clipping(self.model, norm)
        if hasattr(self.model.optimizer, "clip_grad"):
            self.model.optimizer.clip_grad = norm

    def full_state_dict(self) -> dict[str, Tensor] | None:
        if not self.sharded:
            return None
        return compat.consolidated_state_dict(self.model)

    def reduce(self, values: Tensor) -> Tensor:
        values = values.clone()
        torch.distributed.all_reduce(values)
        return values


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
