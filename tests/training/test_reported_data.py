"""A run says what it skipped, finds ids that the model lacks, and does not continue on other text."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from pe_patch.training.measure import Measure
from pe_patch.training.recipe import RecipeError
from pe_patch.training.run import load_recipe, main, train

from .cases import logged

SHORT = ["phases.0.steps=2", "trackers=[]"]


@pytest.fixture
def folder(text: Path, tmp_path: Path) -> Path:
    return shutil.copytree(text, tmp_path / "own")


def test_plan_log_and_card_list_what_was_skipped(folder: Path, recipe_file: Path, tmp_path: Path, capsys: Any) -> None:
    (folder / "page.html").write_text("<p>")
    (folder / "empty.txt").write_text("")
    (folder / "tags.txt").write_text("the <eos> of the text " * 9)
    given = [*SHORT, f"data.source={folder}"]
    assert main([str(recipe_file), *given, "--dry-run"]) == 0
    plan = " ".join(capsys.readouterr().out.split())
    for _ in range(2):  # the second run reads the tokens from the cache
        train(load_recipe(recipe_file, [*given, "progress=true"]))
        shown = " ".join(capsys.readouterr().err.split())
        (event,) = logged(tmp_path / "run", "data")
        card = " ".join((tmp_path / "run/model/README.md").read_text().split())
        for words in (plan, shown, " ".join(event["notes"]), card):
            assert "1 skipped, .html is not a supported text format: page.html" in words
            assert "1 skipped, empty: empty.txt" in words
            assert "<eos> in 1" in words and "data.split_special_tokens=false" in words
            assert "Rows begin without a start token: the tokenizer adds none." in words


def test_the_plan_names_the_token_that_rows_begin_with(
    recipe_file: Path, model: Path, tmp_path: Path, capsys: Any
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.bos_token, tokenizer.add_bos_token = "<k1>", True
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    given = [str(recipe_file), *SHORT, f"tokenizer.source={tmp_path / 'tokenizer'}", "--dry-run"]
    assert main(given) == 0
    assert "Every row begins with <k1>" in " ".join(capsys.readouterr().out.split())
    assert main([*given, "data.bos=false"]) == 0
    assert "without a start token: data.bos is false" in " ".join(capsys.readouterr().out.split())


def test_ids_beyond_the_embedding_are_found_before_the_first_step(
    folder: Path, recipe_file: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    size = len(tokenizer)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    monkeypatch.setattr("pe_patch.training.run.Run.run", lambda self: pytest.fail("it was started"))
    given = [str(recipe_file), *SHORT, f"data.source={folder}", f"tokenizer.source={tmp_path / 'tokenizer'}"]
    assert main([*given, "--dry-run"]) == 0  # the text does not use it
    capsys.readouterr()
    number = next(number for number in range(200, 300) if not _held_out(f"{number}.txt"))
    (folder / f"{number}.txt").write_text("an <extra> token")
    for more in ([], ["--dry-run"]):
        assert main([*given, *more]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert "'<extra>'" in said and f"id {size}" in said and f"{size} rows" in said
        assert "resize_token_embeddings" in said and "Traceback" not in said


def test_ids_beyond_the_embedding_are_found_in_held_out_text(
    folder: Path, recipe_file: Path, model: Path, tmp_path: Path, capsys: Any
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    number = next(number for number in range(200, 400) if _held_out(f"{number}.txt"))
    (folder / f"{number}.txt").write_text("an <extra> token")
    (folder / f"{number}.html").write_text("")
    evaluation = "evaluation={every: 1, tasks: [perplexity], lengths: [64], samples: 2}"
    given = [str(recipe_file), *SHORT, f"data.source={folder}", f"tokenizer.source={tmp_path / 'tokenizer'}"]
    assert main([*given, evaluation, "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert "'<extra>' in the held-out text" in said and "resize_token_embeddings" in said


def test_what_is_skipped_of_the_held_out_text_is_listed_too(folder: Path, recipe_file: Path, capsys: Any) -> None:
    number = next(number for number in range(200, 400) if _held_out(f"{number}.txt"))
    (folder / f"{number}.txt").write_text(" ")
    evaluation = "evaluation={every: 1, tasks: [perplexity], lengths: [64], samples: 2}"
    assert main([str(recipe_file), *SHORT, f"data.source={folder}", evaluation, "--dry-run"]) == 0
    assert f"1 skipped, empty: {number}.txt" in " ".join(capsys.readouterr().out.split())


def test_retrieval_tokens_that_the_model_lacks_are_found(
    recipe_file: Path, tmp_path: Path, text: Path, capsys: Any
) -> None:
    from pe_patch.training.models import train_tokenizer

    plain: Any = train_tokenizer([path.read_text() for path in sorted(text.iterdir())], 280)
    plain.save_pretrained(tmp_path / "tokenizer")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    fields = ", ".join(f"{key}: {value}" for key, value in {**sizes, "vocab_size": 408}.items())
    given = ["tokenizer.retrieval_tokens=true", f"model={{config: {{model_type: llama, {fields}}}}}"]
    # A fresh model has all rows. A saved one that knows the plain vocabulary alone has not.
    told = [str(recipe_file), *SHORT, "model.source=null", *given, f"tokenizer.source={tmp_path / 'tokenizer'}"]
    assert main([*told, "--dry-run"]) == 0
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=280, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "small")
    plain.save_pretrained(tmp_path / "small")
    capsys.readouterr()
    assert main([str(recipe_file), *SHORT, f"model.source={tmp_path / 'small'}", given[0], "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert "retrieval_tokens" in said and "280 rows" in said


def _held_out(name: str) -> bool:
    import hashlib

    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 100 < 10


# Resuming on other text


CHANGES = {
    "edited": (lambda folder: (folder / "003.txt").write_text("another text"), "edited 003.txt"),
    "deleted": (lambda folder: (folder / "007.txt").unlink(), "deleted 007.txt"),
    "added": (lambda folder: (folder / "500.txt").write_text("one more"), "added 500.txt"),
    "replaced": (lambda folder: [path.write_text("other") for path in folder.iterdir()], "and 115 more"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_does_not_resume_on_other_text(
    change: str, folder: Path, recipe_file: Path, tmp_path: Path, capsys: Any
) -> None:
    given = [str(recipe_file), "trackers=[]", "phases.0.steps=4", "checkpoints.every=2", f"data.source={folder}"]
    assert main(given) == 0
    if change == "edited":
        assert main([*given, "resume=auto"]) == 0  # nothing changed
    make, words = CHANGES[change]
    make(folder)
    capsys.readouterr()
    assert main([*given, "resume=auto"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "training data has changed" in said and words in said and "accept_changed_data=true" in said
    if change != "replaced":
        assert said.count(".txt") == 1  # no other file is named
    if change == "edited":
        assert main([*given, "resume=auto", "accept_changed_data=true"]) == 0
        assert main([*given, "resume=auto"]) == 0  # the accepted text is now that of the run


def test_a_run_does_not_resume_with_another_tokenizer(
    recipe_file: Path, model: Path, tmp_path: Path, capsys: Any
) -> None:
    own = shutil.copytree(model, tmp_path / "base")
    given = [str(recipe_file), "trackers=[]", "phases.0.steps=2", "checkpoints.every=2", f"model.source={own}"]
    assert main(given) == 0
    tokenizer = AutoTokenizer.from_pretrained(own)
    tokenizer.eos_token = "<k0>"
    tokenizer.save_pretrained(own)
    capsys.readouterr()
    assert main([*given, "resume=auto"]) == 2
    assert "the tokenizer differs" in capsys.readouterr().err


# Streaming


def test_an_evaluation_streams_what_it_needs_of_a_hub_data_set(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A test split without end: a list of it would never be done, and a download neither."""
    import datasets

    drawn = {"train": 0, "test": 0}

    def rows(split: str, count: int) -> Iterator[dict[str, str]]:
        for number in range(count):
            drawn[split] += 1
            yield {"text": f"{number} " + "the a for while return import class " * 6}

    def load_dataset(name: str, streaming: bool) -> Any:
        assert streaming, "a download"
        return datasets.IterableDatasetDict(
            {
                split: datasets.IterableDataset.from_generator(rows, gen_kwargs={"split": split, "count": count})
                for split, count in {"train": 50, "test": 10**9}.items()
            }
        )

    class Builder:
        hash = "5f0c"

    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name: Builder)
    monkeypatch.setattr("pe_patch.evaluation.corpus.TOKEN_LIMIT", 1_000)
    evaluations: list[int] = []
    inner = Measure.during

    def during(self: Any, *given: Any) -> None:
        evaluations.append(given[-1])
        inner(self, *given)

    monkeypatch.setattr(Measure, "during", during)
    train(load_recipe(recipe_file, [
        *SHORT, "data.source=someone/books", "data.streaming=true",
        "evaluation={every: 1, tasks: [perplexity], lengths: [64], samples: 2}",
    ]))  # fmt: skip
    assert len(evaluations) == 2 and drawn["train"] == 50 and 0 < drawn["test"] < 100


