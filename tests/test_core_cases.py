"""Test the attention engine under autocast, in float64, with position offsets and with unusual masks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pe_patch import SCHEMES, AttentionShape, UnsupportedError, patch_model
from pe_patch.attention.kernels.toeplitz import Toeplitz

from .families import build as build_family
from .models import build, error, logits, put, tokens, wearing

SCORES = (
    "alibi", "t5", "kerple", "sandwich", "fire", "shaw", "transformer_xl", "cope", "xpos", "rope_alibi", "rerope",
    "self_extend", "dca", "lm_infinite",
)  # fmt: skip
LENGTH = 300


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def model():
    return build("llama", num_hidden_layers=1)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", SCORES)
def test_autocast(model, name, padded):
    """Check that the error is that of plain RoPE under autocast, with and without a cache, and that training works."""
    ids = tokens(2, LENGTH)
    mask = torch.ones_like(ids)
    if padded:
        ids[0, :40], mask[0, :40] = 0, 0
    real = mask.bool()
    errors = {}
    for scheme in ("rope", name):
        with wearing(model, scheme), torch.no_grad():
            exact = model(ids, attention_mask=mask, use_cache=False).logits
            with torch.autocast("cpu", torch.bfloat16):
                for cached in (False, True):
                    found = model(ids, attention_mask=mask, use_cache=cached).logits
                    errors[scheme, cached] = relative(found[real], exact[real])
    for cached in (False, True):
        assert errors[name, cached] < 3 * errors["rope", cached]
    with wearing(model, name), torch.autocast("cpu", torch.bfloat16):
        model(ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(bool(gradient.isfinite().all()) for gradient in gradients)
    model.zero_grad()


@pytest.mark.parametrize("name", SCORES)
def test_float64(name):
    model, ids = build("llama", num_hidden_layers=1), tokens(2, LENGTH)
    found = {}
    for backend in ("eager", "sdpa"):
        with wearing(model, name, backend=backend):
            found[backend] = logits(model.double(), ids)
    assert error(found["sdpa"], found["eager"]) < (
        1e-4 if name in ("transformer_xl", "sandwich") else 1e-6
    )  # these two compute angles in float32


@pytest.mark.parametrize("name", SCORES)
def test_rows_with_position_offsets(model, name):
    """Check rows whose positions begin at different offsets, as in training with random offsets."""
    ids, at = tokens(2, 48), torch.arange(48) + torch.tensor([[0], [500]])
    mask, found = torch.ones_like(ids), {}
    for backend in ("eager", "sdpa"):
        with wearing(model, name, backend=backend):
            found[backend] = logits(model, ids, attention_mask=mask, position_ids=at)
    assert error(found["sdpa"], found["eager"]) < 1e-5


def masks() -> dict[str, Tensor]:
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()[None, None]
    least = torch.finfo(torch.float32).min
    soft = torch.where(torch.rand(LENGTH, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.3, -1.5, 0.0)
    return {
        "bool": causal,
        "lowest": torch.zeros(causal.shape).masked_fill(~causal, least),
        "ten thousand": torch.zeros(causal.shape).masked_fill(~causal, -1e4),
        "soft": soft.masked_fill(~causal, least),
    }


@pytest.mark.parametrize("kind", ["bool", "lowest", "ten thousand", "soft"])
@pytest.mark.parametrize("name", SCORES)
def test_masks_of_four_dimensions(model, name, kind):
    ids, found = tokens(1, LENGTH), {}
    for backend in ("eager", "sdpa"):
        with wearing(model, name, backend=backend):
            found[backend] = logits(model, ids, attention_mask=masks()[kind])
            if kind == "bool":
                assert error(found[backend], logits(model, ids)) < 1e-5
    assert error(found["sdpa"], found["eager"]) < 1e-5


@pytest.mark.parametrize("name", ["t5", "rerope", "cope"])
def test_one_row_of_a_mask_for_all_queries(model, name):
    """Check that a mask with one row applies to all queries."""
    ids = tokens(1, LENGTH)
    open_mask = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool)
    with wearing(model, name):
        assert (
            error(logits(model, ids, attention_mask=open_mask[:, :, :1]), logits(model, ids, attention_mask=open_mask))
            < 1e-5
        )


def test_bidirectional_attention(model):
    ids = tokens(1, 40)
    with wearing(model, "t5"):
        assert error(logits(model, ids, is_causal=False), logits(model, ids)) > 1e-3
    with wearing(model, "rerope"), pytest.raises(UnsupportedError, match="looks ahead"):
        logits(model, ids, is_causal=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shaw_in_half_precision_on_eager(dtype):
    model = put(build("llama", num_hidden_layers=1).to(dtype), "shaw", backend="eager")
    assert logits(model, tokens(1, 40)).dtype == dtype


def test_sinusoids_are_added_at_the_scale_of_the_multiplied_embeddings():
    """Check that the layers see the paper's sinusoids, of norm sqrt(D / 2), for any embedding multiplier."""
    model = build_family("granite")
    model.model.embedding_multiplier = 12.0
    seen = []
    model.model.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    ids = tokens(1, 10)
    with torch.no_grad():
        patch_model(model, "nope")
        model(ids)
        patch_model(model, "sinusoidal", on_existing="replace")
        model(ids)
    added = (seen[1] - seen[0]).norm(dim=-1)
    torch.testing.assert_close(added, torch.full_like(added, (64 / 2) ** 0.5), rtol=1e-4, atol=0)


def test_there_is_no_second_derivative():
    query, key, value = (torch.randn(1, 2, 8, 16, requires_grad=True) for _ in range(3))
    output = Toeplitz.apply(query, key, value, torch.zeros(2, 8), 0.3, 8)
    (gradient,) = torch.autograd.grad(output.sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        torch.autograd.grad(gradient.sum(), query)


@pytest.mark.parametrize(("name", "options"), [
    ("learned", {"max_positions": 0}), ("learned", {"max_positions": 10.7}), ("one_hot", {"max_positions": True}),
    ("sinusoidal", {"theta": -5.0}), ("integer", {"original_max_position_embeddings": 0.5}),
    ("rope", {"original_max_position_embeddings": 100.9}),
])  # fmt: skip
def test_options_of_the_wrong_type_are_refused(name, options):
    shape = AttentionShape(64, 4, 2, 16, 16, 0, 10000.0, 64, 1)
    with pytest.raises(TypeError, match=next(iter(options))):
        SCHEMES[name](shape, **options)
