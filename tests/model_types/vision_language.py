"""Build tiny vision-language models, and inputs with an image or a video for each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel

from .tiny import tiny_config, with_random_weights

IMAGE, VIDEO, START, END = 90, 91, 92, 93
"""Token ids of an image, a video, and what stands around them."""
IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
QWEN_VISION = {
    "depth": 2, "hidden_size": 32, "embed_dim": 32, "num_heads": 2, "intermediate_size": 48, "patch_size": 4,
    "out_hidden_size": 64, "fullatt_block_indexes": [1], "deepstack_visual_indexes": [0], "num_position_embeddings": 64,
    "window_size": 16,
}  # fmt: skip
PLAIN_VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}}

SETTINGS: dict[str, dict[str, Any]] = {
    "qwen2_vl": IDS | {"vision_config": QWEN_VISION | {"hidden_size": 64}, "text_config": MROPE},
    "qwen2_5_vl": IDS | {"vision_config": QWEN_VISION, "text_config": MROPE},
    "qwen3_vl": IDS | {"vision_config": QWEN_VISION, "text_config": MROPE},
    "llava": {
        "image_token_index": IMAGE, "vision_config": PLAIN_VISION, "text_config": {"num_key_value_heads": 2},
        "image_seq_length": 16,
    },
    "gemma3": {
        "image_token_index": IMAGE, "vision_config": PLAIN_VISION, "mm_tokens_per_image": 4, "boi_token_index": START,
        "eoi_token_index": END,
    },
    "idefics3": {"image_token_id": IMAGE, "vision_config": PLAIN_VISION, "scale_factor": 2},
    "smolvlm": {"image_token_id": IMAGE, "vision_config": PLAIN_VISION, "scale_factor": 2},
    "internvl": {
        "image_token_id": IMAGE, "vision_config": PLAIN_VISION | {"image_size": [16, 16], "patch_size": [4, 4]},
        "image_seq_length": 4,
    },
}  # fmt: skip
ROWS_OF_POSITIONS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""Models with M-RoPE."""
IMAGE_TOKENS = {"llava": 16}
"""Tokens of an image of 16 x 16 pixels; 4 for the others."""


def build(family: str) -> PreTrainedModel:
    """Return a seeded tiny model."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(tiny_config(family, **SETTINGS[family])).eval()
    return with_random_weights(model, std=0.1)


def inputs(family: str, video: bool = False) -> dict[str, Tensor]:
    """Return a text with an image, or with a video for a model with M-RoPE, as the keywords of a model."""
    generator = torch.Generator().manual_seed(7)
    frames = 2 if video else 1
    count = IMAGE_TOKENS.get(family, 4) * frames
    before, after = (torch.randint(4, 80, (6,), generator=generator) for _ in range(2))
    token = VIDEO if video else IMAGE
    shown = torch.tensor([START, *[token] * count, END])
    if family == "qwen3_vl":  # each frame stands alone, behind its time
        shown = torch.tensor([START, *[token] * (count // frames), END] * frames)
    given = {"input_ids": torch.cat((before, shown, after))[None]}
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    kind = "video" if video else "image"
    if family in ROWS_OF_POSITIONS:
        pixels = torch.randn(16 * frames, 3 * 2 * 4 * 4, generator=generator)
        name = "pixel_values_videos" if video else "pixel_values"
        types = (given["input_ids"] == token).long() * (2 if video else 1)
        return given | {name: pixels, f"{kind}_grid_thw": torch.tensor([[frames, 4, 4]]), "mm_token_type_ids": types}
    pixels = torch.randn(1, 3, 16, 16, generator=generator)
    if family in ("idefics3", "smolvlm"):
        return given | {"pixel_values": pixels[None]}
    if family == "gemma3":
        return given | {"pixel_values": pixels, "token_type_ids": (given["input_ids"] == IMAGE).long()}
    return given | {"pixel_values": pixels}
