"""Every window and prompt starts with BOS as the tokenizer sets it, in every measure, control and task."""

import json
from dataclasses import replace

import numpy as np
import pytest
from tokenizers import processors
from typer.testing import CliRunner

from benchmarks import loss_with_bos as reference
from pe_patch.cli.main import app
from pe_patch.data.text import load_documents
from pe_patch.errors import OptionError
from pe_patch.evaluation.context import PromptTemplate
from pe_patch.evaluation.corpus import Corpus
from pe_patch.evaluation.journal import Journal
from pe_patch.evaluation.lm_eval import harness
from pe_patch.evaluation.longppl import key_token_spans
from pe_patch.evaluation.model import EvaluatedModel
from pe_patch.evaluation.perplexity import Perplexity
from pe_patch.evaluation.retrieval import start_ids, starts_with_bos
from pe_patch.evaluation.run import evaluate
from pe_patch.evaluation.tasks import TASKS
from pe_patch.evaluation.tasks.long_generation import LongGeneration

from .bench_doubles import CHAT, make_bench
from .evaluation_doubles import TEXT, Mute, double, make_tokenizer, tiny_llama

LENGTH, TARGETS, SPOTS, STRIDE, STRETCH = 48, 12, 3, 20, 100


def bos_tokenizer(start=("<k0>",), **options):
    """Return a tokenizer that puts special tokens before a text, by default a BOS token."""
    tokenizer = make_tokenizer(bos_token="<k0>", **options)
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in start]
    tokenizer.backend_tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=[*start, "$A"], pair=[*start, "$A", "$B"], special_tokens=ids),
        ]
    )
    return tokenizer


TOKENIZERS = {"adds BOS": bos_tokenizer, "adds none": lambda: make_tokenizer(bos_token="<k0>")}


@pytest.fixture(scope="module")
def llama():
    return tiny_llama(len(make_tokenizer()), window=LENGTH).double()


def loss_rows(model, tokenizer, length=LENGTH, bos=None, **options):
    task = Perplexity(targets=TARGETS, spots=SPOTS, stride=STRIDE, stretch_tokens=STRETCH, windows=SPOTS, **options)
    rows = evaluate(model, tokenizer, task, length, text=TEXT, progress=False, retrieval=False, bos=bos).rows
    return {row.measure.partition(", ")[2]: row for row in rows}


def pieces(tokenizer, longest, step, count):
    corpus = Corpus.load(tokenizer, TEXT, needed=longest)
    return [ids.tolist() for ids in corpus.spots(longest, step, count, 0)[0]]


# Losses


@pytest.mark.parametrize(("kind", "bos", "start"), [
    ("adds BOS", None, ["<k0>"]), ("adds BOS", True, ["<k0>"]), ("adds BOS", False, []),
    ("adds none", None, []), ("adds none", True, ["<k0>"]), ("adds none", False, []),
])  # fmt: skip
def test_losses_equal_those_of_transformers_alone(llama, kind, bos, start):
    tokenizer = TOKENIZERS[kind]()
    ids = tokenizer.convert_tokens_to_ids(start)
    rows = loss_rows(llama, tokenizer, bos=bos)
    fixed, sliding, position = (rows[name] for name in ("fixed targets", "sliding window", "by position"))
    spots = pieces(tokenizer, LENGTH, TARGETS, SPOTS)
    assert fixed.score == pytest.approx(reference.fixed(llama, spots, ids, LENGTH, TARGETS), abs=1e-5)
    bare = reference.fixed(llama, spots, ids, TARGETS + 1, TARGETS)
    assert fixed.without_context == pytest.approx(bare, abs=1e-5)
    size = sliding.details["stretch"]
    stretches = pieces(tokenizer, size, size, sliding.details["stretches"])
    assert sliding.score == pytest.approx(reference.sliding(llama, stretches, ids, LENGTH, STRIDE), abs=1e-5)
    expected = reference.by_position(llama, pieces(tokenizer, LENGTH, 128, SPOTS), ids, LENGTH)
    assert position.score == pytest.approx(np.mean(expected), abs=1e-5)
    for bucket in position.details["buckets"]:
        mean = np.mean(expected[bucket["first"] - 1 : bucket["last"]])
        assert bucket["loss"] == pytest.approx(mean, abs=1e-5)
    for row in (fixed, sliding, position):
        assert (row.details["bos"], row.details["window_start"]) == (bool(start), start)
        assert ("every window starts with <k0>" if start else "no window starts with a BOS token") in row.measured_on


def test_the_option_of_the_task_overrules_that_of_the_evaluation(llama):
    tokenizer = bos_tokenizer()
    without = loss_rows(llama, tokenizer, bos=False)
    assert {name: row.score for name, row in loss_rows(llama, tokenizer).items()} != {
        name: row.score for name, row in without.items()
    }
    for name, row in loss_rows(llama, tokenizer, measures=("fixed", "sliding", "position")).items():
        assert row.details["bos"] and row.score != without[name].score
    task = Perplexity(targets=TARGETS, spots=SPOTS, measures="fixed", bos=False)
    (row,) = evaluate(llama, tokenizer, task, LENGTH, text=TEXT, progress=False, retrieval=False).rows
    assert row.score == without["fixed targets"].score


