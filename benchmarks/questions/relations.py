"""Do rotation and distance biases help image-text models? A small CLIP on pictures whose captions name relations.

    python benchmarks/questions/relations.py                       # about 45 minutes on one core
    python benchmarks/questions/relations.py --steps 5 --seeds 0   # to see that it runs

A picture shows two coloured shapes, one left of, right of, above or below the other. Its caption says so: "a red
square left of a blue circle". A CLIP vision encoder and a bidirectional Gemma 3 text encoder of two layers each learn
to match them from scratch (Radford et al. 2021, arXiv 2103.00020, figure 3), on pictures of 32 x 32 pixels. Larger
pictures show the same scene with more pixels, so that there are more patches than in training.
"""

from __future__ import annotations

import argparse
import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from common import RESULTS, SEEDS, interval, machine, read, shown, write
from PIL import Image, ImageDraw
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, Gemma3TextConfig, Gemma3TextModel

from pe_patch import patch_model

SIZE, PATCH, BATCH = 32, 4, 64
SCALES = (1.0, 1.5, 2.0)
VISION, TEXT = ("learned", "rope_2d", "alibi_2d", "none"), ("learned", "rope", "alibi")
CASES = [(vision, "rope") for vision in VISION] + [("learned", text) for text in TEXT if text != "rope"]
"""Positions of the vision and of the text encoder: each of one beside the same of the other."""
TABLE_STD = 0.02
"""Standard deviation of a learned table before training, as in CLIP."""
COLOURS = {"red": (1, 0, 0), "green": (0, 0.8, 0), "blue": (0, 0.2, 1), "yellow": (1, 1, 0)}
SHAPES = ("square", "circle", "triangle")
OBJECTS = list(itertools.product(COLOURS, SHAPES))
RELATIONS = {"left of": (1, 0), "right of": (-1, 0), "above": (0, 1), "below": (0, -1)}
"""Direction from the first object to the second, in (x, y) with y downwards."""
WORDS = ["", "a", *COLOURS, *SHAPES, "left", "right", "of", "above", "below"]
MEASURES = {
    "relation": "Right relation of four",
    "image_to_text": "Right caption of 528 for a picture",
    "text_to_image": "Right picture of 528 for a caption",
}
TESTS = 528
"""Test pictures: each ordered pair of different objects four times, with another relation each time."""


@dataclass(frozen=True)
class Scene:
    """Two objects, by number, their relation and their places in a unit square, [2, 2] as (x, y)."""

    objects: tuple[int, int]
    relation: str
    places: np.ndarray

    @property
    def caption(self) -> str:
        """The caption."""
        return caption(self.objects, self.relation)

    @property
    def meaning(self) -> int:
        """A number that the two captions of the scene share, "a left of b" and "b right of a"."""
        (first, second), (x, y) = self.objects, RELATIONS[self.relation]
        if first > second:
            first, second, x, y = second, first, -x, -y
        return ((first * len(OBJECTS) + second) * 3 + x + 1) * 3 + y + 1


def caption(objects: tuple[int, int], relation: str) -> str:
    """Return a caption that names two objects and their relation."""
    first, second = (" ".join(OBJECTS[number]) for number in objects)
    return f"a {first} {relation} a {second}"


def draw_scene(objects: tuple[int, int], relation: str, rng: np.random.Generator) -> Scene:
    """Return a scene with two objects: apart on the axis of the relation, nearly aligned on the other axis."""
    along = np.array(RELATIONS[relation])
    centre, gap = rng.uniform(0.4, 0.6, 2), rng.uniform(0.18, 0.24)
    across = rng.uniform(-0.06, 0.06, 2) * (along == 0)
    return Scene(objects, relation, np.stack([centre - along * gap - across, centre + along * gap + across]))


