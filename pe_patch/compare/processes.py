"""Run jobs in separate processes, a few in parallel. A job that crashes does not affect the others."""

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
"""Seconds between two progress updates."""


@dataclass(frozen=True)
class Job:
    """A call that writes its results to disk. An error is written to `failed`."""

    name: str
    call: Callable[..., None]
    arguments: tuple[Any, ...]
    failed: Path


def cores() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers(device: str | None) -> int:
    """Return the number of processes that fill the processors at the current number of threads; 1 on an accelerator."""
    on_processor = device == "cpu" or (device is None and not torch.cuda.is_available())
    return max(1, cores() // torch.get_num_threads()) if on_processor else 1


def run(jobs: Sequence[Job], workers: int, tick: Callable[[list[str]], None] = lambda running: None) -> None:
    """Run all jobs, at most `workers` in parallel, each in a new process. With 0 workers, run them in this process.

    An error in a job does not raise. The processes end with this one.

    Args:
        jobs: the jobs.
        workers: maximum number of parallel processes.
        tick: called at intervals with the names of the running jobs.
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
            for process in [process for process in running if not process.is_alive()]:
                job = running.pop(process)
                process.join()
                if process.exitcode and not job.failed.exists():
                    write_json(job.failed, {"reason": _exit_reason(process.exitcode)})
            tick([job.name for job in running.values()])
    finally:
        for process in running:
            process.terminate()
            process.join()


def _exit_reason(code: int) -> str:
    if code < 0:
        return f"the process was killed by signal {-code}" + (", possibly out of memory" if code == -9 else "")
    return f"the process ended with exit code {code}"


def _child(job: Job, threads: int) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    # A killed parent cannot end its children, so each child watches the parent.
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    torch.set_num_threads(threads)
    with _reported(job):
        job.call(*job.arguments)


@contextlib.contextmanager
def _reported(job: Job) -> Iterator[None]:
    """Write an error to the job's file instead of raising it, so that the other jobs continue."""
    job.failed.unlink(missing_ok=True)
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        write_json(job.failed, {"reason": reason, "traceback": traceback.format_exc()})
