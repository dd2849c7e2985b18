"""Test that every expected value names the code it comes from, and that the inputs can be made again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

DATA = Path(__file__).parent / "data"
OURS = "pe_patch"


def read(name: str) -> Any:
    return json.loads((DATA / name).read_text(encoding="utf-8"))


def provenances() -> dict[str, list[dict[str, str]]]:
    """Return the provenance of every entry of `goldens.json`, every metric of the benchmarks, and every other file."""
    scores = read("benchmark_scores.json")
    metrics = {
        "class_right": scores["provenance"]["class_right"],
        "prompts": scores["provenance"]["prompts"],
        **{f"longbench {name}": scores["provenance"]["first"][name] for name, *_ in scores["first"]},
        **{f"infinitebench {name}": scores["provenance"]["infinite"][name] for name, *_ in scores["infinite"]},
    }
    files = ["ruler_goldens.json", "ruler_scores.json", *(f"export/{path.name}" for path in DATA.glob("export/*.json"))]
    return {
        **{key: entry["provenance"] for key, entry in read("goldens.json")["goldens"].items()},
        **metrics,
        **{name: read(name)["provenance"] for name in files},
    }


PROVENANCES = provenances()


@pytest.mark.parametrize("name", PROVENANCES)
def test_every_expected_value_names_its_code(name):
    assert PROVENANCES[name]
    for code in PROVENANCES[name]:
        assert {"repository", "commit", "function"} <= set(code) <= {
            "repository", "commit", "function", "release", "command",
        }  # fmt: skip
        assert all(isinstance(value, str) and value.strip() for value in code.values())
        known = len(code["commit"]) == 40 and set(code["commit"]) <= set("0123456789abcdef")
        assert known or code["commit"].startswith("not recorded") or code["repository"] == OURS


def test_commits_of_the_goldens_are_those_of_their_repositories():
    goldens = read("goldens.json")
    commits = goldens["_meta"]["commits"]
    used = set()
    for entry in goldens["goldens"].values():
        for code in entry["provenance"]:
            used.add(code["repository"])
            if code["repository"] in commits:
                assert code["commit"] == commits[code["repository"]]
                assert code["repository"] in entry["source"]
            else:
                assert code["repository"] == OURS or code["release"] == goldens["_meta"]["transformers"]
    assert used == {*commits, "huggingface/transformers", OURS}


def test_every_data_file_is_in_the_readme():
    table = (DATA / "README.md").read_text(encoding="utf-8")
    for path in DATA.glob("*.json"):
        assert f"`{path.name}`" in table


def test_the_script_makes_the_inputs_of_the_goldens():
    script = DATA / "make_golden_inputs.py"
    printed = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True).stdout
    goldens = read("goldens.json")["goldens"]
    for key, fields in json.loads(printed).items():
        for field, numbers in fields.items():
            outer, _, inner = field.partition(".")
            assert numbers == (goldens[key][outer][inner] if inner else goldens[key][outer]), (key, field)
