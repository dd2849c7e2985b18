"""What the benchmarks that compare schemes compute by themselves: which schemes, which means, which errors."""

import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from pe_patch import SCHEMES


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import mla_sweep
    import mla_sweep_page
    import training
    import zero_shot

    return SimpleNamespace(training=training, zero_shot=zero_shot, sweep=mla_sweep, page=mla_sweep_page)


def test_every_scheme_is_measured_in_one_of_the_two(scripts):
    zero_shot = {scheme for scheme, _ in scripts.zero_shot.CASES.values()} | set(scripts.zero_shot.LEFT_OUT)
    assert {name for name, scheme in SCHEMES.items() if scheme.training_free} <= zero_shot
    trained = {options["scheme"] for options in scripts.training.SCHEMES.values()}
    # nope itself, rope rescaled, images, and conversions of a trained model (mla_sweep.py)
    elsewhere = {"drope", "llama3", "proportional", "rope_2d", "alibi_2d", "mla"}
    elsewhere |= {"softmax_scaling", "fope"}  # not measured yet
    assert set(SCHEMES) - zero_shot - elsewhere <= trained


def run(scheme, seed, within, beyond):
    losses = {"8": within} if beyond is None else {"8": within, "16": beyond}
    return {"scheme": scheme, "seed": seed, "parameters": 3, "seconds": 1.0, "loss": losses}


def test_differences_are_taken_seed_by_seed(scripts):
    runs = [run("nope", seed, loss, loss) for seed, loss in enumerate((4.0, 4.4, 4.8))]
    runs += [run("even", seed, loss, None) for seed, loss in enumerate((3.9, 4.29, 4.71))]
    runs += [run("uneven", seed, loss, 9.0) for seed, loss in enumerate((3.9, 4.2, 4.5))]
    nope, even, uneven = scripts.training.summary(runs, 8)
    assert nope["8"]["loss"] == pytest.approx(4.4) and nope["8"]["error"] == pytest.approx(0.4 / math.sqrt(3))
    assert even["8"]["to_nope"] == pytest.approx(-0.1) and even["8"]["to_nope_error"] == pytest.approx(0.01 / 3**0.5)
    assert even["8"]["verdict"] == "better" and "16" not in even
    # gaps -0.1, -0.2, -0.3: 4.303 standard errors of 0.0577 are more than their mean
    assert uneven["8"]["verdict"] == "not significant" and uneven["16"]["verdict"] == "worse"


def test_runs_of_another_setting_are_not_kept(scripts, tmp_path):
    setting, file = scripts.training.Setting(), tmp_path / "training.json"
    assert scripts.training.load(file, setting) == []
    file.write_text(json.dumps({"setting": asdict(setting), "runs": [1]}))
    assert scripts.training.load(file, setting) == [1]
    assert scripts.training.load(file, replace(setting, steps=1)) == []


def tried(*losses):
    return [{"rope_dim": 2**power, "loss": loss, "retrieval": 0.5} for power, loss in enumerate(losses, 2)]


def test_every_method_is_healed_at_every_size_for_as_long(scripts):
    sizes = {size: tried(4.0, 3.0, 3.5) for size in ("1/2", "1/4", "1/8", "1/16")}
    planned = list(scripts.sweep.plan(dict.fromkeys(scripts.sweep.KINDS, sizes)))
    assert planned[0][0] == "original"
    healed = {(kind, options["cache_ratio"]) for kind, options, _ in planned[1:]}
    assert healed >= {
        (kind, ratio) for kind in ("transmla", "mha2mla", "svd") for ratio in (1 / 2, 1 / 4, 1 / 8, 1 / 16)
    }
    # the width of the least loss, and at 1/4 half of it
    of_transmla = [options for kind, options, _ in planned if kind == "transmla"]
    assert [one["rope_dim"] for one in of_transmla if one["cache_ratio"] == 1 / 2] == [8]
    assert [one["rope_dim"] for one in of_transmla if one["cache_ratio"] == 1 / 4] == [8, 4]


def healed(kind, rope_dim, spots, retrieval):
    row = {
        "loss": sum(spots) / len(spots), "loss_change": sum(spots) / len(spots) / 3 - 1, "spots": spots,
        "retrieval": retrieval, "retrieval_interval": [retrieval - 0.01, retrieval + 0.01],
        "kv_rank": 4, "rope_dim": rope_dim,
    }  # fmt: skip
    return {"kind": kind, "options": {"cache_ratio": 0.25, "rope_dim": rope_dim}, "untuned": row, "healed": row}


def test_a_healed_loss_is_compared_place_by_place(scripts):
    best = healed("transmla", 8, [3.0, 3.2, 2.9, 3.0], 0.97)
    above = healed("svd", 8, [3.1, 3.31, 3.01, 3.1], 0.95)  # always about as much, far less than places differ
    noisy = healed("mha2mla", 2, [2.6, 3.6, 3.3, 2.7], 0.80)
    runs = [best, above, noisy]
    verdicts = [scripts.page._against_best(run, runs) for run in runs]
    assert verdicts[0] == "least" and verdicts[1].startswith("+0.105 +- 0.00") and "not significant" in verdicts[2]
    assert "not significant" not in verdicts[1]
    said = " ".join(scripts.page._findings({}, runs, best))
    assert "share answered): `transmla` (rope_dim 8)" in said and "not significantly different from `mha2mla`" in said
    assert "and `mha2mla` (rope_dim 2) fewest (80.0%)" in said


def test_the_legend_of_a_picture_names_what_is_drawn(scripts, monkeypatch, tmp_path):
    import swap_results

    from pe_patch.evaluation.charts.chart import Chart

    drawn = []
    monkeypatch.setattr(Chart, "png", lambda self: drawn.extend(self.panels) or b"")
    runs = [
        json.loads(file.read_text())
        for file in sorted((Path(__file__).parent.parent / "benchmarks/results/swap").glob("*.json"))
    ]
    swap_results.draw({"runs": runs}, tmp_path / "swap.png")
    specifications = [json.dumps(panel.to_dict()) for panel in drawn]
    every = set()
    for specification in specifications:
        lines = set(re.findall(r'"scheme": "([^"]+)"', specification))
        domains = re.findall(r'"color": .*?"domain": (\[.*?\])', specification)
        assert domains and all(set(json.loads(domain)) == lines for domain in domains)
        every |= lines
    assert "rope (original)" not in every and "kerple" in every
