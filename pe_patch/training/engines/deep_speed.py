"""DeepSpeed through accelerate: ZeRO, which shards weights and optimiser, and Ulysses, which cuts sequences."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from ...attention.parallel import ulysses_of
from ...patching.api import find_patch
from ..recipe import RecipeError
from .engine import Engine


class DeepSpeed(Engine):
    """ZeRO of any stage; with `sp_size` above 1, sequences are cut and attention is shared by its heads (Ulysses)."""

    name = "DeepSpeed"

    def __init__(self, accelerator: Any) -> None:
        super().__init__(accelerator)
        if accelerator.distributed_type != DistributedType.DEEPSPEED:
            raise RecipeError(
                "DeepSpeed was asked for, and accelerate leaves it out on a CPU: take use_cpu out of its configuration "
                "(ACCELERATE_USE_CPU), with which it would run DDP."
            )
        if accelerator.deepspeed_plugin.zero3_init_flag:
            raise RecipeError(
                "zero3_init_flag: a model that is loaded in parts cannot be patched, warm started or converted; set it "
                "to false in accelerate's configuration (ACCELERATE_DEEPSPEED_ZERO3_INIT)."
            )
        unset_hf_deepspeed_config()  # by which Transformers would load models in parts all the same
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
            raise RecipeError("model.quantization: ZeRO-3 shards numbers, and weights of 4 bits are none; use DDP.")
        if recipe.mixed_precision == "bf16" and self.stage == 0:
            raise RecipeError(
                "mixed_precision=bf16: DeepSpeed's optimiser for zero_stage 0 leads elsewhere than those of its other "
                "stages, which agree with DDP; set zero_stage to 1 or more."
            )
        if self.parts > 1:
            refuse_under_ulysses(recipe, model, self.parts)

    def prepare(self, model: nn.Module, optimizer: Any) -> tuple[Any, Any]:
        # Rows are told pass by pass, and how many passes make a step is told at the last of them.
        self.config.update(train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1)
        if self.stage == 3:  # of its two ways, which divide gradients by different numbers, the usual one
            self.config["zero_optimization"]["reduce_scatter"] = True
        if self.accelerator.device.type == "cpu":  # else DeepSpeed would compile an optimiser of its own
            self.config["zero_force_ds_cpu_optimizer"] = False
        if self.parts > 1:
            parallelism = self.accelerator.parallelism_config
            # accelerate takes only Transformers' own names here, and counts sequences by sizes that nobody need give.
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
            tell_rows(self.ulysses, rows)
        part = self.accelerator.process_index % self.parts
        return {name: tensor.chunk(self.parts, 1)[part].contiguous() for name, tensor in whole.items()}

    @property
    def ulysses(self) -> Any:
        """What stands in the place of the attention function."""
        return ulysses_of(self.accelerator.parallelism_config.sp_handler.sp_attn_implementation)

    def micro_step(self, last: bool) -> AbstractContextManager[Any]:
        self.last = last
        self.model.set_gradient_accumulation_boundary(is_boundary=last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """DeepSpeed's gradient is the mean over groups that see different sequences, and the sum over parts of one;
        where it reduces and scatters at once (ZeRO-3), it is the mean over all processes."""
        means = self.accelerator.num_processes if self.stage == 3 else self.data_world
        self.model.backward(loss * means, scale_wrt_gas=False)
        if not self.last:
            self.model.step()  # which only counts

    def clip(self, norm: float) -> float:
        """With sharded gradients it takes the step too: DeepSpeed knows their norm only when it has used it."""
        if self.plain:
            self._clipping(0.0)
            return float(nn.utils.clip_grad_norm_(self.model.parameters(), norm))
        self._clipping(norm)
        self.model.step()
        return float(self.model.get_global_grad_norm())

    def step(self) -> None:
        if self.plain:
            self.model.step()

    @property
    def plain(self) -> bool:
        """Whether DeepSpeed left optimiser and gradients as they were."""
        return isinstance(self.model.optimizer, torch.optim.Optimizer)

    def _clipping(self, norm: float) -> None:
        self.model._config.gradient_clipping = norm
        if hasattr(self.model.optimizer, "clip_grad"):
            self.model.optimizer.clip_grad = norm

    def full_state_dict(self) -> dict[str, Tensor] | None:
        if not self.sharded:
            return None
        return self.model._zero3_consolidated_16bit_state_dict()  # of whatever dtype, whatever its name says

    def reduce(self, values: Tensor) -> Tensor:
        values = values.clone()
        torch.distributed.all_reduce(values)
        return values


def attention_of(model: nn.Module) -> Any:
    """The name of the attention function that Ulysses is to stand before: ours, which knows what it drops."""
    patch = find_patch(model)
    if patch is None:
        raise RecipeError(
            "Ulysses drops the masks that keep packed documents apart, and without a scheme nothing puts them back: "
            "give scheme: {name: rope}, which changes nothing else."
        )
    return patch.base.config._attn_implementation


def tell_rows(ulysses: Any, rows: int) -> None:
    """Ulysses was made for a fixed number of rows."""
    if ulysses.batch_size == rows:
        return
    ulysses.batch_size = rows
    for name in ("required_query_shape", "required_key_value_shape", "required_context_shape"):
        length, _, *rest = getattr(ulysses, name)
        setattr(ulysses, name, torch.Size([length, rows, *rest]))


def refuse_under_ulysses(recipe: Any, model: nn.Module, parts: int) -> None:
    """Raise `RecipeError` for what Ulysses would drop, or could not cut."""
    attention_of(model)
    patch: Any = find_patch(model)
    config = patch.base.config
    heads, key_heads = patch.shape.num_heads, patch.shape.num_key_value_heads
    if heads % parts:
        raise RecipeError(f"Ulysses shares {heads} heads among {parts} processes; take an sp_size that divides them.")
    if key_heads % parts and parts % key_heads:
        raise RecipeError(f"Ulysses cannot share {key_heads} key heads among {parts} processes.")
    if recipe.distill is not None:
        raise RecipeError("distill: under Ulysses a teacher would see a part of each sequence and not what is before.")
    if getattr(recipe.model, "shifted_groups", None):
        raise RecipeError("model.shifted_groups shifts tokens along a whole sequence, and under Ulysses none is whole.")
    if config._attn_implementation in ("pe_eager", "pe_flex_attention"):
        raise RecipeError("model.attention: Ulysses takes neither eager nor flex; use sdpa or flash, or leave it out.")
    if patch.base.pe_runtime.unsplittable is not None:
        raise RecipeError(
            f"scheme {patch.scheme.name}: Ulysses cannot cut sequences: {patch.base.pe_runtime.unsplittable}."
        )
    for number, phase in enumerate(recipe.phases):
        if phase.length % parts:
            raise RecipeError(f"phases[{number}].length={phase.length} cannot be cut into {parts} equal parts.")
