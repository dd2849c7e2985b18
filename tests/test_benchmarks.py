"""What the benchmarks that compare schemes compute by themselves: which schemes, which means, which errors."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from pe_patch import SCHEMES


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import training
    import zero_shot

    return SimpleNamespace(training=training, zero_shot=zero_shot)


def test_every_scheme_is_measured_in_one_of_the_two(scripts):
    zero_shot = {scheme for scheme, _ in scripts.zero_shot.CASES.values()} | set(scripts.zero_shot.LEFT_OUT)
    assert {name for name, scheme in SCHEMES.items() if scheme.training_free} <= zero_shot
    trained = {options["scheme"] for options in scripts.training.SCHEMES.values()}
    # nope itself, rope rescaled, images, and conversions of a trained model (mla_sweep.py)
    elsewhere = {"drope", "llama3", "proportional", "rope_2d", "alibi_2d", "mla"}
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
    assert uneven["8"]["verdict"] == "not told apart" and uneven["16"]["verdict"] == "worse"


def test_runs_of_another_setting_are_not_kept(scripts, tmp_path):
    setting, file = scripts.training.Setting(), tmp_path / "training.json"
    assert scripts.training.load(file, setting) == []
    file.write_text(json.dumps({"setting": asdict(setting), "runs": [1]}))
    assert scripts.training.load(file, setting) == [1]
    assert scripts.training.load(file, replace(setting, steps=1)) == []
