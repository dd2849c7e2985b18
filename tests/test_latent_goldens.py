"""Conversions to latent attention: against the numbers of their authors' code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pe_patch.core.projections import Projections
from pe_patch.mla.convert import convert_layer, full_rank
from pe_patch.mla.statistics import gather

from .goldens import load
from .latent_oracle import over_latents, trained

INPUTS = load("mla_convert/inputs")["mla_convert/inputs"]


def double(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(found: Tensor, expected: Any, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(found, double(expected).reshape(found.shape), rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def attention() -> Projections:
    query, key, value = (double(INPUTS[f"{name}_proj"]) for name in "qkv")
    sizes = {"heads": 4, "kv_heads": 2, "head_dim": 8, "rotary_dim": 8}
    return Projections(query, key, value, None, None, None, **sizes)


HIDDEN, OUTPUT = double(INPUTS["x"])[0], double(INPUTS["o_proj"])


def test_the_attention_that_is_converted_is_transformers(attention):
    close(trained(attention, HIDDEN, OUTPUT), INPUTS["out_original"])


@pytest.mark.parametrize("select", ["high", "low", "uniform"])
def test_mha2mla_keeps_the_authors_dims(attention, select):
    dims = load("mha2mla/rope_dims")["mha2mla/rope_dims_head8_r4"][select]
    found = convert_layer(attention, None, method="mha2mla", kv_rank=8, rope_dim=4, select=select)
    assert found.rope_key.argmax(1).tolist() == [*dims, *(8 + dim for dim in dims)]


def test_mha2mla_scores_pairs_as_the_authors(attention):
    case = load("mha2mla/two_norm_rank")["mha2mla/two_norm_rank"]
    statistics = gather(attention, HIDDEN)
    assert statistics.tokens == 6
    query, key = statistics.pair_norms / statistics.tokens
    close((query * key).view(2, 2, 4).sum(1), case["qk_contribution"])
    for kept in (1, 2, 3):
        found = convert_layer(attention, statistics, method="mha2mla", kv_rank=8, rope_dim=2 * kept)
        expected = double(case["rank"])[0, :, :4] < kept
        assert torch.zeros(2, 4, dtype=torch.bool).scatter(1, found.frequency, True).equal(expected)


@pytest.mark.parametrize("key", sorted(key for key, case in load("mha2mla/").items() if "out" in case))
def test_mha2mla_is_the_authors(attention, key):
    case = load(key)[key]
    select, rope_dim = case["params"]["partial_rope"], case["params"]["rope_dim_for_mla"]
    whole = case["params"]["svd"] == "none"
    rank = full_rank(attention, "mha2mla", rope_dim) if whole else case["params"]["latent_rank"]
    found = convert_layer(
        attention, gather(attention, HIDDEN), method="mha2mla", kv_rank=rank, rope_dim=rope_dim, select=select
    )
    close(over_latents(attention, found, HIDDEN, OUTPUT), case["out"])
    assert found.rope_key.argmax(1).tolist() == case["k_rope_rows"]
    rows = [8 * head + dim for head in range(4) for dim in found.query[head, 4:].argmax(1).tolist()]
    assert rows == case["q_row_order"]


@pytest.mark.parametrize("key", sorted(load("transmla/freqfold")))
def test_transmla_is_the_authors(attention, key):
    case = load(key)[key]
    calibration = double(load("transmla/calibration")["transmla/calibration"]["x_calib"]).flatten(0, 1)
    options: dict[str, Any] = {"rope_dim": case["params"]["qk_mqa_dim"], "freqfold": case["params"]["freqfold"]}
    statistics = gather(attention, calibration)
    for rank in (28, 16, 8):
        found = convert_layer(attention, statistics, method="transmla", kv_rank=rank, **options)
        close(over_latents(attention, found, HIDDEN, OUTPUT), case[f"out_mla_kv_lora_rank{rank}"])
        if rank == full_rank(attention, "transmla", options["rope_dim"]):
            close(over_latents(attention, found, HIDDEN, OUTPUT), case["out_partial_rope"])
