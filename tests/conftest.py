from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read at import; without it, tests wait for a network that is not needed

import torch

PRINTED: list[str] = []
"""The matrix as lines, from whichever process ran it."""


def pytest_addoption(parser):
    parser.addoption(
        "--compile-all",
        action="store_true",
        help="compile a full pass and a decoding step in every cell of the matrix; by default each scheme on two "
        "families",
    )
    parser.addoption(
        "--all-lines",
        action="store_true",
        help="interrupt patching and undoing at every line; by default at a few of each operation",
    )


def pytest_configure(config):
    if hasattr(config, "workerinput"):  # processes side by side share the cores
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // config.workerinput["workercount"]))


def matrix_lines(config) -> list[str]:
    matrix = sys.modules.get("tests.matrix")
    if matrix is None or not matrix.OUTCOMES:
        return []
    return [*matrix.plain(), matrix.legend(config.getoption("--compile-all"))]


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["matrix"] = matrix_lines(session.config)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    PRINTED.extend(getattr(node, "workeroutput", {}).get("matrix", []))


def pytest_terminal_summary(terminalreporter, config):
    lines = PRINTED or matrix_lines(config)
    if lines:
        terminalreporter.section("matrix")
        for line in lines:
            terminalreporter.write_line(line)


@pytest.fixture
def absorbing(monkeypatch) -> list[int]:
    """New tokens of each pass through a layer that was absorbed."""
    from pe_patch.mla import attention

    seen: list[int] = []
    real = attention.absorbed

    def spy(heads, query, *rest):
        seen.append(query.shape[2])
        return real(heads, query, *rest)

    monkeypatch.setattr(attention, "absorbed", spy)
    return seen


@pytest.fixture(autouse=True)
def _graphs_of_one_test() -> Iterator[None]:
    """Drop compiled graphs after each test: models of one class share their code and its limit of recompilations."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(autouse=True, scope="session")
def _cache_of_their_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What training keeps of a text goes to a folder that is thrown away, in child processes too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def run(capsys):
    """Return a function that runs `pe-patch` on some words and returns exit code, output and errors."""
    from pe_patch.cli.main import main

    def call(*words):
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return call
