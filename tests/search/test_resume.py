"""Check that a resumed search scores nothing twice and gives the result of an uninterrupted one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pe_patch.errors import OptionError, PePatchError
from pe_patch.search import Schedule
from pe_patch.search.objective import Objective

from .cases import SMALL, run

METHOD = "longrope2"
LINES = 3 + SMALL.candidates
FILES = ("search.jsonl", "best.json", "settings.json")


class Stopped(Exception):
    """An exception that stops a search."""


@pytest.fixture
def stop_at(monkeypatch):
    """Stop the search before its n-th score; the returned list has the scored candidates."""
    scored, real = [], Objective.__call__

    def call(self, scheme, **options):
        if len(scored) == stop.at:
            raise Stopped
        scored.append(scheme)
        return real(self, scheme, **options)

    def stop(at):
        stop.at = at
        scored.clear()
        return scored

    stop.at = None
    monkeypatch.setattr(Objective, "__call__", call)
    return stop


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Return the folder of an uninterrupted search."""
    folder = tmp_path_factory.mktemp("whole")
    result = run(METHOD, folder)
    lines = [json.loads(line) for line in (folder / "search.jsonl").read_text().splitlines()]
    assert [line["score"] for line in lines[3:]] == [scored.score for scored in result.history]
    assert [line["factors"] for line in lines[3:]] == [list(scored.factors) for scored in result.history]
    assert [line["baseline"] for line in lines[:3]] == ["linear", "ntk", "yarn"]
    assert [line["generation"] for line in lines[3:]] == [0] * 8 + [1] * 4 + [2] * 4
    assert json.loads((folder / "best.json").read_text()) == result.options
    assert (folder / "search.png").read_bytes().startswith(b"\x89PNG")
    return folder


def same(first: Path, second: Path) -> bool:
    return all((first / name).read_bytes() == (second / name).read_bytes() for name in FILES)


@pytest.mark.parametrize("at", [0, 7, 13, LINES - 1])
def test_a_stopped_search_ends_the_same(stop_at, whole, tmp_path, at):
    stop_at(at)
    with pytest.raises(Stopped):
        run(METHOD, tmp_path)
    if at < LINES - 1:
        with (tmp_path / "search.jsonl").open("a") as file:  # what a crash left of a line
            file.write('{"key": "12ab", "sco')
    scored = stop_at(None)
    run(METHOD, tmp_path)
    assert len(scored) == LINES - at and same(tmp_path, whole)


def test_a_finished_search_scores_nothing_again(stop_at, whole):
    before = {name: (whole / name).read_bytes() for name in FILES}
    stop_at(0)
    run(METHOD, whole)
    assert before == {name: (whole / name).read_bytes() for name in FILES}


KILLED = """
import os, signal
from pathlib import Path
from pe_patch.search.objective import Objective
from tests.search.cases import run
real, calls = Objective.__call__, []
def call(self, scheme, **options):
    calls.append(scheme)
    if len(calls) == 10:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, scheme, **options)
Objective.__call__ = call
run("longrope2", Path({folder!r}))
"""


def test_a_killed_search_ends_the_same(stop_at, whole, tmp_path):
    code = KILLED.format(folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], env=os.environ, check=False)
    assert done.returncode == -signal.SIGKILL
    assert len((tmp_path / "search.jsonl").read_text().splitlines()) == 9
    scored = stop_at(None)
    run(METHOD, tmp_path)
    assert len(scored) == LINES - 9 and same(tmp_path, whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"samples": 3}, "samples was 2 and is 3"),
        ({"schedule": Schedule(8, 3, 2, 2, 4)}, "iterations was 2 and is 3"),
        ({"text": ["".join(f"def f{i}(): return {i}\n" for i in range(999))]}, "text_hash was"),
        ({"method": "longrope"}, "method was 'longrope2' and is 'longrope'"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(whole, change, message):
    before = {name: (whole / name).read_bytes() for name in FILES}
    with pytest.raises(OptionError, match=message):
        run(**{"method": METHOD, "output": whole, **change})
    assert before == {name: (whole / name).read_bytes() for name in FILES}


def test_damaged_folders_are_refused(whole, tmp_path):
    (tmp_path / "search.jsonl").write_text('{"key": "a", "score": 1}\n')
    with pytest.raises(OptionError, match=r"without settings\.json"):
        run(METHOD, tmp_path)
    (tmp_path / "settings.json").write_bytes((whole / "settings.json").read_bytes())
    (tmp_path / "search.jsonl").write_text("no line of ours\n")
    with pytest.raises(PePatchError, match="line 1 is damaged"):
        run(METHOD, tmp_path)
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(OptionError, match="is damaged"):
        run(METHOD, tmp_path)