def render(scene: Scene, size: int, rng: np.random.Generator) -> np.ndarray:
    """Return a picture [3, size, size] from 0 to 1, on a noisy grey ground."""
    grid = (np.arange(size) + 0.5) / size
    x, y = grid[None, :], grid[:, None]
    picture = np.repeat(0.5 + 0.08 * rng.standard_normal((1, size, size)), 3, 0)
    radius = 0.13
    for number, (cx, cy) in zip(scene.objects, scene.places, strict=True):
        colour, shape = OBJECTS[number]
        dx, dy = x - cx, y - cy
        inside = {
            "square": np.maximum(abs(dx), abs(dy)) < 0.85 * radius,
            "circle": dx**2 + dy**2 < radius**2,
            "triangle": (abs(dx) < (dy + radius) / 2) & (dy < 0.9 * radius),
        }[shape]
        picture = np.where(inside, np.array(COLOURS[colour])[:, None, None], picture)
    return picture.astype(np.float32)


def scenes(count: int, rng: np.random.Generator) -> list[Scene]:
    """Return random scenes."""
    found = []
    for _ in range(count):
        first, second = rng.choice(len(OBJECTS), 2, replace=False)
        found.append(draw_scene((int(first), int(second)), str(rng.choice(list(RELATIONS))), rng))
    return found


def test_scenes(rng: np.random.Generator) -> list[Scene]:
    """Return one scene for each ordered pair of objects and each relation."""
    pairs = itertools.permutations(range(len(OBJECTS)), 2)
    return [draw_scene(pair, relation, rng) for pair in pairs for relation in RELATIONS]


def pictures(chosen: list[Scene], size: int, rng: np.random.Generator) -> Tensor:
    """Return the pictures of scenes, [scenes, 3, size, size], centred on zero."""
    return torch.from_numpy(np.stack([render(scene, size, rng) for scene in chosen])) * 2 - 1


def text_ids(captions: list[str]) -> Tensor:
    """Return the word ids of captions [captions, words]; 0 is padding."""
    rows = [[WORDS.index(word) for word in caption.split()] for caption in captions]
    width = max(map(len, rows))
    return torch.tensor([row + [0] * (width - len(row)) for row in rows])


