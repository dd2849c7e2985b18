"""Measure what an encoder loses without positions, on a task where words suffice and on one where their order decides.

    python benchmarks/questions/order.py                       # about 20 minutes on two cores
    python benchmarks/questions/order.py --steps 20 --seeds 0  # to see that it runs

`topic`: from which package of Python's standard library 48 tokens of source are; the words nearly tell. `order`: which
animal chases the other, in sentences such as "near the old barn the quick fox chases the cat"; both animals are in the
sentence, so that words alone leave two answers. Each model is a bidirectional Gemma 3 of two layers, trained from
scratch with one scheme of pe_patch; mean of the hidden states, then a linear layer.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, SEEDS, interval, machine, read, shown, write
from torch import Tensor, nn
from transformers import AutoTokenizer, Gemma3TextConfig, Gemma3TextModel

from pe_patch import patch_model
from pe_patch.data.packaged import DEMO_MODEL
from pe_patch.data.text import stdlib_files

SCHEMES = ("nope", "integer", "sinusoidal", "learned", "rope", "alibi")
LABELS = {"nope": "none"}
LENGTH, BATCH, EVERY, TESTS = 48, 64, 25, 2_000
GOAL = {"topic": 0.6, "order": 0.95}
"""Accuracy whose number of steps is reported."""
PACKAGES = ("asyncio", "multiprocessing", "email", "xml", "importlib", "unittest", "tkinter", "http")
ANIMALS = ("fox", "cat", "dog", "hen", "cow", "rat", "owl", "pig")
LOOKS = ("old", "quick", "small", "red", "loud", "tame")
PLACES = ("barn", "river", "road", "hill", "wood", "wall")


@dataclass(frozen=True)
class Data:
    """Rows of token ids [n, length], 0 is padding, and the class of each row [n]."""

    ids: Tensor
    classes: Tensor


def order_data(count: int, rng: np.random.Generator) -> Data:
    """Return sentences in which one animal chases another; the class is the one that chases."""
    words = ["", "the", "near", "chases", "sees", "and", *ANIMALS, *LOOKS, *PLACES]
    ids, classes = np.zeros((count, LENGTH), dtype=np.int64), np.zeros(count, dtype=np.int64)
    for row in range(count):
        first, second = rng.choice(len(ANIMALS), 2, replace=False)

        def noun(animal: str) -> list[str]:
            return ["the", *rng.choice(LOOKS, rng.integers(0, 3), replace=False), animal]

        place = ["near", *noun(rng.choice(PLACES))]
        core = [*noun(ANIMALS[first]), "chases", *noun(ANIMALS[second])]
        sentence = [*place, *core] if rng.random() < 0.5 else [*core, *place]
        ids[row, : len(sentence)] = [words.index(word) for word in sentence]
        classes[row] = first
    return Data(torch.from_numpy(ids), torch.from_numpy(classes))


def topic_data(count: int, rng: np.random.Generator, held_out: bool) -> Data:
    """Return pieces of source files and the package of each; test pieces are from other files."""
    tokenizer: Any = AutoTokenizer.from_pretrained(DEMO_MODEL)
    files: list[list[Tensor]] = [[] for _ in PACKAGES]
    seen = dict.fromkeys(PACKAGES, 0)
    for name, text in stdlib_files():
        package = name.split("/")[0]
        if package not in seen:
            continue
        seen[package] += 1
        if (seen[package] % 4 == 0) == held_out:
            ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
            if len(ids) > LENGTH:
                files[PACKAGES.index(package)].append(ids)
    rows, classes = [], torch.from_numpy(rng.integers(0, len(PACKAGES), count))
    for package in classes.tolist():
        ids = files[package][rng.integers(len(files[package]))]
        start = rng.integers(len(ids) - LENGTH)
        rows.append(ids[start : start + LENGTH] + 1)  # 0 is padding
    return Data(torch.stack(rows), classes)


class Classifier(nn.Module):
    """An encoder, the mean of its hidden states, and a linear layer."""

    def __init__(self, vocabulary: int, classes: int, scheme: str) -> None:
        super().__init__()
        config = Gemma3TextConfig(
            vocab_size=vocabulary, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, head_dim=16, query_pre_attn_scalar=16, max_position_embeddings=LENGTH,
            layer_types=["full_attention"] * 2, use_bidirectional_attention=True, pad_token_id=0,
        )  # fmt: skip
        self.encoder = Gemma3TextModel(config)
        if scheme != "rope":
            patch_model(self.encoder, scheme)
        self.output = nn.Linear(64, classes)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits [rows, classes]."""
        mask = (ids != 0).long()
        hidden = self.encoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return self.output(mean)


