"""Run functions of the tests in processes of ``torch.distributed``, one function after the other.

Starting a process costs seconds, so many tests share a pool. A test that breaks the pool causes a new pool.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

# A rank that waits longer than this many seconds fails; a test that passes never waits so long.
TIMEOUT = 60
_CONTEXT = multiprocessing.get_context("forkserver")
# What takes each process seconds to import is imported once, and each process is a fork of the one that did.
_CONTEXT.set_forkserver_preload(
    ["tests.distributed.cases", "torch.distributed.fsdp", "torch._dynamo", "dp_accounting"]
)


class Failed(AssertionError):
    """This error says that a function failed on a rank."""


def _serve(rank: int, size: int, folder: str, pipe: Connection, timeout: float) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout),
    )
    while (task := pipe.recv()) is not None:
        function, arguments = task
        try:
            pipe.send((True, function(rank, size, *arguments)))
        except BaseException as error:  # The parent must also learn of errors that end a process.
            pipe.send((False, (type(error).__name__, str(error), traceback.format_exc())))
    dist.destroy_process_group()


class Processes:
    """This class holds processes that train together.

    Args:
        size: Number of processes.
        timeout: Seconds that a rank waits for another rank.
    """

    def __init__(self, size: int, timeout: float = TIMEOUT) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.broken = False
        self._pipes: list[Connection] = []
        self.processes = []
        for rank in range(size):
            ours, theirs = _CONTEXT.Pipe()
            arguments = (rank, size, self._folder.name, theirs, timeout)
            process = _CONTEXT.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self.processes.append(process)

    def outcomes(self, function: Callable[..., Any], *arguments: Any) -> list[tuple[bool, Any]]:
        """Return for each rank whether ``function(rank, size, *arguments)`` succeeded, and its result or error."""
        for pipe in self._pipes:
            pipe.send((function, arguments))
        found = []
        for pipe in self._pipes:
            try:
                found.append(pipe.recv() if pipe.poll(4 * TIMEOUT) else (False, ("hang", "", "")))
            except EOFError:
                found.append((False, ("dead", "", "")))
        failures = [error for good, error in found if not good]
        alike = len(failures) == len(found) and len({error[0] for error in failures}) == 1
        lost = any(kind in ("hang", "dead") or "reach" in text for kind, text, _ in failures)
        if failures and (lost or not alike):
            self.broken = True  # a rank may still be inside of a collective
        return found

    def outcome_of_first(self, function: Callable[..., Any], *arguments: Any) -> tuple[bool, Any]:
        """Return the first rank's outcome without waiting for other ranks; the pool cannot be used afterwards."""
        self.broken = True
        for pipe in self._pipes:
            pipe.send((function, arguments))
        found: tuple[bool, Any] = self._pipes[0].recv()
        return found

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Return the results of all ranks."""
        found = self.outcomes(function, *arguments)
        for rank, (good, result) in enumerate(found):
            if not good:
                raise Failed(f"rank {rank}: {result[2] or result[0]}")
        return [result for _, result in found]

    def close(self) -> None:
        for pipe, process in zip(self._pipes, self.processes, strict=True):
            if process.is_alive() and not self.broken:
                pipe.send(None)
            else:
                process.kill()
            process.join()
        self._folder.cleanup()
