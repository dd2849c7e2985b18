"""Run every snippet about evaluation in README and docs unchanged, on a tiny model at shorter lengths."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from pe_patch import evaluation
from pe_patch.cli.main import main

from .evaluation_doubles import make_text, tiny_llama
from .ruler_cases import make_tokenizer
from .test_longbench_rows import row, write

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/evaluation.md")
SHORTER = {"4096": "2048", "8192": "2048", "16384": "3000", "32768": "4096"}


def test_commands_do_not_need_a_clone():
    pages = [path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))]
    commands = [line for page in pages for line in page.splitlines() if "pe-patch " in line or "pe_patch." in line]
    assert len(commands) > 50 and not [line for line in commands if "pe_patch/assets" in line]


def blocks(language):
    found = []
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        found += [(page, block) for block in re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)]
    return found


COMMANDS = [
    pytest.param(shlex.split(line, comments=True)[1:], id=f"{page}: {line.partition('#')[0].strip()[:70]}")
    for page, block in blocks("bash")
    for line in block.splitlines()
    if line.startswith("pe-patch evaluate") and "--harness" not in line
]
SNIPPETS = [
    pytest.param(block, id=f"{page}: {block[:40]!r}")
    for page, block in blocks("python")
    if "evaluate(model, tokenizer" in block and "from pe_patch import describe" not in block
]


@pytest.fixture(scope="module")
def model():
    return tiny_llama(len(make_tokenizer()), window=8192)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def corpus():
    return [make_text(3000, seed) for seed in range(2)]


def test_there_are_snippets():
    assert len(COMMANDS) >= 4 and SNIPPETS


@pytest.mark.parametrize("block", SNIPPETS)
def test_python_snippets_run(block, model, corpus, monkeypatch, tmp_path):
    real, calls = evaluation.evaluate, []

    def dry(*given, lengths, samples=50, output=None, **options):
        shorter = [int(SHORTER.get(str(length), length)) for length in lengths]
        calls.append(real(*given, shorter, samples=2, text=corpus, dry_run=True, progress=False, **options))
        return calls[-1]

    import pe_patch

    monkeypatch.setattr(pe_patch, "evaluate", dry, raising=False)
    first = block.split("print(results)")[0]
    exec(compile(first, "docs", "exec"), {"model": model, "tokenizer": make_tokenizer()})
    assert calls and set(calls[0].config["plan"]) >= {"niah_single_1", "vt", "perplexity"}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run(command, folder, corpus, tmp_path, capsys):
    from pe_patch.evaluation.tasks import find_tasks

    text = tmp_path / "text"
    text.mkdir()
    for number, document in enumerate(corpus):
        (text / f"{number}.txt").write_text(document)
    names = find_tasks(["longbench"]) if "longbench" in command else []
    for task in names:
        answers = ["Paragraph 3", "段落3"][task.data_name.endswith("zh")]
        written = row(1, all_classes=["stone"], answers=[answers])
        write(tmp_path / "rows" / f"{task.data_name}.jsonl", [written])
    given = [SHORTER.get(word, word).replace("path/to/folder", str(tmp_path / "rows")) for word in command]
    given = [str(folder) if word == "MODEL" else word for word in given if word != "--chat"]
    if "--output" in given:
        given[given.index("--output") + 1] = str(tmp_path / "out")
    given += [
        "--samples",
        "2",
        "--text",
        str(text),
        "--dtype",
        "float32",
        *([] if "--dry-run" in given else ["--dry-run"]),
    ]
    code = main(given)
    shown = capsys.readouterr()
    assert code == 0, shown.err
    assert "To read, controls included" in shown.out
