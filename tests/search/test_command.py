"""Test `pe-patch search`."""

from __future__ import annotations

import json

import pytest

from pe_patch.cli import main as cli
from pe_patch.compare.demo import BASE

from .cases import LENGTH, TEXT, run

NUMBERS = "--samples 2 --needles 4 --population 8 --parents 4 --iterations 2 --mutations 2 --crossovers 2".split()


@pytest.fixture
def command(capsys, tmp_path):
    source = tmp_path / "text.py"
    source.write_text(TEXT[0])

    def call(*words, length=LENGTH):
        given = ["search", BASE, "--length", length, "--text", source, "--output", tmp_path / "found", *NUMBERS, *words]
        code = cli.main([str(word) for word in given])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return call


def test_it_gives_the_result_of_the_function(command, tmp_path):
    code, out, err = command("--method", "longrope", "--json")
    found, expected = json.loads(out), run("longrope")
    assert code == 0 and found["score"] == expected.best.score and found["options"] == expected.options
    assert json.loads((tmp_path / "found" / "best.json").read_text()) == expected.options
    assert "A candidate takes" in err and "19 candidates take about" in err

    code, out, err = command("--method", "longrope")  # everything is there already
    assert code == 0 and "A candidate takes" not in err
    assert f"{expected.best.score:.4f}" in out and f"{expected.baselines['YaRN']:.4f}" in out and "best.json" in out

    start = tmp_path / "found" / "best.json"
    code, out, _ = command("--method", "longrope", "--json", "--start", start, "--output", tmp_path / "again")
    assert code == 0 and json.loads(out)["score"] <= expected.best.score


def test_a_baseline_that_is_better_is_named(command):
    code, out, _ = command("--attention-factor", "0.2")
    assert code == 0 and "scores lower than the best candidate" in out


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--method", "longrop"], 2, "Did you mean 'longrope'"),
        (["--population", "7", "--parents", "8"], 2, "--population 7 is below --parents 8"),
        (["--length", "200"], 2, "lies within the trained window of 256"),
        (["--text", "no/such.txt"], 1, "There is no file or folder"),
        (["--start", "no.json"], 2, "cannot be read as JSON"),
    ],
)
def test_wrong_usage_is_an_error(command, tmp_path, words, code, message):
    exit_code, out, err = command(*words)
    assert exit_code == code and message in err and not out
    assert not (tmp_path / "found").exists()


@pytest.mark.parametrize("content", ['{"factor": 2}', '["a"]', "3"])
def test_a_start_without_factors_is_an_error(command, tmp_path, content):
    (tmp_path / "start.json").write_text(content)
    code, _, err = command("--start", tmp_path / "start.json")
    assert code == 2 and "must hold a list of numbers" in err
