"""Test that `pe-patch selftest` passes on a working installation and names the first failure otherwise."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers.models.llama.modeling_llama import LlamaModel

from pe_patch.cli import main as cli
from pe_patch.doctor import selftest
from pe_patch.doctor.self_test import checks, models, result
from pe_patch.patching import plan
from pe_patch.schemes.scalings import RoPE

from . import families
from .test_structure import ROOT, run

MECHANISMS = {
    "native", "identity", "absolute", "none", "static rotary", "length-dependent rotary", "bias", "content-relative",
    "two-range", "latent attention",
}  # fmt: skip


@pytest.fixture
def demo_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run only the demo model, which builds quickly."""
    build = models.built_in_cases()["demo"]
    monkeypatch.setattr("pe_patch.doctor.self_test.run.built_in_cases", lambda: {"demo": build})


def only(monkeypatch: pytest.MonkeyPatch, *schemes: str) -> None:
    chosen = tuple(mechanism for mechanism in checks.MECHANISMS if mechanism.scheme in schemes)
    assert len(chosen) >= len(schemes)
    monkeypatch.setattr(checks, "MECHANISMS", chosen)


def test_it_passes_with_every_mechanism(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["selftest", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] and found["summary"].startswith("All ") and found["seconds"] < 60
    assert {check["model"] for check in found["checks"]} == {"demo", "random bloom", "random gpt_neox"}
    demo = [check for check in found["checks"] if check["model"] == "demo"]
    assert {check["mechanism"] for check in demo} == MECHANISMS and all(check["status"] == "ok" for check in demo)
    assert [check["scheme"] for check in found["checks"] if check["status"] == "skipped"] == ["mla"]  # on BLOOM
    assert all(check["difference"] <= check["tolerance"] for check in found["checks"] if check["status"] == "ok")
    bitwise = [check for check in demo if check["tolerance"] == 0]
    assert {check["check"].split(" ")[0] for check in bitwise} == {"native", "saved", "undone"}
    assert found["versions"]["transformers"] and found["versions"].keys() >= result.TESTED.keys()


# Broken models and libraries are found


def ignores_the_cache(inner: Any) -> Any:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        for name in ("past_key_values", "cache"):
            if kwargs.get(name) is not None and kwargs[name].get_seq_length():
                kwargs[name] = None
                kwargs["attention_mask"] = None
        return inner(self, *args, **kwargs)

    return forward


def counts_from_zero(base: Any, inner: Any, *args: Any, **kwargs: Any) -> Any:
    """Restart the positions at 0 in each pass over a cache."""
    ids = kwargs["input_ids"]
    kwargs["position_ids"] = torch.arange(ids.shape[1])[None].expand(ids.shape[0], -1)
    return inner(*args, **kwargs)


def is_off_by_one(base: Any, inner: Any, *args: Any, **kwargs: Any) -> Any:
    """Start each pass over a cache one position too late."""
    ids = kwargs["input_ids"]
    past = kwargs.get("past_key_values") or kwargs.get("cache")
    start = past.get_seq_length() if past is not None else 0
    kwargs["position_ids"] = torch.arange(ids.shape[1])[None].expand(ids.shape[0], -1) + start + (start > 0)
    return inner(*args, **kwargs)


def failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *schemes: str) -> dict[str, Any]:
    only(monkeypatch, *schemes)
    assert cli.main(["selftest", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["passed"]
    return next(check for check in found["checks"] if check["status"] == "failed") | {"summary": found["summary"]}


@pytest.mark.usefixtures("demo_alone")
def test_a_model_that_ignores_its_cache_fails_without_a_patch(monkeypatch, capsys) -> None:
    monkeypatch.setattr(LlamaModel, "forward", ignores_the_cache(LlamaModel.forward))
    found = failure(monkeypatch, capsys, "nope")
    assert (found["mechanism"], found["check"]) == ("native", "cache, token by token = no cache")
    assert found["difference"] > 100 * found["tolerance"]


@pytest.mark.usefixtures("demo_alone")
@pytest.mark.parametrize("broken", [counts_from_zero, is_off_by_one])
def test_wrong_positions_in_the_patched_forward_are_found(monkeypatch, capsys, broken) -> None:
    monkeypatch.setattr(plan, "base_forward", broken)
    found = failure(monkeypatch, capsys, "yarn")
    assert found["model"] == "demo" and "cache" in found["check"] + found["message"]
    assert found["difference"] > 100 * found["tolerance"]
    assert "demo under" in found["summary"] and "is allowed" in found["summary"]


@pytest.mark.usefixtures("demo_alone")
def test_a_slightly_wrong_rotation_fails_the_identity_check(monkeypatch, capsys) -> None:
    inner = RoPE.frequencies

    def frequencies(self: Any, length: Any) -> Any:
        values, factor = inner(self, length)
        return values * (1 + 1e-6), factor

    monkeypatch.setattr(RoPE, "frequencies", frequencies)
    found = failure(monkeypatch, capsys, "nope")
    assert (found["mechanism"], found["scheme"], found["tolerance"]) == ("identity", "rope", 0)
    assert 0 < found["difference"] < 1e-3


@pytest.mark.usefixtures("demo_alone")
def test_weights_changed_by_unpatching_are_found(monkeypatch, capsys) -> None:
    inner = checks.unpatch_model

    def leaves(model: Any) -> Any:
        inner(model)
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight[0, 0] += 1e-3
        return model

    monkeypatch.setattr(checks, "unpatch_model", leaves)
    found = failure(monkeypatch, capsys, "alibi")
    assert found["check"] == "undone = never patched" and found["difference"] > 0


@pytest.mark.usefixtures("demo_alone")
def test_an_exception_is_a_failure_with_its_message(monkeypatch, capsys) -> None:
    def raises(*_: Any, **__: Any) -> Any:
        raise KeyError("rope_parameters")

    monkeypatch.setattr(checks, "load_patched", raises)
    found = failure(monkeypatch, capsys, "alibi")
    assert (found["check"], found["difference"]) == ("saved and loaded = in memory", None)
    assert "KeyError: 'rope_parameters'" in found["message"] and "Traceback" not in found["summary"]
    monkeypatch.setattr("pe_patch.doctor.self_test.run.built_in_cases", lambda: {"demo": raises})
    assert "the model can be built" in failure(monkeypatch, capsys, "alibi")["summary"]


@pytest.mark.parametrize(("versions", "expected"), [
    ({}, ["transformers 5.24.0 (tested: 5.23.0)", "pip install transformers==5.23.0"]),
    ({"transformers": "5.23.0"}, ["report"]),
    ({"transformers": "5.23.0", "torch": "2.13.0+cu130"}, ["report"]),
])  # fmt: skip
def test_a_failure_includes_a_remedy(monkeypatch, versions, expected) -> None:
    monkeypatch.setattr(result, "TESTED", {"torch": "2.13.0", "transformers": "5.23.0"})
    failed = result.Check("demo", "bias", "alibi", "cache = no cache", "failed", 3.2, 1e-4, "at token 60 of 74")
    found = result.SelfTest({"torch": "2.13.0", "transformers": "5.24.0"} | versions, [failed], 1.0)
    for part in ["demo under 'alibi' (bias)", "3.2 at token 60 of 74", "0.0001", *expected]:
        assert part in found.summary(), part
    assert not found.passed and not result.SelfTest({}, [], 0.0).passed  # a run without checks is not a success


def test_the_tested_versions_are_those_of_constraints() -> None:
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    assert result.TESTED.items() <= pinned.items()


# A user's model


def test_a_user_model_is_checked_and_refused_schemes_are_listed(tmp_path: Path, capsys) -> None:
    families.build("gpt2", max_position_embeddings=128).save_pretrained(tmp_path / "gpt2")
    tmp_path = tmp_path / "gpt2"
    found = selftest(tmp_path, built_in=False)
    assert found.passed, found.summary()
    skipped = {check.scheme: check.message for check in found.checks if check.status == "skipped"}
    assert list(skipped) == ["mla"] and "rotates" in skipped["mla"]
    assert {check.model for check in found.checks} == {str(tmp_path)}
    assert cli.main(["selftest", str(tmp_path / "missing")]) == 1
    assert "does not exist" in capsys.readouterr().err
    assert cli.main(["selftest", str(tmp_path), "--dtype", "float23"]) == 2


def test_importing_the_library_does_not_load_the_self_test() -> None:
    assert run("import sys, pe_patch; print([name for name in sys.modules if 'self_test' in name])") == "[]"


def test_the_table_is_readable() -> None:
    ok = result.Check("demo", "bias", "alibi", "a = b", "ok", 1e-7, 1e-4)
    failed = result.Check("demo", "none", "nope", "c = d", "failed", 0.5, 1e-4, "at token 3 of 7")
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(result.render(result.SelfTest({"torch": "2"}, [ok, failed], 3.2)))
    text = console.export_text()
    for part in ("torch 2", "bias", "alibi", "a = b", "1.0e-07", "1.0e-04", "ok", "5.0e-01", "at token 3 of 7", "3 s"):
        assert part in text, part