def run(task: str, scheme: str, seed: int, steps: int) -> dict[str, Any]:
    """Train one model; return its accuracy on the test rows after every few steps."""
    rng = np.random.default_rng([seed, 0])
    if task == "order":
        train, test = order_data(steps * BATCH, rng), order_data(TESTS, np.random.default_rng([seed, 1]))
    else:
        train = topic_data(steps * BATCH, rng, held_out=False)
        test = topic_data(TESTS, np.random.default_rng([seed, 1]), held_out=True)
    torch.manual_seed(seed)
    model = Classifier(int(max(train.ids.max(), test.ids.max())) + 1, 8, scheme)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 50) * (1 - step / steps))
    started, curve = time.perf_counter(), []
    for step in range(steps):
        rows = slice(step * BATCH, (step + 1) * BATCH)
        loss = nn.functional.cross_entropy(model(train.ids[rows]), train.classes[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % EVERY == 0 or step + 1 == steps:
            with torch.no_grad():
                right = (model(test.ids).argmax(-1) == test.classes).double().mean()
            curve.append([step + 1, float(right)])
    reached = next((step for step, accuracy in curve if accuracy >= GOAL[task]), None)
    return {
        "task": task, "scheme": scheme, "seed": seed, "accuracy": curve[-1][1], "steps_to_goal": reached,
        "curve": curve, "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip


def markdown(content: dict[str, Any]) -> str:
    """Return a table with one line for each scheme."""
    lines = [
        f"Accuracy on {TESTS:,} held-out rows after {content['steps']:,} steps of {BATCH}, mean of "
        f"{len(content['seeds'])} seeds with its 95 % interval, and the steps to {GOAL['topic']:.0%} and "
        f"{GOAL['order']:.0%}. Chance is 12 %; who knows the two animals, and not their order, has 50 %.",
        "",
        "| positions | topic | steps | order | steps |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for scheme in SCHEMES:
        cells = []
        for task in GOAL:
            runs = [each for each in content["runs"] if each["task"] == task and each["scheme"] == scheme]
            steps = [each["steps_to_goal"] for each in runs]
            cells += [shown([each["accuracy"] for each in runs])]
            cells += ["not reached" if None in steps or not steps else f"{interval(steps)[0]:.0f}"]
        lines.append(f"| {LABELS.get(scheme, scheme)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(content: dict[str, Any], file: Path) -> None:
    """Draw accuracy against steps, one panel for each task."""
    import altair as alt

    from pe_patch.evaluation.charts.chart import Chart, data
    from pe_patch.evaluation.charts.components import scheme_encoding

    names, panels = [LABELS.get(scheme, scheme) for scheme in SCHEMES], []
    look = scheme_encoding(names, names)
    for task, title in (("topic", "topic: words nearly tell"), ("order", "order: who chases whom")):
        points = []
        for scheme, name in zip(SCHEMES, names, strict=True):
            runs = [each for each in content["runs"] if each["task"] == task and each["scheme"] == scheme]
            for at in zip(*(each["curve"] for each in runs), strict=True):
                points.append({"scheme": name, "step": at[0][0], "accuracy": float(np.mean([y for _, y in at]))})
        guesses = [{"accuracy": 1 / 8, "note": "chance"}]
        if task == "order":
            guesses.append({"accuracy": 1 / 2, "note": "the animals without their order"})
        y = alt.Y("accuracy:Q", title="accuracy", scale=alt.Scale(domain=[0, 1]))
        base = alt.Chart(data(points)).encode(x=alt.X("step:Q", title="step"), y=y, color=look["color"])
        guess = alt.Chart(data(guesses)).encode(y=y)
        panels.append(
            alt.layer(
                guess.mark_rule(strokeDash=[2, 3]),
                guess.mark_text(style="note", align="right", x="width", dx=-4, dy=10).encode(text="note:N"),
                base.mark_line(strokeWidth=2),
                base.mark_point(filled=True, size=30, opacity=1).encode(shape=look["shape"]),
            ).properties(width=400, height=260, title=title)
        )
    subtitle = f"Accuracy on {TESTS:,} held-out rows, mean of {len(content['seeds'])} seeds."
    file.write_bytes(Chart("order", "An encoder without positions", tuple(panels), subtitle, columns=2).png())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    content = read("order", arguments.output)
    if content.get("steps") != arguments.steps:
        content = {"steps": arguments.steps, "runs": []}
    content |= {"machine": machine(), "seeds": arguments.seeds}
    done = {(each["task"], each["scheme"], each["seed"]) for each in content["runs"]}
    for seed in arguments.seeds:
        for task in GOAL:
            for scheme in arguments.schemes:
                if (task, scheme, seed) in done:
                    continue
                found = run(task, scheme, seed, arguments.steps)
                content["runs"].append(found)
                write("order", content, arguments.output)
                print(f"{task}, {scheme}, seed {seed}: {found['accuracy']:.3f} in {found['seconds']} s", flush=True)
    (arguments.output / "order.md").write_text(markdown(content), encoding="utf-8")
    draw(content, arguments.output / "order.png")


if __name__ == "__main__":
    main()
