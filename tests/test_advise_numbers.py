"""Check the numbers of the advice (weights, memory, frequencies and tokens) against written-out arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pe_patch.advice import advise

from .advised import ASKED, CONFIGS, advise_on, advised

D = 4096  # all six are 4096 wide, with 32 heads of 128


KV = 8 * 128  # width of the keys of eight heads
GROUPED = 2 * D * D + 2 * D * KV  # queries and output, keys and values
SIZES = {
    # layers x (attention, MLP, norms) + embeddings + output + final norm
    "llama2": 32 * (4 * D * D + 3 * D * 11008 + 2 * D) + 2 * 32000 * D + D,
    "llama31": 32 * (GROUPED + 3 * D * 14336 + 2 * D) + 2 * 128256 * D + D,
    "mistral": 32 * (GROUPED + 3 * D * 14336 + 2 * D) + 2 * 32000 * D + D,
    "qwen3": 36 * (GROUPED + 2 * 128 + 3 * D * 12288 + 2 * D) + 2 * 151936 * D + D,  # and a norm of queries and keys
    "pythia": 32 * (4 * D * D + 4 * D + 2 * D * 16384 + 16384 + D + 4 * D) + 2 * 50432 * D + 2 * D,  # with biases
    "bloom": 30 * (4 * D * D + 4 * D + 8 * D * D + 5 * D + 4 * D) + 250880 * D + 4 * D,  # tied; two outer norms
}
PUBLISHED = {
    "llama2": 6_738_415_616,
    "llama31": 8_030_261_248,
    "mistral": 7_241_732_096,
    "qwen3": 8_190_735_360,
    "pythia": 6_857_302_016,
    "bloom": 7_069_016_064,
}
VOCABULARY = {"llama2": 32000, "llama31": 128256, "mistral": 32000, "qwen3": 151936, "pythia": 50432, "bloom": 250880}


@pytest.mark.parametrize("name", ASKED)
def test_weights_are_those_of_the_released_model(name):
    parameters = advised(name).case.facts.parameters
    assert parameters.total == SIZES[name] == PUBLISHED[name]
    assert parameters.active == parameters.total
    assert parameters.embedding == VOCABULARY[name] * D
    assert parameters.tied == (name == "bloom")


CACHED = {  # layers x keys and values x heads x 128 dimensions x 2 bytes
    "llama2": 32 * 2 * 32 * 128 * 2,
    "llama31": 32 * 2 * 8 * 128 * 2,
    "mistral": 32 * 2 * 8 * 128 * 2,
    "qwen3": 36 * 2 * 8 * 128 * 2,
    "pythia": 32 * 2 * 32 * 128 * 2,
    "bloom": 30 * 2 * 32 * 128 * 2,
}
INNER = {"llama2": 11008, "llama31": 14336, "mistral": 14336, "qwen3": 12288, "pythia": 16384, "bloom": 4 * D}


@pytest.mark.parametrize("name", ASKED)
def test_memory_to_read_is_what_the_sizes_give(name):
    advice = advised(name)
    length, memory = advice.case.target, advice.inference
    assert memory.weights == 2 * PUBLISHED[name]
    assert memory.cache_per_token == CACHED[name]
    assert memory.cache_full == length * CACHED[name]
    assert memory.cache == min(length, 4096 if name == "mistral" else length) * CACHED[name]
    assert memory.logits == length * VOCABULARY[name] * 4
    assert memory.activations == length * 2 * (8 * D + 3 * INNER[name])
    assert memory.scores == (2 * 4 * 32 * length**2 if name == "bloom" else 0)


def test_a_batch_and_a_dtype_multiply():
    one, four = advise_on("llama-3.1-8b", 131072), advise_on("llama-3.1-8b", 131072, batch_size=4, dtype="float32")
    assert four.inference.cache == 4 * 2 * one.inference.cache == 4 * 2 * 131072 * 131072
    assert four.inference.weights == 4 * 8_030_261_248
    assert four.inference.activations == 4 * 2 * one.inference.activations


@pytest.mark.parametrize("name", ASKED)
def test_memory_to_train_is_what_the_usual_accounts_give(name):
    advice = advised(name)
    memory, length = advice.training, advice.case.target
    layers = {"qwen3": 36, "bloom": 30}.get(name, 32)
    assert memory.states["mixed"] == 16 * PUBLISHED[name]  # weight, gradient and two moments in float32
    assert memory.states["bfloat16"] == 12 * PUBLISHED[name]
    assert memory.states["adapters"] == 2 * PUBLISHED[name] + 16 * memory.adapters
    assert memory.activations == 2 * layers * length * D + 34 * length * D
    assert memory.logits == 2 * 4 * length * VOCABULARY[name]
    assert memory.chunked_logits == 2 * 4 * 2048 * VOCABULARY[name]


def test_the_published_logits_of_64k_tokens():
    # 65,536 x 128,256 x 4 bytes: the 33.6 GB for which ProLong cuts its loss into blocks
    assert advise_on("llama-3.1-8b", 65536).training.logits / 2 == pytest.approx(33.6e9, rel=1e-3)


def test_devices_share_the_states_and_not_the_sequence():
    llama2, llama31 = advised("llama2"), advised("llama31")
    # 16 x 6.738e9 = 107.8 GB; a device keeps 80 - 13.15 (activations) - 0.52 (logits) = 66.3 GB for its share
    assert llama2.training.devices == {"mixed": 2, "bfloat16": 2, "adapters": 1}
    # (64 + 34) x 262,144 x 4096 = 105 GB of activations: more than a device has
    assert set(llama31.training.devices.values()) == {None}


@pytest.mark.parametrize("name", ["llama-2-7b", "pythia-6.9b"])
def test_adapters_are_those_that_peft_makes(name):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = AutoConfig.from_pretrained(CONFIGS / name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        adapted = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    expected, _ = adapted.get_nb_trainable_parameters()
    parameters = advise_on(name, 2048).case.facts.parameters
    assert 8 * parameters.linear == expected
    if name == "llama-2-7b":
        assert expected == 19_988_480  # as printed in many a training log
        norms = 65 * D
        assert advise_on(name, 2048).training.adapters == expected + 32000 * D + norms


@pytest.mark.parametrize(
    ("family", "settings", "total", "active"),
    [
        (
            "mixtral",
            {"vocab_size": 32000, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2},
            46_702_792_704,
            # 32 layers x (attention, 2 experts, router, norms) + embeddings + output + norm
            32 * (GROUPED + 2 * 3 * D * 14336 + 8 * D + 2 * D) + 2 * 32000 * D + D,
        ),
        ("deepseek_v3", {}, 671_026_404_352, None),
    ],
)
def test_experts_that_a_token_does_not_meet_are_not_active(family, settings, total, active):
    parameters = advise(CONFIG_MAPPING[family](dtype="bfloat16", **settings), 4096).case.facts.parameters
    assert parameters.total == total
    assert active is None or parameters.active == active
    if family == "deepseek_v3":
        assert parameters.active == pytest.approx(37e9, rel=0.02)  # what its authors state


def test_latents_are_what_deepseek_caches():
    advice = advise(CONFIG_MAPPING["deepseek_v3"](dtype="bfloat16"), 4096)
    assert advice.inference.cache_per_token == 61 * (512 + 64) * 2


ROTATIONS = {  # rotating dimensions, base, trained window
    "llama2": (128, 1e4, 4096),
    "mistral": (128, 1e4, 8192),
    "qwen3": (128, 1e6, 32768),
    "pythia": (32, 1e4, 2048),
}


@pytest.mark.parametrize("name", ROTATIONS)
def test_pairs_slower_than_the_window_meet_new_angles(name):
    advice = advised(name)
    width, theta, window = ROTATIONS[name]
    assert [pair.wavelength for pair in advice.pairs] == pytest.approx(
        [2 * math.pi * theta ** (2 * k / width) for k in range(width // 2)], rel=1e-6
    )
    # a pair has wavelength L where theta^(2 k / r) 2 pi = L
    critical = math.ceil(width / 2 * math.log(window / (2 * math.pi)) / math.log(theta))
    assert [pair.index for pair in advice.pairs if pair.leaves] == list(range(critical, width // 2))


def test_the_critical_dimension_is_the_one_that_longrope2_states():
    # Llama-3-8B, base 500,000 and window 8192: the 35th of 64 pairs is the first (Shang et al. 2025, arXiv 2502.20082)
    config = AutoConfig.from_pretrained(CONFIGS / "llama-3.1-8b")
    config.rope_parameters, config.max_position_embeddings = {"rope_type": "default", "rope_theta": 5e5}, 8192
    assert min(pair.index for pair in advise(config, 131072).pairs if pair.leaves) == 35


def test_what_is_unseen_is_what_lies_between_the_two_angles():
    llama2 = advised("llama2")
    pair = llama2.pairs[63]  # 54,410 tokens a turn: 27.1 degrees in 4096 tokens, 216.8 in 32,768
    wavelength = 2 * math.pi * 1e4 ** (126 / 128)
    assert pair.unseen_degrees == pytest.approx(360 * (32768 - 4096) / wavelength, rel=1e-6)
    assert llama2.pairs[46].unseen_degrees == pytest.approx(
        360 * (1 - 4096 / (2 * math.pi * 1e4 ** (92 / 128))), rel=1e-5
    )
    assert llama2.pairs[45].unseen_degrees == 0  # 4080 tokens a turn: all of the circle was seen


def test_a_scaling_that_a_model_carries_counts():
    llama31 = advised("llama31")
    config = AutoConfig.from_pretrained(CONFIGS / "llama-3.1-8b")
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    assert [pair.wavelength for pair in llama31.pairs] == pytest.approx((2 * math.pi / expected.double()).tolist())
    assert llama31.case.facts.window == 131072 and llama31.case.facts.original == 8192


def test_what_is_recommended_turns_as_transformers_turns():
    qwen3 = advised("qwen3")
    config = AutoConfig.from_pretrained(CONFIGS / "qwen3-8b")
    config.rope_parameters = {
        "rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768,
    }  # fmt: skip
    expected, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    numbers = qwen3.choice.untrained.effective
    assert numbers["wavelengths_in_tokens"] == pytest.approx((2 * math.pi / expected.double()).tolist(), abs=0.01)
    assert numbers["attention_factor"] == pytest.approx(attention_factor)
    assert numbers["effective_window"] == 131072


def test_tokens_and_operations_of_the_papers():
    llama2 = advised("llama2")
    yarn = llama2.plans[0]
    assert yarn.recipe.schemes == ("yarn",) and yarn.tokens == 64 * 400 * 32768  # the recipe's 839 million
    per_token = 6 * 6_738_415_616 + 6 * 32 * D * 32768
    assert yarn.flops == pytest.approx(per_token * 64 * 400 * 32768 * 4 / 3)
    [searched] = [plan for plan in llama2.plans if "longrope" in plan.recipe.schemes]
    assert searched.tokens == 10**10
    [skipping] = [plan for plan in llama2.plans if "PoSE" in plan.recipe.paper]
    assert skipping.tokens == 64 * 1000 * 4096  # its windows are the original ones


def test_operations_of_a_token_are_the_usual_ones_at_64k():
    # 4.0e10 for the weights and 5.2e10 for attention, without the third for recomputing
    yarn = advise_on("llama-2-7b", 65536).plans[0]
    assert yarn.flops / yarn.tokens * 3 / 4 == pytest.approx(9.2e10, rel=0.01)