class Clip(nn.Module):
    """A vision and a text encoder, and projections into one space."""

    def __init__(self, vision: str, text: str) -> None:
        super().__init__()
        sizes: dict[str, Any] = {
            "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
        }  # fmt: skip
        self.vision = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=SIZE, patch_size=PATCH))
        self.text = Gemma3TextModel(
            Gemma3TextConfig(
                **sizes, vocab_size=len(WORDS), num_key_value_heads=4, head_dim=16, query_pre_attn_scalar=16,
                max_position_embeddings=16, layer_types=["full_attention"] * 2, use_bidirectional_attention=True,
                pad_token_id=0,
            )
        )  # fmt: skip
        if vision == "none":
            self.vision.get_parameter("embeddings.position_embedding.weight").requires_grad_(False).zero_()
        elif vision != "learned":
            patch_model(self.vision, vision)
        if text != "rope":
            patch_model(self.text, text)
        if text == "learned":
            nn.init.normal_(cast(Any, self.text).position_schemes.scheme[0].table, std=TABLE_STD)
        self.from_image, self.from_text = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(float(np.log(1 / 0.07))))

    def images(self, pixels: Tensor) -> Tensor:
        """Return unit vectors [images, 64]."""
        larger = pixels.shape[-1] != SIZE
        vision: Any = self.vision
        pooled = vision(pixel_values=pixels, interpolate_pos_encoding=larger).pooler_output
        return nn.functional.normalize(self.from_image(pooled), dim=-1)

    def captions(self, ids: Tensor) -> Tensor:
        """Return unit vectors [captions, 64]."""
        mask = (ids != 0).long()
        hidden = self.text(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        return nn.functional.normalize(self.from_text((hidden * mask[..., None]).sum(1) / mask.sum(1, True)), dim=-1)


@torch.no_grad()
def measure(images: Tensor, captions: Tensor, relations: Tensor, meanings: Tensor) -> dict[str, float]:
    """Score vectors of test pictures and their captions.

    Args:
        images: [scenes, width].
        captions: [scenes, width].
        meanings: [scenes]; a caption is right for a picture if their meanings are equal, which two captions are.
        relations: [scenes, 4, width], the captions with the same objects and each relation; the first is right.

    Returns:
        The shares of pictures whose best caption is right, of captions whose best picture is, and of pictures for which
        the right relation is the best of four.
    """
    scores = images @ captions.T
    among = torch.einsum("nw,nrw->nr", images, relations)
    best = (among[:, :1] > among[:, 1:]).all(1)
    return {
        "image_to_text": float((meanings[scores.argmax(1)] == meanings).double().mean()),
        "text_to_image": float((meanings[scores.argmax(0)] == meanings).double().mean()),
        "relation": float(best.double().mean()),
    }


def brackets() -> dict[str, dict[str, float]]:
    """Return what random vectors score, and an oracle that knows objects and relation."""
    rng = np.random.default_rng(0)
    chosen, generator = test_scenes(rng), torch.Generator().manual_seed(0)
    count = len(chosen)
    noise = torch.randn(count * 6, 64, generator=generator)
    meanings = torch.tensor([scene.meaning for scene in chosen])
    exact = nn.functional.one_hot(meanings).float()
    only_right = torch.cat([exact[:, None], torch.zeros(count, 3, exact.shape[1])], 1)
    others = noise[2 * count :].view(count, 4, 64)
    return {
        "random vectors": measure(noise[:count], noise[count : 2 * count], others, meanings),
        "oracle": measure(exact, exact, only_right, meanings),
    }


def run(vision: str, text: str, seed: int, steps: int) -> dict[str, Any]:
    """Train one model and measure it at each resolution."""
    torch.manual_seed(seed)
    model, rng = Clip(vision, text), np.random.default_rng([seed, 0])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 100) * (1 - step / steps))
    started, losses = time.perf_counter(), []
    for _ in range(steps):
        batch = scenes(BATCH, rng)
        ids = text_ids([scene.caption for scene in batch])
        scores = model.log_scale.exp() * model.images(pictures(batch, SIZE, rng)) @ model.captions(ids).T
        # Scenes of one meaning are no negatives of each other.
        meanings = torch.tensor([scene.meaning for scene in batch])
        same = (meanings[:, None] == meanings) & ~torch.eye(BATCH, dtype=torch.bool)
        scores, right = scores.masked_fill(same, -torch.inf), torch.arange(BATCH)
        loss = (nn.functional.cross_entropy(scores, right) + nn.functional.cross_entropy(scores.T, right)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    found, chosen = {}, test_scenes(np.random.default_rng([seed, 1]))
    with torch.no_grad():
        captions = model.captions(text_ids([scene.caption for scene in chosen]))
        others = [
            caption(scene.objects, relation)
            for scene in chosen
            for relation in (scene.relation, *(each for each in RELATIONS if each != scene.relation))
        ]
        relations = model.captions(text_ids(others)).view(len(chosen), 4, -1)
        for scale in SCALES:
            pixels = pictures(chosen, int(SIZE * scale), np.random.default_rng([seed, 2]))
            meanings = torch.tensor([scene.meaning for scene in chosen])
            found[f"{scale:g}"] = measure(model.images(pixels), captions, relations, meanings)
    return {
        "vision": vision, "text": text, "seed": seed, "scores": found, "loss": float(np.mean(losses[-50:])),
        "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip


def markdown(content: dict[str, Any]) -> str:
    """Return one table for relations and one for retrieval."""
    lines = [
        f"{TESTS} test pictures and captions, two of each meaning; {content['steps']:,} steps of {BATCH}; mean of "
        f"{len(content['seeds'])} seeds with its 95 % interval. Random vectors choose the right one of four relations "
        f"in {content['brackets']['random vectors']['relation']:.2f} of cases, an oracle in "
        f"{content['brackets']['oracle']['relation']:.2f}.",
    ]
    for name, title in MEASURES.items():
        lines += ["", f"### {title}", "", "| vision | text |" + "".join(f" x{scale:g} |" for scale in SCALES)]
        lines.append("| --- | --- |" + " ---: |" * len(SCALES))
        for vision, text in CASES:
            runs = [each for each in content["runs"] if (each["vision"], each["text"]) == (vision, text)]
            cells = [shown([each["scores"][f"{scale:g}"][name] for each in runs]) for scale in SCALES]
            lines.append(f"| {vision} | {text} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(content: dict[str, Any], file: Path) -> None:
    """Draw the relation accuracy of each case at each resolution."""
    from pe_patch.evaluation.charts import dots

    rows = []
    for scale in SCALES:
        for vision, text in CASES:
            runs = [each for each in content["runs"] if (each["vision"], each["text"]) == (vision, text)]
            values = [each["scores"][f"{scale:g}"]["relation"] for each in runs]
            if values:
                mean, half = interval(values)
                bounds = {} if np.isnan(half) else {"low": max(0, mean - half), "high": min(1, mean + half)}
                label = f"vision {vision}, text {text}"
                column = f"resolution x{scale:g}"
                rows.append({"label": label, "column": column, "value": mean, "number": f"{mean:.2f}", **bounds})
    subtitle = (
        f"Share of pictures whose relation, one of four, the caption that fits best names; mean of "
        f"{len(content['seeds'])} seeds with 95 % intervals. Trained at x1. Dotted: chance."
    )
    chart = dots(
        rows, name="relations", title="Left of or above? A small CLIP", subtitle=subtitle, domain=(0, 1), reference=0.25
    )
    file.write_bytes(chart.png())


def draw_examples(file: Path) -> None:
    """Draw one picture for each relation, with its caption, at the resolution of the training."""
    rng = np.random.default_rng(7)
    size, gap = 4 * SIZE, 8
    sheet = Image.new("RGB", (len(RELATIONS) * (size + gap) + gap, size + 2 * gap + 34), "white")
    pen = ImageDraw.Draw(sheet)
    for column, relation in enumerate(RELATIONS):
        scene = draw_scene(tuple(rng.choice(len(OBJECTS), 2, replace=False).tolist()), relation, rng)
        pixels = np.clip(render(scene, SIZE, rng).transpose(1, 2, 0), 0, 1)
        picture = Image.fromarray((255 * pixels).astype(np.uint8)).resize((size, size), Image.Resampling.NEAREST)
        left = gap + column * (size + gap)
        sheet.paste(picture, (left, gap))
        caption = scene.caption.replace(f" {relation} ", f"\n{relation} ")
        pen.multiline_text((left, size + gap + 4), caption, fill="black")
    sheet.save(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1_500)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    content = read("relations", arguments.output)
    if content.get("steps") != arguments.steps:
        content = {"steps": arguments.steps, "runs": []}
    content |= {"machine": machine(), "seeds": arguments.seeds, "brackets": brackets()}
    done = {(each["vision"], each["text"], each["seed"]) for each in content["runs"]}
    for seed, (vision, text) in itertools.product(arguments.seeds, CASES):
        if (vision, text, seed) in done:
            continue
        found = run(vision, text, seed, arguments.steps)
        content["runs"].append(found)
        write("relations", content, arguments.output)
        shares = ", ".join(f"x{scale} {each['relation']:.3f}" for scale, each in found["scores"].items())
        print(f"{vision}, {text}, seed {seed}: relation {shares} in {found['seconds']} s", flush=True)
    (arguments.output / "relations.md").write_text(markdown(content), encoding="utf-8")
    draw(content, arguments.output / "relations.png")
    draw_examples(arguments.output / "relations_examples.png")


if __name__ == "__main__":
    main()