def test_a_run_with_evaluations_reads_a_folder_about_twice(
    folder: Path, recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once to hash the files, and once to tokenise or to evaluate each of them."""
    import builtins
    import io

    reads: list[str] = []
    inner = io.open

    def opened(path: Any, *given: Any, **more: Any) -> Any:
        if str(path).startswith(str(folder)):
            reads.append(str(path))
        return inner(path, *given, **more)

    monkeypatch.setattr(io, "open", opened)
    monkeypatch.setattr(builtins, "open", opened)
    count = len(list(folder.iterdir()))
    train(load_recipe(recipe_file, [
        "trackers=[]", "phases.0.steps=5", f"data.source={folder}",
        "evaluation={every: 1, tasks: [perplexity], lengths: [64], samples: 2}",
    ]))  # fmt: skip
    assert 0 < len(reads) <= 3 * count + 10


def test_the_recipe_passes_encodings_on(folder: Path, recipe_file: Path) -> None:
    (folder / "001.txt").write_bytes("né en été".encode("cp1252"))
    given = [*SHORT, f"data.source={folder}"]
    with pytest.raises(Exception, match=r"001\.txt, line 1.*data\.encoding"):
        train(load_recipe(recipe_file, given))
    for option in ("data.encoding=cp1252", "data.skip_unreadable=true"):
        train(load_recipe(recipe_file, [*given, option]))
    with pytest.raises(RecipeError, match="encoding"):
        load_recipe(recipe_file, ["data.encodings=cp1252"])
