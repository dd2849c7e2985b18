"""A recipe says what it means, and its data is what it says: packed, isolated, reproducible."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import pe_patch
from pe_patch.errors import PePatchError
from recipes import trainer
from recipes.data import Corpus, PhaseData, micro_batches, pack
from recipes.finetune import load_recipe, main, train
from recipes.recipe import Phase, Recipe, RecipeError, Source

from .cases import phase

# What a recipe may say


def test_the_tree_is_filled_and_overridden(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["phases.0.steps=9", "--optimizer.betas=[0.8, 0.9]", "lora.rank=4", "seed=7"])
    assert isinstance(recipe, Recipe) and isinstance(recipe.phases[0], Phase)
    assert (recipe.phases[0].steps, recipe.phases[0].learning_rate, recipe.seed) == (9, 1e-3, 7)
    assert recipe.optimizer.betas == (0.8, 0.9)
    assert recipe.lora is not None and (recipe.lora.rank, recipe.lora.alpha) == (4, 16)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("progress:", "progres:", ["progres", "'progress'"]),
        ("    warmup:", "    warm_up:", ["warm_up", "'warmup'"]),
        ("    batch: 4", "    batch: four", ["batch", "four", "Integer"]),
        ("kind: needles", "kind: needle", ["kind", "needle", "text"]),
        ("    steps: 6", "    steps: 0", ["phases.0", "steps"]),
        ("output:", "# output:", ["output"]),
        ("phases:", "phases: []\nseed: [", ["line"]),
    ],
)
def test_what_is_wrong_in_a_file_is_named(recipe_file: Path, before: str, after: str, said: list[str]) -> None:
    content = recipe_file.read_text()
    assert before in content
    recipe_file.write_text(content.replace(before, after))
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe_file)
    assert all(part in str(caught.value) for part in [str(recipe_file), *said]), caught.value


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("phases.0.stepz=3", "'steps'"),
        ("seeds=3", "'seed'"),
        ("seed=x", "Integer"),
        ("phases.3.steps=3", "phases.3"),
        ("seed", "key=value"),
    ],
)
def test_what_is_wrong_in_an_override_is_named(recipe_file: Path, override: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe_file, [override])
    assert override in str(caught.value) and said in str(caught.value)


def test_contradictions_and_missing_files(recipe_file: Path) -> None:
    with pytest.raises(RecipeError, match=r"one of model.source and model.config"):
        load_recipe(recipe_file, ["model.config={model_type: llama}"])
    with pytest.raises(RecipeError, match=r"tiny_yarn.yaml"):
        load_recipe("recipes/configs/no_such.yaml")
    assert main([str(recipe_file), "seeds=1"]) == 2
    assert main([str(recipe_file), "data.source=/no/such/folder"]) == 1
    with pytest.raises(PePatchError, match="/no/such/model"):
        train(load_recipe(recipe_file, ["model.source=/no/such/model"]))


# What is trained on


@pytest.mark.parametrize("seed", range(5))
def test_packing_keeps_every_token_once_and_cuts_no_document_that_fits(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 200, 150).tolist()
    rows = pack(lengths, 64)
    seen = [(document, place) for row in rows for document, start, stop in row for place in range(start, stop)]
    assert sorted(seen) == [(document, place) for document, length in enumerate(lengths) for place in range(length)]
    assert all(sum(stop - start for _, start, stop in row) <= 64 for row in rows)
    pieces = [document for row in rows for document, _, _ in row]
    assert all(pieces.count(document) == math.ceil(length / 64) for document, length in enumerate(lengths))
    assert len(rows) <= 1.1 * math.ceil(sum(lengths) / 64)


def test_a_packed_row(corpus: tuple[Corpus, Any]) -> None:
    data = PhaseData(*corpus, phase(), seed=(0,), boundaries=True)
    several = [row for row in (data[number] for number in range(40)) if (row["position_ids"] == 0).sum() > 2]
    assert several
    for row in several:
        starts = row["position_ids"] == 0
        assert (row["labels"][starts] == -100).all()
        is_target = row["labels"] != -100
        assert (row["labels"][is_target] == row["input_ids"][is_target]).all()
        assert (np.diff(row["position_ids"])[~starts[1:]] == 1).all()
        assert not (is_target & (row["input_ids"] == 0)).any()  # 0 is the padding


@pytest.mark.parametrize("scheme", [None, "yarn", "alibi"])
def test_documents_in_a_row_do_not_see_each_other(corpus: tuple[Corpus, Any], model: Path, scheme: str | None) -> None:
    network = AutoModelForCausalLM.from_pretrained(model).eval()
    if scheme is not None:
        options: dict[str, Any] = {"factor": 4} if scheme == "yarn" else {}
        pe_patch.patch_model(network, scheme, **options)
    data = PhaseData(*corpus, phase(), seed=(0,), boundaries=True)
    row = next(
        row for row in (data[number] for number in range(40)) if 8 < (row["position_ids"][1:] == 0).argmax() < 50
    )
    second = int((row["position_ids"][1:] == 0).argmax()) + 1
    batch = {key: torch.from_numpy(value)[None] for key, value in row.items()}
    changed = batch["input_ids"].clone()
    changed[:, :second] = (changed[:, :second] + 1) % 280

    def logits(ids: torch.Tensor, boundaries: bool) -> torch.Tensor:
        inputs = trainer.model_inputs({**batch, "input_ids": ids}, boundaries=boundaries)
        with torch.no_grad():
            return network(**inputs).logits[:, second:]

    apart = logits(batch["input_ids"], True)
    assert torch.equal(apart, logits(changed, True))
    assert (logits(batch["input_ids"], False) - logits(changed, False)).abs().max() > 1e-3
    stop = second + int(np.append(row["position_ids"][second + 1 :] == 0, True).argmax()) + 1
    with torch.no_grad():
        alone = network(batch["input_ids"][:, second:stop]).logits
    torch.testing.assert_close(apart[:, : stop - second], alone, rtol=0, atol=1e-5)


def test_needles_are_asked_for_and_only_what_can_be_known_is_a_target(corpus: tuple[Corpus, Any]) -> None:
    vocabulary = corpus[1].get_vocab()
    keys = {vocabulary[f"<k{index}>"] for index in range(64)}
    mixture = {"needles": Source(share=1, kind="needles", needles=(3, 3))}
    data = PhaseData(*corpus, phase(mixture=mixture), seed=(0,), boundaries=True)
    orders = set()
    for number in range(30):
        row = data[number]
        ids, labels = row["input_ids"].tolist(), row["labels"].tolist()
        hidden = {ids[place]: ids[place + 1] for place in range(58) if ids[place] in keys}
        assert len(ids) == 64 and len(hidden) == 3
        assert [hidden[key] for key in ids[58::2]] == ids[59::2] == labels[59::2]
        assert not keys & set(labels)
        orders.add(tuple(list(hidden).index(key) for key in ids[58::2]))
    assert len(orders) > 3  # asked for in another order each time
    mixture["needles"].targets = "answers"
    assert sum(label != -100 for label in data[0]["labels"]) == 3


def test_order_is_a_function_of_seed_and_step_alone(corpus: tuple[Corpus, Any]) -> None:
    mixture = {"text": Source(share=0.5), "needles": Source(share=0.5, kind="needles", needles=(1, 3))}

    def batches(seed: int = 0, first_step: int = 0, rank: int = 0, world: int = 1, **more: Any) -> list[torch.Tensor]:
        data = PhaseData(*corpus, phase(mixture=mixture, **more), seed=(seed, 0), boundaries=True)
        steps = micro_batches(data, first_step=first_step, rank=rank, world=world)
        return [torch.cat([batch["input_ids"] for batch in step]) for step in steps]

    whole = batches()
    assert len(whole) == 6 and all(torch.equal(a, b) for a, b in zip(whole[4:], batches(first_step=4), strict=True))
    assert not torch.equal(whole[0], batches(seed=1)[0])
    for one, first, second in zip(whole, batches(rank=0, world=2), batches(rank=1, world=2), strict=True):
        assert sorted(one.tolist()) == sorted(first.tolist() + second.tolist())
    with pytest.raises(RecipeError, match="multiple of 3"):
        batches(world=3)


def test_an_epoch_has_every_row_once(corpus: tuple[Corpus, Any]) -> None:
    data = PhaseData(*corpus, phase(), seed=(0,), boundaries=False)
    epochs = [np.sort([data[e * len(data.rows) + n]["input_ids"] for n in range(len(data.rows))], 0) for e in (0, 1)]
    stream = corpus[0].stream
    rows = np.sort(stream[: len(stream) // 64 * 64].reshape(-1, 64), 0)
    assert np.array_equal(epochs[0], rows) and np.array_equal(epochs[1], rows)
    assert not np.array_equal(data[0]["input_ids"], data[len(data.rows)]["input_ids"])


# What is minimised
