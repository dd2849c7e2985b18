"""Test LongBench's rows: sources and layouts, whole prompts, cuts that rows report, and names of results."""

import json
import os
import random
import zipfile

import pytest
import yaml

from pe_patch.errors import OptionError, PePatchError, UnknownNameError
from pe_patch.evaluation.tasks.longbench import LONGBENCH, LongBench2

from .bench_doubles import CHAT, make_bench
from .evaluation_doubles import make_tokenizer

WORDS = "river stone lamp under over bright cold seven small quickly".split()


def row(number, words=60, **more):
    draw = random.Random(number)
    context = " ".join(draw.choices(WORDS, k=words))
    made = {"input": f"What is number {number}?", "context": context, "answers": [f"stone {number}", "a lamp"]}
    made |= {"length": words, "dataset": "x", "language": "en", "all_classes": None, "_id": str(number)}
    return made | more


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(each, ensure_ascii=False) + "\n" for each in rows), encoding="utf-8")
    return path


def lines(rows):
    return "".join(json.dumps(each) + "\n" for each in rows)


@pytest.fixture
def tokenizer():
    return make_tokenizer()


HotpotQA = LONGBENCH["longbench_hotpotqa"]


@pytest.mark.parametrize("layout", ["folder", "data", "archive", "the archive", "file", "datasets"])
def test_rows_are_read_from_every_layout(tmp_path, layout):
    rows = [row(1, input="line\u2028separator"), row(2)]
    source, split = tmp_path, None
    if layout == "folder":
        write(tmp_path / "hotpotqa.jsonl", rows)
    elif layout == "data":
        write(tmp_path / "data" / "hotpotqa.jsonl", rows)
    elif layout == "file":
        source = write(tmp_path / "any.jsonl", rows)
    elif layout == "datasets":
        write(tmp_path / "rows" / "h.jsonl", rows)
        split = "validation"
        config = {"config_name": "hotpotqa", "data_files": [{"split": split, "path": "rows/h.jsonl"}]}
        (tmp_path / "README.md").write_text("---\n" + yaml.safe_dump({"configs": [config]}) + "---\n")
    else:
        with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
            archive.writestr("data/hotpotqa.jsonl", lines(rows))
        source = tmp_path / "data.zip" if layout == "the archive" else tmp_path
    found = HotpotQA(source=str(source), split=split).rows()
    assert [(each["input"], each["answers"]) for each in found] == [(each["input"], each["answers"]) for each in rows]


def test_a_changed_file_is_read_again(tmp_path):
    path = write(tmp_path / "hotpotqa.jsonl", [row(1)])
    assert len(HotpotQA(source=str(tmp_path)).rows()) == 1
    write(path, [row(1), row(2)])
    os.utime(path, ns=(1, 1))
    assert len(HotpotQA(source=str(tmp_path)).rows()) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"has no hotpotqa.jsonl or data/hotpotqa.jsonl or data.zip"),
        ("", "has no rows"),
        ('{"context": "x"}\n{oops\n', "cannot be read"),
        ('{"context": "x", "question": "y"}\n', "has no answers, all_classes, length; it has context, question"),
    ],
)
def test_unusable_rows_are_errors(tmp_path, content, message):
    if content is not None:
        (tmp_path / "hotpotqa.jsonl").write_text(content)
    with pytest.raises(PePatchError, match=message):
        HotpotQA(source=str(tmp_path)).rows()