def test_controls_start_with_bos(llama):
    """The control of a length is the score at the control length, which has BOS."""
    tokenizer = bos_tokenizer()
    model = tiny_llama(len(tokenizer), window=LENGTH).double()
    model.config.max_position_embeddings = 2 * LENGTH
    options = {"targets": TARGETS, "spots": SPOTS, "stride": STRIDE, "stretch_tokens": STRETCH}
    task = Perplexity(measures=("fixed", "sliding"), **options)
    settings = {"text": TEXT, "progress": False, "retrieval": False, "control_length": LENGTH}
    short, short_sliding, far, far_sliding = evaluate(model, tokenizer, task, [LENGTH, 2 * LENGTH], **settings).rows
    assert far.control == short.score and far_sliding.control == short_sliding.score
    far_alone, sliding_alone = evaluate(model, tokenizer, task, [2 * LENGTH], **settings).rows
    assert (far_alone.control, sliding_alone.control) == (short.score, short_sliding.score)


def test_the_judge_of_longppl_starts_every_window_with_bos():
    tokenizer, read = bos_tokenizer(), []

    class Recording(EvaluatedModel):
        def losses(self, sequences, targets):
            read.extend(ids.tolist() for ids in sequences)
            return np.ones((len(sequences), targets))

    start = start_ids(tokenizer)
    judge = Recording(tiny_llama(len(tokenizer), window=4096), tokenizer)
    key_token_spans(judge, TEXT[0][:400], 20, 10, start)
    assert len(read) > 3 and all(ids[:1] == start.tolist() and start[0] not in ids[1:] for ids in read)


def test_longppl_says_whether_its_windows_start_with_bos():
    tokenizer = bos_tokenizer()
    model = tiny_llama(len(tokenizer), window=256).double()
    for bos in (None, False):
        task = Perplexity(measures="longppl", short_context=8, windows=2)
        rows = evaluate(model, tokenizer, task, 64, text=TEXT, progress=False, retrieval=False, bos=bos).rows
        assert [row.details["bos"] for row in rows] == [bos is None] * len(rows)


def test_special_tokens_other_than_bos_start_windows_too():
    """GLM's tokenizers put two special tokens before a text, and have no BOS token."""
    tokenizer = bos_tokenizer(("<k1>", "<k0>"))
    tokenizer.bos_token = None
    ids = tokenizer.convert_tokens_to_ids(["<k1>", "<k0>"])
    assert start_ids(tokenizer).tolist() == tokenizer("a")["input_ids"][:2] == ids
    model = tiny_llama(len(tokenizer), window=LENGTH).double()
    rows = loss_rows(model, tokenizer)
    spots = pieces(tokenizer, LENGTH, TARGETS, SPOTS)
    expected = reference.fixed(model, spots, ids, LENGTH, TARGETS)
    assert rows["fixed targets"].score == pytest.approx(expected, abs=1e-5)
    by_position = reference.by_position(model, pieces(tokenizer, LENGTH, 128, SPOTS), ids, LENGTH)
    assert rows["by position"].score == pytest.approx(np.mean(by_position), abs=1e-5)
    assert rows["by position"].details["buckets"][0]["first"] == 2


def test_a_tokenizer_may_change_its_mind():
    tokenizer = make_tokenizer(bos_token="<k0>")
    assert not starts_with_bos(tokenizer)
    tokenizer.backend_tokenizer.post_processor = bos_tokenizer().backend_tokenizer.post_processor
    assert starts_with_bos(tokenizer)


# Prompts


WITHOUT_FILES = [
    name
    for name in TASKS
    if name not in ("perplexity", "long_generation")  # They ask no question, and have their own tests here.
    and not name.startswith(("longbench", "infinitebench"))
    and name not in ("qa_1", "qa_2", "vt")
]
"""`vt` is left out, since its worked example is too long for this tokenizer; its prompts are made like the others'."""


@pytest.fixture(scope="module")
def code_bench():
    """Return a context whose text is Python code, as some tasks need; reading it takes a second."""
    documents = load_documents("stdlib", split="test", limit=12)
    bench = make_bench(bos_tokenizer(), texts=documents, samples=2, depths=[0.5])
    bench.lengths = [3000]
    return bench


@pytest.mark.parametrize("name", WITHOUT_FILES)
def test_every_prompt_and_control_starts_with_bos_once(name, code_bench):
    options = {"wording": "own"} if "wording" in TASKS[name].__dataclass_fields__ else {}
    tokenizer = code_bench.model.tokenizer
    (token,) = start_ids(tokenizer).tolist()
    for bos, count in ((None, 1), (False, 0)):
        bench = replace(code_bench, template=PromptTemplate.of(tokenizer, False, bos), journal=Journal())
        task = TASKS[name](**options)
        for question in (*task.questions(bench, 3000, 0.5), *task.questions(bench, 3000, 0.5, within=2000)):
            for ids in (question.prompt, question.without_context):
                assert ids is not None and ids.tolist().count(token) == count
                assert count == 0 or ids[0] == token
            assert len(question.prompt) + question.budget - 1 <= 3000


