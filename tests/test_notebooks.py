"""The notebooks run from the first cell to the last, and what is stored in them is clean."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="the notebooks need pe_patch[notebooks]")
nbclient = pytest.importorskip("nbclient", reason="the notebooks need pe_patch[notebooks]")

from jupyter_client.kernelspec import KernelSpec  # noqa: E402
from jupyter_client.manager import AsyncKernelManager  # noqa: E402

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "notebooks"
NAMES = ["quickstart", "tour", "new_scheme", "new_architecture", "context_extension"]
LIMIT_ALL = 2_000_000
"""Bytes of all notebooks together."""


class ThisInterpreter(AsyncKernelManager):
    """A kernel in the interpreter that runs the tests, whatever kernels are installed on the machine."""

    @property
    def kernel_spec(self) -> KernelSpec:
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=command, display_name="Python 3", language="python")


def read(name: str):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_the_folder_holds_these_and_no_others():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == sorted(NAMES)


LONG = ("context_extension", "new_scheme", "tour")
"""Notebooks that take longest; what they call is tested elsewhere."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.thorough) if name in LONG else name for name in NAMES]
)
def test_runs_in_the_quick_setting(name, tmp_path, monkeypatch):
    """Every cell, in a folder that holds nothing, without a network; the notebooks assert what they claim."""
    monkeypatch.setenv("PE_PATCH_QUICK", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))  # a user's start-up files are none of ours
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook, work = read(name), tmp_path / "work"
    work.mkdir()
    client = nbclient.NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        kernel_manager_class=ThisInterpreter,
        resources={"metadata": {"path": str(work)}},
    )
    client.execute()
    executed = code(notebook)
    assert all(cell.execution_count for cell in executed)
    assert not [output for cell in executed for output in cell.outputs if output.output_type == "error"]


@pytest.mark.parametrize("name", NAMES)
def test_stored_outputs_are_those_of_one_whole_run(name):
    notebook = read(name)
    nbformat.validate(notebook)
    cells = code(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert sum(bool(cell.outputs) for cell in cells) >= 4
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    assert all(not cell.metadata for cell in notebook.cells)  # no times of execution


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_the_machine_is_stored(name):
    """No absolute path, not even in a warning, and no name of a user."""
    stored = (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8")
    texts = re.sub(r'"image/png": "[^"]*"', "", stored)
    found = re.findall(r"(?:/tmp/|/home/|/root/|/work/|/Users/|/usr/lib/|\.venv|site-packages|ipykernel_\d)\S*", texts)
    assert not found


def test_quick_says_what_it_makes_small():
    """One switch, read in one line, with both settings beside each other."""
    for name in NAMES:
        first = code(read(name))[0].source
        if "QUICK" in first:
            assert first.count("PE_PATCH_QUICK") == 1
            assert re.search(r"= .+ if QUICK else .+  # ", first), name
        sources = "\n".join(cell.source for cell in code(read(name)))
        assert sources.count("PE_PATCH_QUICK") == first.count("PE_PATCH_QUICK")


def test_notebooks_are_small():
    assert sum(path.stat().st_size for path in FOLDER.glob("*.ipynb")) < LIMIT_ALL
