"""`extend`: what the plan holds, which scheme wins, what is written, and that a stopped run continues."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pe_patch import describe, extend, load_patched, patch_model, unpatch_model
from pe_patch.advice import advise
from pe_patch.cli.main import main
from pe_patch.data.packaged import DEMO_MODEL
from pe_patch.errors import OptionError, OutputError, PePatchError, UnknownNameError, UnsupportedError
from pe_patch.evaluation.results import Results, Row
from pe_patch.extension import budget, plan, run
from pe_patch.extension.plan import UNTOUCHED, Candidate, ExtensionPlan
from pe_patch.extension.short_answers import share_kept, short_answers
from pe_patch.patching.api import find_patch

PLAIN = Candidate("rope", {}, UNTOUCHED, "")
QUICK = budget.ReadingTime(by_token=2e-5, by_pair=0.0)
"""About what the demo model takes; tests run on machines with other work."""
FLAT = budget.ReadingTime(by_token=1e-3, by_pair=0.0)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan with the time of an idle machine."""
    monkeypatch.setattr(run, "time_reading", lambda model, window: QUICK)


def schemes(count: int) -> list[Candidate]:
    return [PLAIN, *(Candidate("yarn", {"factor": 2.0 + n}, f"scheme {n}", "") for n in range(count))]


@pytest.mark.parametrize(
    ("given", "seconds"), [("90s", 90), ("10m", 600), ("1.5h", 5400), (7, 7), ("7", 7), (" 2 M ", 120)]
)
def test_times_in_words(given: Any, seconds: float) -> None:
    assert budget.parse_seconds("budget", given) == seconds


@pytest.mark.parametrize("given", ["", "ten minutes", "-3m", 0, "5d", "nan"])
def test_what_is_no_time(given: Any) -> None:
    with pytest.raises(OptionError, match="budget must be a time such as 90s, 10m or 2h"):
        budget.parse_seconds("budget", given)


def test_the_time_of_a_reading_is_fitted_to_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "_seconds", lambda model, length: 2e-3 * length + 5e-7 * length**2)
    fitted = budget.time_reading(None, 8192)
    assert fitted.of(32_768) == pytest.approx(2e-3 * 32_768 + 5e-7 * 32_768**2)
    monkeypatch.setattr(budget, "_seconds", lambda model, length: 1.0)  # a machine whose start costs more than all
    assert budget.time_reading(None, 2048).of(4096) > 0


def test_a_budget_buys_schemes_first_then_lengths_then_texts() -> None:
    lengths = [1000, 2000, 8000]
    # One text for the questions and two for the loss of each length; the model as it is never reads the target.
    least = 1.2 * (3 * 1 + 3 * (1 + 8))
    chosen = [plan.choose_measurement(schemes(3), lengths, FLAT, limit) for limit in (1e6, 3.2 * least, least)]
    assert [(len(found), len(where), texts) for found, where, texts, _ in chosen] == [(4, 3, 4), (4, 2, 1), (2, 2, 1)]
    assert chosen[2][3] == pytest.approx(least) and chosen[2][1] == [1000, 8000]
    found, where, texts, needed = plan.choose_measurement(schemes(3), lengths, FLAT, 10)
    assert (len(found), where, texts) == (2, [1000, 8000], 1) and needed == pytest.approx(least), "the smallest"


def test_a_plan_names_every_shortfall_and_what_it_leaves_out() -> None:
    first, second, third = schemes(3)[1:]
    made = ExtensionPlan(
        "m", 8000, 2000, "float32", "Advice.", (PLAIN, first), (1000, 8000), 1, 61.0, 60.0, trained=first, steps=20,
        train_length=2000, train_seconds=601.0, train_budget=60.0, left_out=(second.label, third.label),
        all_seconds=3599.0,
    )  # fmt: skip
    assert "Measure the model as it is and scheme 0 at 1,000 and 8,000 tokens: loss, 8 questions" in str(made)
    assert "Not measured for want of time: scheme 1 and scheme 2. A --budget of 60m includes them." in str(made)
    served = replace(made, not_exported=("dca", "rerope"), exports=("vllm",))
    assert "Not measured, since vllm cannot load it: dca and rerope." in str(served)
    measuring, training, _ = made.shortfalls
    assert "budget of 60 s is too small: this measurement takes about 61 s. Give --budget 2m" in measuring
    assert "20 steps take about 10 minutes. Give --train-budget 11m" in training
    assert not replace(made, budget=61.0, train_budget=601.0).shortfalls