@pytest.mark.parametrize(("bos", "count"), [(None, 1), (True, 1), (False, 0)])
def test_every_continuation_of_a_text_starts_with_bos_once(bos, count, monkeypatch):
    tokenizer, read = bos_tokenizer(), []
    monkeypatch.setattr(
        EvaluatedModel,
        "continuations",
        lambda model, prompts, tokens, sampling: [read.append(ids) or ids[:tokens] for ids in prompts],
    )
    model = tiny_llama(len(tokenizer), window=256)
    task = LongGeneration(tokens=20, texts=3)
    rows = evaluate(model, tokenizer, task, [84, 120], text=TEXT, progress=False, bos=bos).rows
    assert rows and [len(ids) for ids in read] == [64] * 3 + [100] * 3
    (token,) = start_ids(tokenizer).tolist()
    for ids in read:
        assert ids.tolist().count(token) == count and (count == 0 or ids[0] == token)


def test_data_set_prompts_start_with_bos(tmp_path):
    from .test_longbench_rows import HotpotQA, row, write

    tokenizer = bos_tokenizer(chat_template=CHAT)
    (token,) = start_ids(tokenizer).tolist()
    write(tmp_path / "hotpotqa.jsonl", [row(number) for number in range(4)])
    for bos in (None, False):
        for question in HotpotQA(source=str(tmp_path)).questions(make_bench(tokenizer, bos=bos), 1500, None):
            assert question.prompt.tolist().count(token) == (0 if bos is False else 1)


def test_a_chat_template_decides_and_the_option_overrules_it():
    template = "{{ bos_token }}" + CHAT
    tokenizer = bos_tokenizer(chat_template=template)
    (token,) = start_ids(tokenizer).tolist()
    for bos, count in ((None, 1), (True, 1), (False, 0)):
        prompt = make_bench(tokenizer, chat=True, bos=bos).prompt("the door", " opens").tolist()
        assert prompt.count(token) == count
    without = bos_tokenizer(chat_template=CHAT)
    for bos, count in ((None, 0), (True, 1), (False, 0)):
        assert make_bench(without, chat=True, bos=bos).prompt("the door").tolist().count(token) == count


# What says so


def test_results_say_which(tmp_path):
    for tokenizer, bos, said in (
        (bos_tokenizer(), None, "<k0> (as the tokenizer does)"),
        (bos_tokenizer(), False, "none (bos=False)"),
        (make_tokenizer(), None, "none (as the tokenizer does)"),
    ):
        results = evaluate(
            double(Mute, tokenizer), tokenizer, "passkey", 300, text=TEXT, progress=False, samples=1, bos=bos
        )
        assert results.config["bos"] == said
        assert f"BOS: {said}" in str(results)


def test_another_start_is_measured_again(llama, tmp_path):
    tokenizer = bos_tokenizer()
    first = {row.key for row in loss_rows(llama, tokenizer).values()}
    assert first.isdisjoint(row.key for row in loss_rows(llama, tokenizer, bos=False).values())
    assert first == {row.key for row in loss_rows(llama, tokenizer).values()}


def test_bos_that_the_tokenizer_does_not_have_is_an_error(llama):
    with pytest.raises(OptionError, match=r"this tokenizer has none\. Leave bos out"):
        loss_rows(llama, make_tokenizer(), bos=True)


def test_the_command_line_has_the_option():
    shown = CliRunner().invoke(app, ["evaluate", "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output
    assert "--bos" in shown and "--no-bos" in shown


@pytest.mark.parametrize("bos", [None, False])
def test_lm_eval_gets_the_same_start(bos, tmp_path):
    from .test_harness import words

    tokenizer = bos_tokenizer()
    model, read = tiny_llama(len(tokenizer), window=256), []
    hook = model.register_forward_pre_hook(
        lambda _, given, more: read.append((more.get("input_ids"), *given)), with_kwargs=True
    )
    text = tmp_path / "rows.json"
    text.write_text(json.dumps({"question": words(make_tokenizer(), 40)}))
    task = {
        "task": "own", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(text)}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{question}}",
        "doc_to_choice": ["door", "stone"], "doc_to_target": 0,
    }  # fmt: skip
    (row, *_) = harness(model, tokenizer, task, bos=bos).rows
    hook.remove()
    (token,) = start_ids(tokenizer).tolist()
    rows = [ids for ids in read[-1] if ids is not None]
    assert rows and all((ids[0, 0] == token) == (bos is None) for ids in rows)
    assert row.details["prompt_start"] == (["<k0>"] if bos is None else [])
    with pytest.raises(OptionError, match="adds no BOS token"):
        harness(model, make_tokenizer(bos_token="<k0>"), task, bos=True)
