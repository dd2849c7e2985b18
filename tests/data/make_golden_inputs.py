"""Make the inputs for which the authors' code gave the numbers in `goldens.json`, from seeds and shapes.

The results belong to the authors' code and are not made here; `README.md` says which code gave them.

    python tests/data/make_golden_inputs.py        # prints JSON: {key of the entry: {field: numbers}}
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Normal:
    """Draw `mean + scale * randn(shape)` in float64 from a generator with this seed, rounded to `decimals`."""

    seed: int
    shape: tuple[int, ...]
    scale: float = 1.0
    mean: float = 0.0
    decimals: int = 3
    dtype: torch.dtype = torch.float64
    """The precision in which the authors' code took the rounded numbers."""

    def make(self) -> Any:
        generator = torch.Generator().manual_seed(self.seed)
        drawn = self.mean + self.scale * torch.randn(self.shape, generator=generator, dtype=torch.float64)
        rounded = [round(number, self.decimals) for number in drawn.flatten().tolist()]
        return torch.tensor(rounded, dtype=self.dtype).view(self.shape).tolist()


@dataclass(frozen=True)
class Counted:
    """Number a matrix so that every entry names its place: `10 * (row + 1) + column`."""

    rows: int
    columns: int

    def make(self) -> Any:
        return [[10.0 * (row + 1) + column for column in range(self.columns)] for row in range(self.rows)]


COPE = {name: Normal(20 + place, (1, 6, 4)) for place, name in enumerate("qkv")} | {"pos_emb": Normal(23, (1, 4, 7))}

INPUTS: dict[str, dict[str, Normal | Counted]] = {
    "rope/apply_interleaved_meta": {"q": Normal(1, (1, 5, 2, 8)), "k": Normal(2, (1, 5, 2, 8))},
    "rope/gptj_interleaved": {"x": Normal(1, (5, 2, 8))},
    "learned_abs/hierarchical_alpha0.4": {"embeddings": Normal(7, (4, 3))},
    "xpos/dim8_scale_base512": {
        "q": Normal(8, (1, 7, 8), dtype=torch.float32),
        "k": Normal(9, (1, 7, 8), dtype=torch.float32),
    },
    "fire/short_L8_n6": {
        "mlp0_weight": Normal(10, (4, 1), decimals=2),
        "mlp0_bias": Normal(11, (4,), decimals=2),
        "mlp2_weight": Normal(12, (3, 4), decimals=2),
        "mlp2_bias": Normal(13, (3,), decimals=2),
    },
    "cope_contextual/default": COPE,
    "cope_contextual/nodiv": COPE,
    "shaw/clip2_n5": {
        "q": Normal(30, (1, 2, 5, 4)),
        "k": Normal(31, (1, 2, 5, 4)),
        "v": Normal(32, (1, 2, 5, 4)),
        "table_k": Normal(33, (5, 4)),
        "table_v": Normal(34, (5, 4)),
    },
    "txl/rel_shift_3x5": {"input": Counted(3, 5)},
    "txl/mem2": {
        "qkv_weight": Normal(40, (18, 6), scale=0.5),
        "r_weight": Normal(41, (6, 6), scale=0.5),
        "o_weight": Normal(42, (6, 6), scale=0.5),
        "u": Normal(43, (2, 3)),
        "v": Normal(44, (2, 3)),
        "w": Normal(45, (4, 6)),
        "mems": Normal(46, (2, 6)),
    },
    "rope2d/axial_dim16_3x2": {
        "q": Normal(50, (1, 1, 6, 16), dtype=torch.float32),
        "k": Normal(51, (1, 1, 6, 16), dtype=torch.float32),
    },
    "mla/plain": {
        "weights.kv_norm.weight": Normal(70, (8,), scale=0.05, mean=1.0),
        "weights.wkv_a.weight": Normal(71, (12, 12), scale=0.5),
        "weights.wkv_b.weight": Normal(72, (22, 8), scale=0.5),
        "weights.wo.weight": Normal(73, (12, 10), scale=0.5),
        "weights.wq.weight": Normal(74, (20, 12), scale=0.5),
        "x": Normal(90, (1, 7, 12)),
    },
    "mla_convert/inputs": {
        "q_proj": Normal(100, (32, 32), scale=0.3),
        "k_proj": Normal(101, (16, 32), scale=0.3),
        "v_proj": Normal(102, (16, 32), scale=0.3),
        "o_proj": Normal(103, (32, 32), scale=0.3),
        "x": Normal(110, (1, 6, 32)),
    },
    "transmla/calibration": {"x_calib": Normal(111, (4, 16, 32))},
}
"""The inputs of each entry by field. A field `weights.NAME` is the entry NAME of the field `weights`."""


def make_inputs() -> dict[str, dict[str, Any]]:
    """Return the numbers of all inputs."""
    return {key: {field: rule.make() for field, rule in fields.items()} for key, fields in INPUTS.items()}


if __name__ == "__main__":
    print(json.dumps(make_inputs()))