def test_a_missing_source_is_an_error(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub

    def absent(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", absent)
    with pytest.raises(PePatchError, match=r"'data.zip' of the data set 'THUDM/LongBench' .* Give source= a folder"):
        HotpotQA().rows()


# The questions


def test_every_row_is_one_whole_prompt(tmp_path, tokenizer):
    rows = [row(number) for number in range(5)]
    write(tmp_path / "hotpotqa.jsonl", rows)
    task = HotpotQA(source=str(tmp_path))
    questions = task.questions(make_bench(tokenizer, samples=50), 1500, None)
    assert len(questions) == 5  # all there are
    texts = [tokenizer.decode(question.prompt) for question in questions]
    for each in rows:
        (text,) = [text for text in texts if each["input"] in text]
        assert each["context"] in text and text.endswith("Answer:")
        question = questions[texts.index(text)]
        assert question.references == tuple(each["answers"]) and question.budget == 32
        bare = tokenizer.decode(question.without_context)
        assert each["context"] not in bare and each["input"] in bare
    assert questions[0].stamps == {"rows_in_data_set": 5}


def test_the_seed_chooses_the_rows(tmp_path, tokenizer):
    write(tmp_path / "hotpotqa.jsonl", [row(number) for number in range(40)])
    task = HotpotQA(source=str(tmp_path))

    def chosen(seed):
        return [question.references[0] for question in task.questions(make_bench(tokenizer, seed=seed), 1500, None)]

    assert chosen(0) == chosen(0) != chosen(1)
    assert len(set(chosen(0))) == 6


def test_longer_rows_are_an_error_with_their_number_and_remedies(tmp_path, tokenizer):
    write(tmp_path / "hotpotqa.jsonl", [row(number, words=600 if number % 3 == 0 else 60) for number in range(6)])
    with pytest.raises(PePatchError, match=r"2 of 6 rows are longer than 1000 .* skip_longer=True.* truncate='middle'"):
        HotpotQA(source=str(tmp_path)).questions(make_bench(tokenizer), 1000, None)
    task = HotpotQA(source=str(tmp_path), skip_longer=True)
    questions = task.questions(make_bench(tokenizer), 1000, None)
    assert questions[0].stamps == {"rows_in_data_set": 6, "rows_skipped_as_longer": 2}
    assert sorted(question.references[0] for question in questions) == [f"stone {number}" for number in (1, 2, 4, 5)]
    with pytest.raises(PePatchError, match="6 of 6 rows are longer than 100"):
        task.questions(make_bench(tokenizer), 100, None)


def test_a_cut_prompt_keeps_both_ends_and_the_row_reports_it(tmp_path, tokenizer):
    rows = [row(number, words=600 if number < 2 else 60) for number in range(4)]
    write(tmp_path / "hotpotqa.jsonl", rows)
    task = HotpotQA(source=str(tmp_path), truncate="middle")
    questions = task.questions(make_bench(tokenizer), 1000, None)
    sizes, lost = {}, 0
    for question in questions:
        number = int(question.references[0].split()[1])
        text, lead = task.prompt(rows[number])
        whole = tokenizer(text + lead)["input_ids"]
        sizes[number] = len(question.prompt)
        lost += len(whole) - len(question.prompt)
        if number >= 2:
            assert question.prompt.tolist() == whole
            continue
        # as the authors cut: half from the front, half from the back
        half = (1000 - 32 + 1) // 2 - 20
        assert question.prompt[:half].tolist() == whole[:half]
        assert question.prompt[-half:].tolist() == whole[-half:]
        assert 1000 - 8 <= len(question.prompt) + 32 - 1 <= 1000
    assert questions[0].stamps == {"rows_in_data_set": 4, "truncated": "middle", "prompts_cut": 2, "tokens_cut": lost}


def test_the_control_uses_the_same_rows_without_their_middle(tmp_path, tokenizer):
    write(tmp_path / "hotpotqa.jsonl", [row(number, words=120) for number in range(6)])
    task = HotpotQA(source=str(tmp_path))
    whole, cut = (task.questions(make_bench(tokenizer), 1500, None, within=within) for within in (None, 280))
    assert [each.references for each in whole] == [each.references for each in cut]
    assert max(len(each.prompt) + 31 for each in cut) <= 280 < min(len(each.prompt) for each in whole)
    with pytest.raises(PePatchError, match="leave nothing of a prompt"):
        task.questions(make_bench(tokenizer), 1500, None, within=100)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"truncate": "left"}, OptionError, "truncate must be None or 'middle', got 'left'"),
        ({"truncate": "middle", "skip_longer": True}, OptionError, "give one"),
        ({"wording": "offical"}, UnknownNameError, "Did you mean 'official'"),
    ],
)
def test_invalid_options_are_errors(options, error, message):
    with pytest.raises(error, match=message):
        HotpotQA(**options)


def test_the_chat_template_is_omitted_where_the_authors_omit_it(tmp_path):
    chatty = make_tokenizer(chat_template=CHAT)
    bench = make_bench(chatty, chat=True)
    for name in ("hotpotqa", "trec"):
        write(tmp_path / f"{name}.jsonl", [row(1, all_classes=["stone"])])
        (question,) = LONGBENCH[f"longbench_{name}"](source=str(tmp_path)).questions(bench, 1500, None)
        assert chatty.decode(question.prompt).startswith("<user>") == (name == "hotpotqa")


# The scores of rows


def run(task, bench, length=1500):
    (piece,) = task.work_units(bench, length)
    (found,) = piece.measure().rows
    return found


