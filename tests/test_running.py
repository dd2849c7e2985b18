"""Running an evaluation: batches, shared prefixes, memory, controls, intervals, chat templates and options."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pe_patch import patch_model
from pe_patch.errors import OptionError, PePatchError, UnknownNameError
from pe_patch.evaluation import model as evaluated
from pe_patch.evaluation.context import PromptTemplate
from pe_patch.evaluation.metrics import bounded_interval, score_interval
from pe_patch.evaluation.model import EvaluatedModel
from pe_patch.evaluation.question import Question
from pe_patch.evaluation.tasks import GROUPS, TASKS, find_tasks

from .evaluation_doubles import Copier, Mute, double, make_tokenizer, measure, tiny_llama
from .families import build

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def llama(tokenizer):
    return tiny_llama(len(tokenizer), window=256)


def question(ids, budget=6):
    return Question(np.asarray(ids, dtype=np.int64), ("",), budget)


def step_by_step(model, tokenizer, prompt, budget):
    """Generate greedily with one uncached forward pass per token."""
    ids = torch.tensor(prompt)[None]
    with torch.inference_mode():
        for _ in range(budget):
            ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
            if ids[0, -1] == tokenizer.eos_token_id:
                ids = ids[:, :-1]
                break
    return tokenizer.decode(ids[0, len(prompt) :])


# Batches


@pytest.mark.parametrize("scheme", [None, ("yarn", {"factor": 2}), ("alibi", {}), ("dynamic_ntk", {"factor": 2})])
def test_a_padded_batch_gives_the_answers_of_single_prompts(tokenizer, llama, scheme):
    if scheme is not None:
        patch_model(llama, scheme[0], **scheme[1])
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, len(tokenizer), size) for size in (40, 17, 29, 33, 40, 8)]
    given = EvaluatedModel(llama, tokenizer, batch_size=6).answers([question(ids) for ids in prompts])
    assert given == [step_by_step(llama, tokenizer, ids, 6) for ids in prompts]
    assert len(set(given)) > 3


def test_each_question_has_its_own_budget(tokenizer, llama):
    rng = np.random.default_rng(1)
    prompts = [(rng.integers(1, len(tokenizer), 20), budget) for budget in (1, 5, 2, 5)]
    given = EvaluatedModel(llama, tokenizer, batch_size=4).answers([question(*each) for each in prompts])
    assert given == [step_by_step(llama, tokenizer, *each) for each in prompts]


def test_an_answer_ends_at_any_eos_token_of_the_checkpoint(tokenizer, llama):
    prompt = np.random.default_rng(2).integers(1, len(tokenizer), 20)
    ids = torch.tensor(prompt)[None]
    first = llama(input_ids=ids).logits[0, -1].argmax()
    second = llama(input_ids=torch.cat([ids, first.view(1, 1)], 1)).logits[0, -1].argmax()
    assert first != second
    llama.generation_config.eos_token_id = [0, int(second)]
    assert EvaluatedModel(llama, tokenizer).answers([question(prompt)]) == [tokenizer.decode([first])]


# Prompts with a shared prefix


def prompts_with_a_shared_prefix(size):
    rng = np.random.default_rng(3)
    text = rng.integers(1, size, 120)
    ends = [rng.integers(1, size, 7) for _ in range(3)]
    moved = [np.concatenate([text[:cut], ends[0], text[cut:], ends[1]]) for cut in (80, 100, 110)]
    return [*(np.concatenate([text, end]) for end in ends), *moved, rng.integers(1, size, 90)]


def read_tokens(model, monkeypatch):
    """Record the number of tokens of each forward pass."""
    counts, real = [], model.forward

    def spy(*args, **kwargs):
        ids = kwargs.get("input_ids")
        counts.append((args[0] if ids is None else ids).numel())
        return real(*args, **kwargs)

    monkeypatch.setattr(model, "forward", spy)
    return counts


@pytest.mark.parametrize(
    "scheme", [None, ("yarn", {"factor": 2}), ("t5", {}), ("self_extend", {"group": 2, "window": 32})]
)
def test_a_shared_prefix_is_read_once_and_changes_no_answer(tokenizer, llama, scheme, monkeypatch):
    if scheme is not None:
        patch_model(llama, scheme[0], **scheme[1])
    prompts = prompts_with_a_shared_prefix(len(tokenizer))
    subject = EvaluatedModel(llama, tokenizer)
    assert subject.cache_bytes
    expected = [step_by_step(llama, tokenizer, ids, 6) for ids in prompts]
    counts = read_tokens(llama, monkeypatch)
    assert subject.answers([question(ids) for ids in prompts]) == expected
    # the leader's prompt once (126), the other prompts from where they differ, the unrelated prompt, and decoding
    assert sum(counts) < 126 + 3 * 7 + (47 + 27 + 17) + 90 + 7 * 6 + 10 < sum(map(len, prompts))


def test_a_cache_with_sliding_layers_shares_only_what_all_prompts_share(tokenizer, monkeypatch):
    """It cannot be cropped, so that prompts that part at different tokens share the shortest common prefix."""
    torch.manual_seed(0)
    gemma = build("gemma3_text", vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=0, eos_token_id=0).eval()
    prompts = prompts_with_a_shared_prefix(len(tokenizer))[:6]
    subject = EvaluatedModel(gemma, tokenizer)
    assert subject.cache_bytes
    expected = [step_by_step(gemma, tokenizer, ids, 6) for ids in prompts]
    counts = read_tokens(gemma, monkeypatch)
    assert subject.answers([question(ids) for ids in prompts]) == expected
    # the first 80 tokens once, and each prompt from there
    assert sum(counts) <= 80 + sum(len(ids) - 80 for ids in prompts) + 6 * 6


def test_length_dependent_frequencies_do_not_share_prefixes(tokenizer, llama, monkeypatch):
    """Dynamic NTK sets its frequencies by the length of a pass, so reading half a prompt first changes the result."""
    patch_model(llama, "dynamic_ntk")
    prompts = [np.concatenate([ids, ids, ids]) for ids in prompts_with_a_shared_prefix(len(tokenizer))[:3]]
    given = EvaluatedModel(llama, tokenizer, batch_size=1).answers([question(ids) for ids in prompts])
    assert given == [
        tokenizer.decode(
            llama.generate(torch.tensor(ids)[None], max_new_tokens=6, do_sample=False)[0, len(ids) :]
        ).replace("<eos>", "")
        for ids in prompts
    ]
    assert not EvaluatedModel(llama, tokenizer).can_reuse_prefix


# Memory


def test_cache_bytes_are_measured_on_the_model(tokenizer, llama):
    # 2 layers x keys and values x 2 key-value heads x 8 numbers x 4 bytes
    assert EvaluatedModel(llama, tokenizer).cache_bytes == 2 * 2 * 2 * 8 * 4
    assert EvaluatedModel(double(Mute, tokenizer), tokenizer).cache_bytes == 0


def test_the_batch_size_follows_the_free_memory(tokenizer, llama, monkeypatch):
    needed = evaluated.sequence_bytes(llama, 100, 256, 1)
    monkeypatch.setattr(evaluated, "free_bytes", lambda device: int(3.5 * needed / evaluated.USABLE_MEMORY))
    assert evaluated.max_batch_size(llama, torch.device("cpu"), 100, cache_bytes=256) == 3
    monkeypatch.setattr(evaluated, "free_bytes", lambda device: needed // 2)
    with pytest.raises(PePatchError, match=r"100 tokens takes about .* are free on cpu.*batch_size=1"):
        evaluated.max_batch_size(llama, torch.device("cpu"), 100, cache_bytes=256)


def test_eager_attention_counts_its_score_matrices(tokenizer):
    llama = tiny_llama(len(tokenizer))
    plain = evaluated.sequence_bytes(llama, 1000, 0, 1)
    llama.set_attn_implementation("eager")
    assert evaluated.sequence_bytes(llama, 1000, 0, 1) - plain == 2 * 4 * 1000 * 1000 * 4


# Controls


def test_every_row_has_both_controls(tokenizer, llama):
    results = measure(llama, tokenizer, ["needle", "needle_single", "perplexity"], [64, 128],
                      control_length=64)  # fmt: skip
    for row in results.rows:
        assert row.control is not None
        if row.measure not in ("nats per token, sliding window", "nats per token, by position"):
            assert row.without_context is not None


def test_without_context_has_only_the_question(tokenizer):
    """The control exposes a model that knows the answer without reading."""

    class Knows(Mute):
        def next_token(self, ids):
            return tokenizer.convert_tokens_to_ids("<v7>")

    (row,) = measure(double(Knows, tokenizer), tokenizer, "passkey", [300], samples=64, depths=(0.5,)).rows
    assert row.without_context == row.score == row.control
    (row,) = measure(double(Copier, tokenizer), tokenizer, "passkey", [300], samples=64, depths=(0.5,)).rows
    assert (row.score, row.without_context) == (1.0, 0.0)


COPIED = [(task, "tokens") for task in ("needle_single", "needle_multi_key", "needle_multi_query", "needle", "passkey")]
COPIED += [(task, "english") for task in ("needle_single", "needle_multi_key", "needle", "passkey")]
"""Tasks whose answer follows the last words of the question in the text. Answers that are lists cannot be copied."""


@pytest.mark.parametrize(("task", "wording"), COPIED)
def test_copiers_score_one_and_mute_models_zero_at_every_length_and_depth(tokenizer, task, wording):
    options = {"task_options": {"wording": wording}, "depths": (0.0, 0.5, 1.0), "samples": 3}
    lengths = [900, 1500] if wording == "english" else [300, 500]
    for kind, score in ((Copier, 1.0), (Mute, 0.0)):
        results = measure(double(kind, tokenizer), tokenizer, task, lengths, **options)
        assert {(row.score, row.control) for row in results.rows} == {(score, score)}
        assert len(results.rows) == 6


def test_a_wording_that_cannot_ask_for_a_list_raises(tokenizer):
    with pytest.raises(PePatchError, match=r"'tokens' cannot ask for several values.*needle_multi_query"):
        measure(double(Mute, tokenizer), tokenizer, "needle_multi_value", [300])


@pytest.mark.parametrize("task", ["needle_multi_value", "needle_multi_query"])
def test_a_list_of_values_scores_the_share_of_its_values(tokenizer, task, monkeypatch):
    """The prompt has each of the four values once, and the score is the share of values in the answer."""
    model = double(Mute, tokenizer)
    results = measure(model, tokenizer, task, [1200], task_options={"wording": "english"}, depths=(0.2,), samples=2)
    seen = []

    class Spy(EvaluatedModel):
        def answers(self, questions):
            seen.extend(questions)
            return ["x " + ", ".join(each.references[:3]) for each in questions]

    from pe_patch.evaluation import run

    original, run.EvaluatedModel = run.EvaluatedModel, Spy
    try:
        (row,) = measure(model, tokenizer, task, [1200], task_options={"wording": "english"}, depths=(0.2,),
                         samples=2).rows  # fmt: skip
    finally:
        run.EvaluatedModel = original
    assert (row.score, row.low < 0.75 < row.high or row.low == row.high) == (0.75, True)
    assert results.rows[0].score == 0.0
    for each in seen[:2]:
        text = tokenizer.decode(each.prompt)
        assert len(each.references) == 4 and all(text.count(value) == 1 for value in each.references)
        assert len(each.prompt) + each.budget == 1200
        first = text.index(each.references[0]) / len(text)
        assert 0.15 < first < 0.3 and text.index(each.references[3]) / len(text) > 0.7


# Intervals


def test_binary_scores_have_the_exact_interval():
    # Clopper and Pearson for 5 of 20
    assert score_interval([1.0] * 5 + [0.0] * 15) == (pytest.approx(0.0866, abs=1e-4), pytest.approx(0.4910, abs=1e-4))


def test_questions_about_one_text_form_a_group():
    """Four copies of an answer have as much information as one, so the interval is that of the texts."""
    texts = [1.0] * 6 + [0.0] * 4
    groups = [number for number in range(10) for _ in range(4)]
    assert score_interval([1.0] * 40, groups) == score_interval([1.0] * 10)
    low, high = score_interval([text for text in texts for _ in range(4)], groups)
    assert (low, high) == bounded_interval(texts)
    # at least the standard error of a mean of ten, sqrt(.6 x .4 / 10) = .155, times 1.96 on either side
    assert low <= 0.6 - 0.30 and high >= 0.6 + 0.30


def test_pooled_depths_of_the_same_texts_are_not_independent(tokenizer):
    results = measure(double(Copier, tokenizer), tokenizer, "needle_single", [300], samples=6, depths=(0.0, 0.5, 1.0))
    cell = results.cell(task="needle_single", length=300)
    assert cell is not None and cell.samples == 6
    assert (cell.low, cell.high) == score_interval([1.0, 1.0])


# Losses of long sequences


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "gpt_neox"])
@pytest.mark.parametrize("scheme", [None, "alibi"])
def test_losses_in_chunks_are_those_of_whole_logits(tokenizer, family, scheme, monkeypatch):
    """Gemma 2 caps its logits and Cohere scales them, behind the output layer."""
    model = build(family)
    if scheme is not None:
        patch_model(model, scheme)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    sequences = np.random.default_rng(0).integers(1, vocabulary, (3, 40))
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor(sequences)).logits.double()
    expected = torch.nn.functional.cross_entropy(
        logits[:, 9:-1].flatten(0, 1), torch.tensor(sequences[:, 10:]).flatten(), reduction="none"
    )
    monkeypatch.setattr(evaluated, "LOGITS_PER_CHUNK", 7 * vocabulary)
    subject = EvaluatedModel(model, tokenizer, batch_size=2)
    assert subject.output_head is not None
    found = subject.losses(list(sequences), 30)
    assert found.shape == (3, 30)
    np.testing.assert_allclose(found.flatten(), expected.numpy(), rtol=1e-5)
    whole = EvaluatedModel(model, tokenizer, batch_size=2)
    monkeypatch.setattr(evaluated, "LOGITS_PER_CHUNK", 2**28)
    np.testing.assert_allclose(whole.losses(list(sequences), 30), found, rtol=1e-5)


def test_the_memory_of_a_long_loss_is_that_of_a_chunk_of_logits(tokenizer, llama, monkeypatch):
    vocabulary = len(tokenizer)
    one_chunk = evaluated.sequence_bytes(llama, 200, 0, 10)
    monkeypatch.setattr(evaluated, "LOGITS_PER_CHUNK", 10 * vocabulary)
    monkeypatch.setattr(evaluated, "free_bytes", lambda device: int(1.01 * one_chunk / evaluated.USABLE_MEMORY))
    assert EvaluatedModel(llama, tokenizer).losses([np.ones(200, dtype=np.int64)], 190).shape == (1, 190)
    monkeypatch.setattr(evaluated, "LOGITS_PER_CHUNK", 2**28)
    with pytest.raises(PePatchError, match="A sequence of 200 tokens takes"):
        EvaluatedModel(llama, tokenizer).losses([np.ones(200, dtype=np.int64)], 190)


# Chat


TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"  # noqa: E501


def test_the_answer_prefix_follows_the_chat_template(tokenizer):
    chatty = make_tokenizer(chat_template=TEMPLATE)
    frame = PromptTemplate.of(chatty, chat=True)
    assert (frame.head, frame.tail) == ("<|user|>", "<|end|><|assistant|>")
    assert chatty.decode(frame.ids(chatty, "the door", " opens")) == "<|user|>the door<|end|><|assistant|> opens"
    seen = []

    class Spy(Copier):
        def next_token(self, ids):
            seen.append(chatty.decode(ids))
            return super().next_token(ids)

    options = {"chat": True, "task_options": {"wording": "english"}, "depths": (0.5,), "samples": 1}
    (row,) = measure(double(Spy, chatty), chatty, "passkey", [400], **options).rows
    assert row.score == 1.0 and row.tokens == 400
    prompt = next(text for text in seen if len(text) > 100)
    assert prompt.startswith("<|user|>The text below has notes")
    assert "locker?<|end|><|assistant|> By the note in the text" in prompt
    with pytest.raises(OptionError, match="this one has none"):
        measure(double(Mute, tokenizer), tokenizer, "passkey", [400], chat=True)


# Names and options


def test_options_reach_the_tasks_that_have_them():
    first, second = find_tasks(["needle", "perplexity"], {"needles": 3, "spots": 2})
    assert (first.needles, second.spots) == (3, 2)
    assert [task.name for task in find_tasks(["heat_map"])] == list(GROUPS["heat_map"])
    with pytest.raises(OptionError, match=r"'needels'. Did you mean 'needles'"):
        find_tasks(["needle"], {"needels": 3})
    with pytest.raises(UnknownNameError, match="Did you mean 'heat_map'"):
        find_tasks(["heatmap"])


def test_every_task_has_a_summary_and_a_source():
    for name, task in TASKS.items():
        assert task.name == name and task.summary and task.paper, name
