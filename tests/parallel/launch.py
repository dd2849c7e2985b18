"""A function on several processes that talk over gloo.

The processes are forked from a server that has the imports behind it, so that a launch takes a second and not ten.
"""

from __future__ import annotations

import io
import multiprocessing
import multiprocessing.connection
import os
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

TIMEOUT = 240.0
"""Seconds that a launch may take."""
CPU_ONLY = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def _worker(pipe: Any, function: Callable[..., Any], environment: dict[str, str], arguments: dict[str, Any]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        made = io.BytesIO()
        torch.save(function(**arguments), made)  # sent itself, a tensor would be shared memory that ends with this
        pipe.send((made.getvalue(), None))
    except BaseException:
        pipe.send((None, traceback.format_exc()))
        os._exit(1)  # peers may wait for this one for ever, and so would a tidy end
    time.sleep(TIMEOUT)  # until it is killed: peers may still be listening to this one


def on_processes(
    world: int, function: Callable[..., Any], environment: dict[str, str] | None = None, **arguments: Any
) -> list[Any]:
    """What `function(**arguments)` returns on each of `world` processes, by rank."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.parallel.preload"])
    before = {name: os.environ.get(name) for name in CPU_ONLY}
    os.environ.update(CPU_ONLY)  # the server inherits them when it starts
    port, running = str(_free_port()), []
    try:
        for rank in range(world):
            ours, theirs = context.Pipe(duplex=False)
            told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **(environment or {})}
            told |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            told |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
            process = context.Process(target=_worker, args=(theirs, function, told, arguments), daemon=True)
            process.start()
            theirs.close()
            running.append((process, ours))
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    try:
        return _gather(running)
    finally:
        for process, _ in running:
            process.kill()
            process.join()


def _gather(running: list[tuple[Any, Any]]) -> list[Any]:
    waiting = {pipe: rank for rank, (_, pipe) in enumerate(running)}
    results: dict[int, Any] = {}
    while waiting:
        ready = multiprocessing.connection.wait(list(waiting), timeout=TIMEOUT)
        assert ready, f"processes {sorted(waiting.values())} said nothing for {TIMEOUT} seconds"
        for pipe in ready:
            rank = waiting.pop(pipe)
            try:
                results[rank], failure = pipe.recv()
            except EOFError:
                failure = "it ended without a word"
            assert failure is None, f"process {rank}: {failure}"
    return [torch.load(io.BytesIO(results[rank]), weights_only=False) for rank in sorted(results)]