def test_only_the_first_line_counts_and_the_best_answer(tmp_path, tokenizer):
    classes = ["place", "place of birth", "number"]
    rows = [
        row(1, answers=["number"], all_classes=classes),
        row(2, answers=["place of birth", "number"], all_classes=classes),
    ]
    write(tmp_path / "trec.jsonl", rows)
    task = LONGBENCH["longbench_trec"](source=str(tmp_path), wording="own")
    assert task.score("\nnumber\nplace", ("number",)) == 1
    assert task.score("number, place", ("number",)) == 0.5
    assert task.score("place of birth", ("number", "place of birth")) == 1  # "place" is part of the right name
    measured = run(task, make_bench(tokenizer, answer=lambda question: question.references[0] + "\nand place"))
    assert measured.score == 1 and measured.samples == 2
    assert measured.details["stamps"]["label"] == "LongBench's data in other words"
    assert measured.text_hash != make_bench(tokenizer).corpus.hash


def test_a_row_is_called_longbench_only_in_the_official_wording(tmp_path, tokenizer):
    write(
        tmp_path / "qasper_e.jsonl", [row(1, length=3999), row(2, length=4000), row(3, length=8000), row(4, length=1)]
    )
    task = LONGBENCH["longbench_qasper_e"](source=str(tmp_path), wording="official", truncate="middle")
    right = {"stone 1", "stone 2"}
    bench = make_bench(tokenizer, answer=lambda each: each.references[0] if each.references[0] in right else "no")
    measured = run(task, bench, 4000)
    assert measured.details["stamps"]["label"] == "LongBench" and measured.score == 0.5
    assert measured.details["parts"] == {
        "0-4k": {"score": 0.5, "samples": 2},
        "4-8k": {"score": 1.0, "samples": 1},
        "8k+": {"score": 0.0, "samples": 1},
    }


# LongBench v2


def choice_row(number, answer, difficulty="easy", length="short"):
    made = {"_id": str(number), "domain": "d", "sub_domain": "s", "difficulty": difficulty, "length": length}
    made |= {f"choice_{letter}": f"choice {letter} of {number} " for letter in "ABCD"}
    return made | {
        "question": f" Which is {number}, $C_A$? ",
        "answer": answer,
        "context": f" text of {number} with $Q$ ",
    }


def test_longbench2_reports_its_parts(tmp_path, tokenizer):
    rows = [choice_row(1, "A"), choice_row(2, "B", "hard", "medium"), choice_row(3, "C", "hard", "long")]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    task = LongBench2(source=str(tmp_path))
    measured = run(task, make_bench(tokenizer, answer=lambda question: " (A) or so" if "text of 1" else ""), 1500)
    parts = measured.details["parts"]
    assert measured.score == pytest.approx(1 / 3)
    assert {name: (part["score"], part["samples"]) for name, part in parts.items()} == {
        "easy": (1, 1), "hard": (0, 2), "short": (1, 1), "medium": (0, 1), "long": (0, 1)
    }  # fmt: skip
    text = tokenizer.decode(task.questions(make_bench(tokenizer), 1500, None)[0].prompt)
    assert text.endswith("The correct answer is") and "with $Q$" in text


@pytest.mark.parametrize(
    ("given", "right"),
    [
        ("The correct answer is (B)", 1),
        ("So: **The correct answer is (B)**.", 1),
        ("The correct answer is B", 1),
        ("The correct answer is A. The correct answer is (B)", 1),  # brackets are looked for first
        ("The correct answer is (A), not (B)", 0),
        ("the correct answer is (B)", 0),
        ("(B)", 0),
        ("", 0),
    ],
)
def test_an_answer_must_use_the_authors_phrase(tmp_path, given, right):
    """Compare with the two regular expressions of the authors' pred.py."""
    file = tmp_path / "0shot.txt"
    file.write_text("$DOC$|$Q$|$C_A$|$C_B$|$C_C$|$C_D$")
    assert LongBench2(wording=str(file)).score(given, ("B",)) == right


def test_only_the_authors_prompt_file_gives_the_official_name(tmp_path):
    file = tmp_path / "0shot.txt"
    file.write_text("$DOC$|$Q$|$C_A$|$C_B$|$C_C$|$C_D$!")
    task = LongBench2(wording=str(file))
    text, lead = task.prompt(choice_row(7, "A"))
    choices = "|".join(f"choice {letter} of 7" for letter in "ABCD")
    assert (text, lead) == (f"text of 7 with $Q$|Which is 7, $C_A$?|{choices}!", "")
    assert task.label() == "LongBench v2's data in other words"
    file.write_text("$DOC$")
    with pytest.raises(OptionError, match=r"has no \$Q\$, \$C_A\$"):
        LongBench2(wording=str(file))
    with pytest.raises(OptionError, match="No installed package has the official wording"):
        LongBench2(wording="official")