def test_a_small_budget_prints_its_plan_and_both_shortfalls(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["extend", "demo", "--target-length", "512", "--output", str(tmp_path / "out"), "--budget", "0.01s"]
    for more in ([], ["--dry-run"]):
        assert main([*words, "--train", "--train-budget", "0.01s", *more]) == 2
        out, err = capsys.readouterr()
        assert "of a budget of 0 s." in out + err and "Train yarn" in out + err
        assert "Give --budget 1m" in err and "Give --train-budget" in err
    assert not (tmp_path / "out").exists()


def test_a_scheme_that_follows_the_length_reads_the_text_for_each_question() -> None:
    following = Candidate("dynamic_ntk", {"factor": 2.0}, "dynamic", "", follows_length=True)
    plain = plan.measurement_seconds(schemes(1)[1:], [8000], 1, FLAT)
    assert plan.measurement_seconds([following], [8000], 1, FLAT) == pytest.approx(plain * 10 / 3)


def test_candidates_fit_the_exports_and_know_whether_they_follow_the_length() -> None:
    model, advice = AutoModelForCausalLM.from_pretrained(DEMO_MODEL), advise(str(DEMO_MODEL), 512)
    (free, none), (bound, left) = (plan.candidates_of(advice, model, exports, 9) for exports in ((), ("vllm",)))
    following = {each.scheme: each.follows_length for each in free}
    assert following["dynamic_ntk"] and not following["dca"] and not following["yarn"]
    assert {each.scheme for each in bound} >= {"rope", "yarn"} and "dca" not in {each.scheme for each in bound}
    assert none == () and "dca" in left
    assert find_patch(model) is None and len(plan.candidates_of(advice, model, (), 2)[0]) == 3
    with pytest.raises(UnsupportedError, match="No scheme that works without training can be exported"):
        plan.candidates_of(advice, model, ("deepseek",), 9)


def test_training_is_at_full_length_where_memory_and_time_allow_it() -> None:
    full = plan.training_of(8000, 4000, FLAT, budget=1e6, free_memory=10, needed_memory=5)
    assert full == (8000, 400, 400 * 4 * 3.6 * 8.0)
    short = plan.training_of(8000, 4000, FLAT, budget=1e6, free_memory=5, needed_memory=10)
    assert short[0] == 2048 and short[1] == 400
    assert plan.training_of(8000, 4000, FLAT, budget=1000, free_memory=10, needed_memory=5)[:2] == (2048, 33)
    length, steps, seconds = plan.training_of(8000, 4000, FLAT, budget=60, free_memory=10, needed_memory=5)
    assert (length, steps) == (2048, 20) and seconds == pytest.approx(20 * 4 * 3.6 * 2.048)


def results_of(scores: dict[str, tuple[list[float], float, float]]) -> Results:
    """Results from right and wrong answers at 200, and the losses at 100 and 200, by label."""
    shared: dict[str, Any] = {
        "tokens": 0, "depth": None, "low": None, "control": None, "control_length": None, "seconds": 0,
        "peak_memory": None, "memory_kind": "", "seed": 0, "text_hash": "", "tokenizer_hash": "", "measured_on": "",
    }  # fmt: skip
    rows = []
    for label, (answers, short, long) in scores.items():
        high = run_high(answers)
        rows.append(
            Row(
                label,
                "needle",
                "exact",
                200,
                score=sum(answers) / len(answers),
                high=high,
                samples=len(answers),
                **shared,
            )
        )
        for length, loss in ((100, short), (200, long)):
            rows.append(Row(label, "perplexity", run.FIXED, length, score=loss, high=None, samples=9, **shared))
    return Results(rows)


def run_high(answers: list[float]) -> float:
    from pe_patch.evaluation.metrics import score_interval

    return score_interval(answers)[1]


def test_the_least_loss_wins_among_schemes_that_answer_equally_well() -> None:
    first, second, third = schemes(3)[1:]
    made = ExtensionPlan("m", 200, 100, "float32", "", (PLAIN, first, second, third), (100, 200), 1, 1.0, 9.0)
    good, fair, none = [1.0] * 15 + [0.0], [1.0] * 14 + [0.0] * 2, [0.0] * 16
    scores = {
        first.label: (good, 3.3, 3.2), second.label: (fair, 3.0, 3.1), third.label: (none, 1.0, 1.0),
    }  # fmt: skip
    kept = dict.fromkeys(scores, 1.0)
    assert run.choose(made, results_of(scores), kept) is second
    assert run.choose(made, results_of(scores), {**kept, second.label: 0.8}) is first, "the chat counts before the loss"
    assert run.choose(made, results_of(scores), dict.fromkeys(scores, 0.8)) is second, "none keeps it"
    scores[second.label] = (none, 3.0, 3.1)
    assert run.choose(made, results_of(scores), kept) is first


def test_short_answers_are_kept_by_what_leaves_short_texts_alone() -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(DEMO_MODEL), AutoTokenizer.from_pretrained(DEMO_MODEL)
    given = short_answers(model, tokenizer)
    assert share_kept(model, given) == 1.0
    patch_model(model, "yarn", factor=8)
    with torch.inference_mode():
        right = [
            int(model(torch.cat([each.prompt, each.answer[:place]])[None]).logits[0, -1].argmax()) == int(token)
            for each in given
            for place, token in enumerate(each.answer)
        ]
    assert not all(right) and share_kept(model, given) == pytest.approx(sum(right) / len(right))
    unpatch_model(model)
    patch_model(model, "dca")
    assert share_kept(model, given) == 1.0


@pytest.fixture
def said() -> list[str]:
    return []


def test_a_model_is_extended_and_a_stopped_extension_continues(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL).eval()
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    ids = torch.arange(3, 200)[None]
    native = model(ids).logits
    options: dict[str, Any] = {"target_length": 512, "output": tmp_path / "out", "budget": "6s", "export": ["vllm"]}
    measured, evaluate = [], run.evaluate

    def stopped(*arguments: Any, **keywords: Any) -> Any:
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(keywords["label"])
        return evaluate(*arguments, **keywords)

    with monkeypatch.context() as cutting:
        cutting.setattr(run, "evaluate", stopped)
        with pytest.raises(KeyboardInterrupt):
            extend(model, tokenizer, **options, say=said.append)
    assert torch.equal(model(ids).logits, native), "a stopped extension leaves the model without a patch"
    kept = json.loads((tmp_path / "out" / "extension.json").read_text())
    with pytest.raises(OutputError, match="another target_length: 512, and now 600"):
        extend(model, tokenizer, **{**options, "target_length": 600}, say=said.append)
    weight = model.get_output_embeddings().weight
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(OptionError, match=r"differ from those in .* Save the model with its tokenizer"):
        extend(model, tokenizer, **options, say=said.append)
    with torch.no_grad():
        weight.div_(2)
    (tmp_path / "out" / "extension.json").write_text(json.dumps({**kept, "weights": "of other weights"}))
    with pytest.raises(OutputError, match=r"weights of .* have changed since .*out was begun"):
        extend(model, tokenizer, **options, say=said.append)
    (tmp_path / "out" / "extension.json").write_text(json.dumps(kept))
    done = extend(model, tokenizer, **options, say=said.append)
    assert json.loads((tmp_path / "out" / "extension.json").read_text()) == kept, "the plan is kept"
    assert done.plan.candidates[0].label == UNTOUCHED
    assert {row.scheme for row in done.results.rows} == {each.label for each in done.plan.candidates}
    scored = {row.details["targets_hash"] for row in done.results.select(task="perplexity")}
    assert len(scored) == 1, "the loss is that of the same tokens"
    loaded = load_patched(done.model).eval()
    patch_model(model, done.chosen.scheme, **done.chosen.options)
    assert describe(loaded).scheme == done.chosen.scheme and torch.equal(loaded(ids).logits, model(ids).logits)
    assert AutoTokenizer.from_pretrained(done.model).get_vocab() == tokenizer.get_vocab()
    assert all((path / "config.json").is_file() for path in done.exports)
    shares = json.loads((tmp_path / "out" / "short_answers.json").read_text())
    assert set(shares) == {each.label for each in done.plan.candidates} and shares[UNTOUCHED] == 1.0
    page = done.page.read_text(encoding="utf-8")
    assert "Schemes that were measured" in page and done.chosen.label in page
    assert done.verdict in str(done) and "questions at 512 tokens" in done.verdict


def test_the_command_plans_trains_and_reports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "STEPS", (3, 6))
    output = str(tmp_path / "out")
    words = ["extend", "demo", "--target-length", "512", "--output", output, "--budget", "6s"]
    assert main([*words, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "of a budget of 6 s" in shown and "No training" in shown and not Path(output).exists()
    assert main([*words, "--train", "--train-budget", "6s", "--json", "-q"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["scheme"] == "yarn" and "trained answers" in found["verdict"]
    assert "The best scheme without training, " in found["verdict"]
    assert Path(found["model"], "README.md").is_file() and Path(found["page"]).is_file()
    steps = [json.loads(line) for line in Path(output, "log.jsonl").read_text().splitlines()]
    assert sum(line["event"] == "step" for line in steps) >= plan.STEPS[0]


def test_the_checkpoint_has_the_type_that_was_measured(tmp_path: Path) -> None:
    done = extend("demo", target_length=512, output=tmp_path / "out", budget="6s", dtype="bf16", say=lambda line: None)
    loaded = load_patched(done.model)
    assert loaded.dtype == torch.bfloat16 and describe(loaded).scheme == done.chosen.scheme
    kept = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.bfloat16)
    assert torch.equal(loaded.get_input_embeddings().weight, kept.get_input_embeddings().weight)


def test_what_would_end_the_training_is_found_before_the_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"

    def full(run: Any) -> None:
        raise PePatchError("output: the disk is full.")

    monkeypatch.setattr("pe_patch.training.output_checks.check_room", full)
    monkeypatch.setattr(run, "_measure_all", lambda *arguments: pytest.fail("It measured."))
    with pytest.raises(PePatchError, match="the disk is full"):
        extend("demo", target_length=512, output=output, budget="6s", train=True, train_budget="6s")
    assert not output.exists()


def test_the_check_of_a_training_leaves_no_model_in_memory_and_counts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Any] = []
    made = run.Run.__init__

    def remembered(self: Any, recipe: Any) -> None:
        made(self, recipe)
        built.append(weakref.ref(self.model))

    monkeypatch.setattr(run.Run, "__init__", remembered)
    request = run.Request(model="demo", target_length=512, output=tmp_path / "out", budget="6s", train=True)
    run.prepare(request, print)
    assert len(built) == 1 and built[0]() is None
    monkeypatch.setattr("pe_patch.training.plan.free_bytes", lambda device: 1)
    with pytest.raises(PePatchError, match="do not fit in memory"):
        run.prepare(request, print)


def test_what_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    options: dict[str, Any] = {"target_length": 512, "output": tmp_path / "out"}
    with pytest.raises(UnknownNameError, match=r"vlm.*vllm"):
        extend("demo", **options, export=["vlm"])
    with pytest.raises(OptionError, match="target_length must be a whole number"):
        extend("demo", **{**options, "target_length": 5.5})
    model = patch_model(AutoModelForCausalLM.from_pretrained(DEMO_MODEL), "yarn", factor=2)
    with pytest.raises(OptionError, match="without a patch"):
        extend(model, AutoTokenizer.from_pretrained(DEMO_MODEL), **options)
    with pytest.raises(OptionError, match=r"Nothing is needed: .* Give a greater target_length"):
        extend("demo", **{**options, "target_length": 200})
    with pytest.raises(OptionError, match="device has no effect"):
        extend("demo", **options, train=True, device="cpu")
    with pytest.raises(OptionError, match=r"float32 or bfloat16, and this model is torch\.float16"):
        extend("demo", **options, dtype="float16")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"holds notes\.txt"):
        extend("demo", **options)
    assert advise(str(DEMO_MODEL), 512).case.needed
