"""How one optimiser step is spread over processes; as written here, as accelerate does it."""

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
    """One process, or several with a whole model each (DDP), or with a part of it (accelerate's FSDP2)."""

    name = "accelerate"
    sharded = False
    """Whether a process holds only a part of the weights, so that all must run every forward together."""
    parts = 1
    """Into how many processes' parts a sequence is cut."""

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self.sharded = self.sharded or accelerator.distributed_type == DistributedType.FSDP
        self.model: Any = None
        self.optimizer: Any = None

    @property
    def data_rank(self) -> int:
        """Which of the groups of processes that see different sequences this one belongs to."""
        return self.accelerator.process_index // self.parts

    @property
    def data_world(self) -> int:
        """How many such groups there are."""
        return self.accelerator.num_processes // self.parts

    @property
    def shards(self) -> int:
        """How many processes share weights, gradients and optimiser."""
        return self.accelerator.num_processes if self.sharded else 1

    @property
    def local_world(self) -> int:
        """Processes on this machine."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", 1))

    def describe(self) -> str:
        """Where this runs, in words."""
        device, count = self.accelerator.device, self.accelerator.num_processes
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device} ({platform.machine()})"
        return f"{count} x {name}, {self.name}" if count > 1 else name

    @property
    def memory_of(self) -> str:
        """Whose memory `memory` tells."""
        return "this process, everything loaded included," if self.accelerator.device.type != "cuda" else "a device"

    def refuse(self, recipe: Any, model: nn.Module) -> None:
        """Raise `RecipeError` for what this engine would drop without a word."""

    def prepare(self, model: nn.Module, optimizer: Any) -> tuple[Any, Any]:
        """Make of both what a step works on; `optimizer` is None where nothing is trained."""
        if optimizer is None:
            self.model = self.accelerator.prepare(model)
        else:
            self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        return self.model, self.optimizer

    def inputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """What this process works on, on its device: `input_ids` and `position_ids` [rows, part] of the sequences, and
        `shift_labels`, the label of each token's successor, made before any cut."""
        batch = {key: value.to(self.accelerator.device) for key, value in batch.items()}
        labels = batch.pop("labels")
        return {**batch, "shift_labels": F.pad(labels[:, 1:], (0, 1), value=IGNORED)}

    def micro_step(self, last: bool) -> AbstractContextManager[Any]:
        """Round the forward and backward pass of a micro-batch; gradients meet on the last of a step."""
        return nullcontext() if last else self.accelerator.no_sync(self.model)

    def backward(self, loss: Tensor) -> None:
        """`loss` is this process's share of a sum, and so is the gradient: accelerate's mean is undone."""
        self.accelerator.backward(loss * self.accelerator.num_processes)

    def clip(self, norm: float) -> float:
        """Cut the gradient to a norm; returns what the norm was before."""
        found = self.accelerator.clip_grad_norm_(self.model.parameters(), norm)
        return float(found.full_tensor() if isinstance(found, DTensor) else found)

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def reduce(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        return self.accelerator.reduce(values)

    def failed_anywhere(self, failed: bool) -> bool:
        """Return whether any process failed; all processes wait here for each other."""
        return bool(self.reduce(torch.tensor(float(failed), device=self.accelerator.device)) > 0)

    def unwrapped(self) -> Any:
        """The model as it was before `prepare`."""
        return self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)

    def full_state_dict(self) -> dict[str, Tensor] | None:
        """All weights on the main process, where processes hold parts; None where each has the whole."""
        return self.accelerator.get_state_dict(self.model) if self.sharded else None

    def save(self, folder: Path) -> None:
        """Everything that `load` needs to go on exactly from here; called on all processes."""
        self.accelerator.save_state(str(folder))

    def load(self, folder: Path) -> None:
        self.accelerator.load_state(str(folder))

    def memory(self) -> int:
        """Bytes in use on this process's device at their peak so far; of the whole process where that is a CPU."""
        device = self.accelerator.device
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated(device)
        import resource  # which Windows does not have

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
