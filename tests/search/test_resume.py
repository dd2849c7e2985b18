"""A search that is stopped goes on, scores nothing twice and ends as one that was not."""

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
    """The end of the world, as far as a search can tell."""


@pytest.fixture
def stop_at(monkeypatch):
    """Let the search stop when it is about to score for the n-th time; the list counts what was scored."""
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
    """The folder of an uninterrupted search."""
    folder = tmp_path_factory.mktemp("whole")
    result = run(METHOD, folder)
    lines = [json.loads(line) for line in (folder / "search.jsonl").read_text().splitlines()]
    assert [line["score"] for line in lines[3:]] == [one.score for one in result.history]
    assert [line["factors"] for line in lines[3:]] == [list(one.factors) for one in result.history]
    assert [line["baseline"] for line in lines[:3]] == ["linear", "ntk", "yarn"]
    assert [line["generation"] for line in lines[3:]] == [0] * 8 + [1] * 4 + [2] * 4
    assert json.loads((folder / "best.json").read_text()) == result.options
    assert (folder / "search.png").read_bytes().startswith(b"\x89PNG")
    return folder


def same(one: Path, other: Path) -> bool:
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in FILES)


@pytest.mark.parametrize("at", [0, 7, 13, LINES - 1])
def test_one_that_was_stopped_ends_the_same(stop_at, whole, tmp_path, at):
    stop_at(at)
    with pytest.raises(Stopped):
        run(METHOD, tmp_path)
    if at < LINES - 1:
        with (tmp_path / "search.jsonl").open("a") as file:  # what a crash left of a line
            file.write('{"key": "12ab", "sco')
    scored = stop_at(None)
    run(METHOD, tmp_path)
    assert len(scored) == LINES - at and same(tmp_path, whole)


def test_one_that_was_done_scores_nothing(stop_at, whole):
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


def test_one_that_was_killed_ends_the_same(stop_at, whole, tmp_path):
    code = KILLED.format(folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], env=os.environ, check=False)
    assert done.returncode == -signal.SIGKILL
    assert len((tmp_path / "search.jsonl").read_text().splitlines()) == 9
    scored = stop_at(None)
    run(METHOD, tmp_path)
    assert len(scored) == LINES - 9 and same(tmp_path, whole)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"samples": 3}, "samples was 2 and is 3"),
        ({"schedule": Schedule(8, 3, 2, 2, 4)}, "iterations was 2 and is 3"),
        ({"text": ["".join(f"def f{i}(): return {i}\n" for i in range(999))]}, "text_hash was"),
        ({"method": "longrope"}, "method was 'longrope2' and is 'longrope'"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(whole, change, named):
    before = {name: (whole / name).read_bytes() for name in FILES}
    with pytest.raises(OptionError, match=named):
        run(**{"method": METHOD, "output": whole, **change})
    assert before == {name: (whole / name).read_bytes() for name in FILES}


def test_folders_that_are_damaged_are_refused(whole, tmp_path):
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
