"""Run one optimiser step over all processes, as accelerate does."""

from __future__ import annotations

import os
import platform
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..data import IGNORED


class Engine:
    """One process, or several with a whole model each (DDP) or a shard of it (accelerate's FSDP2)."""

    name = "accelerate"
    sharded = False
    """True if each process holds only a part of the weights, so that all must run every forward together."""
    parts = 1
    """Number of parts, each on one process, that a sequence is cut into."""

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self.sharded = self.sharded or accelerator.distributed_type == DistributedType.FSDP
        self.model: Any = None
        self.optimizer: Any = None

    @property
    def data_rank(self) -> int:
        """Index of this process's group among the groups that see different sequences."""
        return self.accelerator.process_index // self.parts

    @property
    def data_world(self) -> int:
        """Number of groups that see different sequences."""
        return self.accelerator.num_processes // self.parts

    @property
    def shards(self) -> int:
        """Number of processes that share weights, gradients and optimiser state."""
        return self.accelerator.num_processes if self.sharded else 1

    @property
    def local_world(self) -> int:
        """Number of processes on this machine."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", 1))

    def describe(self) -> str:
        """Return the devices and the kind of parallelism in words."""
        device, count = self.accelerator.device, self.accelerator.num_processes
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device} ({platform.machine()})"
        return f"{count} x {name}, {self.name}" if count > 1 else name

    @property
    def memory_of(self) -> str:
        """A description of what `memory` measures."""
        return "this process, including all that it loaded," if self.accelerator.device.type != "cuda" else "a device"

    def refuse(self, recipe: Any, model: nn.Module) -> None:
        """Raise `RecipeError` for what this engine would ignore."""

    def prepare(self, model: nn.Module, optimizer: Any) -> tuple[Any, Any]:
        """Prepare model and optimiser for training; `optimizer` is None if nothing trains."""
        if optimizer is None:
            self.model = self.accelerator.prepare(model)
        else:
            self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        return self.model, self.optimizer

    def inputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Move a batch to this process's device, and shift its labels before any cut.

        Returns:
            `input_ids` and `position_ids`, `[rows, part]`, and `shift_labels`, the label of each token's successor.
        """
        batch = {key: value.to(self.accelerator.device) for key, value in batch.items()}
        labels = batch.pop("labels")
        return {**batch, "shift_labels": F.pad(labels[:, 1:], (0, 1), value=IGNORED)}

    def micro_step(self, last: bool) -> AbstractContextManager[Any]:
        """Return a context for the passes of a micro-batch; gradients synchronise on the last one of a step."""
        return nullcontext() if last else self.accelerator.no_sync(self.model)

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass. Gradients are summed over processes: the factor undoes accelerate's mean."""
        self.accelerator.backward(loss * self.accelerator.num_processes)

    def clip(self, norm: float) -> float:
        """Clip the gradient to a norm, and return its norm before."""
        before = self.accelerator.clip_grad_norm_(self.model.parameters(), norm)
        return float(before.full_tensor() if isinstance(before, DTensor) else before)

    def step(self) -> None:
        """Take an optimiser step and reset the gradients."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def reduce(self, values: Tensor) -> Tensor:
        """Return the sum over all processes."""
        return self.accelerator.reduce(values)

    def failed_anywhere(self, failed: bool) -> bool:
        """Return whether any process failed. All processes wait here for each other."""
        return bool(self.reduce(torch.tensor(float(failed), device=self.accelerator.device)) > 0)

    def unwrapped(self) -> Any:
        """Return the model as it was before `prepare`."""
        return self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)

    def full_state_dict(self) -> dict[str, Tensor] | None:
        """Return all weights on the main process if the weights are sharded, and None otherwise."""
        return self.accelerator.get_state_dict(self.model) if self.sharded else None

    def save(self, folder: Path) -> None:
        """Save everything that `load` needs to continue exactly from here; all processes call this."""
        self.accelerator.save_state(str(folder))

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote; all processes call this."""
        self.accelerator.load_state(str(folder))

    def memory(self) -> int:
        """Return the peak memory in bytes of this process's device, or of the whole process on a CPU."""
        device = self.accelerator.device
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated(device)
        import resource  # not available on Windows

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
