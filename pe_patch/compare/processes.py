"""Pieces of work in processes of their own, a few at a time: one that dies takes no other with it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from .settings import write_json

POLL = 1.0
"""Seconds between two looks at how far everybody is."""


@dataclass(frozen=True)
class Job:
    """A call that leaves what it found on disk; what goes wrong with it is written to `failed`."""

    name: str
    call: Callable[..., None]
    arguments: tuple[Any, ...]
    failed: Path


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers(device: str | None) -> int:
    """As many processes as fill the processors at the present number of threads; one on an accelerator."""
    on_processor = device == "cpu" or (device is None and not torch.cuda.is_available())
    return max(1, cores() // torch.get_num_threads()) if on_processor else 1


def run(jobs: Sequence[Job], workers: int, tick: Callable[[list[str]], None] = lambda running: None) -> None:
    """Do all jobs, at most `workers` at a time, each in a fresh process; with 0, one after the other in this one.

    `tick` is called every now and then with the names of those that are running. Never raises for what goes wrong in
    a job. Processes started here end with this one.
    """
    if workers == 0:
        for job in jobs:
            tick([job.name])
            with _reported(job):
                job.call(*job.arguments)
        return
    context, threads = multiprocessing.get_context("spawn"), max(1, cores() // workers)
    waiting, running = list(jobs), {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                job = waiting.pop(0)
                process = context.Process(target=_child, args=(job, threads), daemon=True)
                process.start()
                running[process] = job
            wait([process.sentinel for process in running], timeout=POLL)
            for process in [one for one in running if not one.is_alive()]:
                job = running.pop(process)
                process.join()
                if process.exitcode and not job.failed.exists():
                    write_json(job.failed, {"reason": _death(process.exitcode)})
            tick([job.name for job in running.values()])
    finally:
        for process in running:
            process.terminate()
            process.join()


def _death(code: int) -> str:
    if code < 0:
        return f"the process was ended by signal {-code}" + (", as when memory runs out" if code == -9 else "")
    return f"the process ended with exit code {code}"


def _child(job: Job, threads: int) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    # a parent that is killed cannot end its children: they watch for it
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    torch.set_num_threads(threads)
    with _reported(job):
        job.call(*job.arguments)


@contextlib.contextmanager
def _reported(job: Job) -> Iterator[None]:
    """What goes wrong is written down in place of being raised: it must not lose the others."""
    job.failed.unlink(missing_ok=True)
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        write_json(job.failed, {"reason": reason, "traceback": traceback.format_exc()})
