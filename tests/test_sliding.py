"""Test layers with a sliding window, which keep only the newest keys, with a dynamic and with a static cache."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM, StaticCache

from pe_patch import patch_model

WINDOW, LENGTH, PREFIX, SLIDING = 32, 40, 20, 12
SIZES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": WINDOW, "initializer_range": 0.2,
}  # fmt: skip

MODELS = {
    "every layer slides": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=SLIDING)),
    "one layer slides": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=SLIDING, max_window_layers=1)
    ),
}
SCHEMES = {
    "yarn": {"factor": 4}, "alibi": {}, "dynamic_ntk": {"expected_length": 2 * WINDOW}, "sinusoidal": {},
    "self_extend": {"group": 2, "window": 4}, "dca": {"chunk_size": 8, "local_window": 2}, "xpos": {},
}  # fmt: skip
CACHES = {
    "grows": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=LENGTH + 4),
}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_decoding_with_a_sliding_cache_equals_the_full_pass(kind, scheme, cache):
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    patch_model(model, scheme, **SCHEMES[scheme])
    ids = torch.randint(3, 97, (2, LENGTH))
    full = model(ids, use_cache=False).logits
    output = model(ids[:, :PREFIX], past_key_values=CACHES[cache](model.config), use_cache=True)
    steps = [output.logits]
    for index in range(PREFIX, LENGTH):
        output = model(ids[:, index : index + 1], past_key_values=output.past_key_values, use_cache=True)
        steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, 1), full, rtol=0, atol=1e-5 * float(full.abs().max()))
