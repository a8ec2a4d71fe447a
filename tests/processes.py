"""Several processes for a test: forked from a server that has imported torch, each running a function of the test's."""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from multistage_diffusion.distributed import World, join

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["multistage_diffusion.workflow", "multistage_diffusion.console"])


class Processes:
    """A world of `size` processes that run work(world, *args).

    Attributes:
        processes: of the ranks, in order.
    """

    def __init__(self, size: int, work: Callable[..., Any], *args: Any, patience: float = 20.0) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.processes, self._results = [], []
        self._errors = Path(tempfile.mkdtemp()) / "errors"
        for rank in range(size):
            receive, send = _CONTEXT.Pipe(duplex=False)
            process = _CONTEXT.Process(
                target=_main, args=(rank, size, port, patience, self._errors, send, work, args), daemon=True
            )
            process.start()
            send.close()
            self.processes.append(process)
            self._results.append(receive)

    def errors(self) -> list[str]:
        """Return the lines that the processes wrote to standard error."""
        return self._errors.read_text().splitlines()

    def results(self, timeout: float = 100.0) -> list[Any]:
        """Return what each process returned, the exception it raised, or None if it died."""
        found = []
        for process, receive in zip(self.processes, self._results, strict=True):
            try:
                found.append(receive.recv() if receive.poll(timeout) else TimeoutError(f"{process.name} is not done"))
            except EOFError:
                found.append(None)
        for process in self.processes:
            process.join(timeout)
            process.kill()
        return found


def run(size: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """Return what work(world, *args) returns on each of `size` processes.

    Raises:
        AssertionError: if one raises or dies.
    """
    results = Processes(size, work, *args).results()
    for rank, result in enumerate(results):
        assert not isinstance(result, BaseException), f"rank {rank}: {result!r}\n{getattr(result, '__notes__', '')}"
    return results


def _main(
    rank: int,
    size: int,
    port: int,
    patience: float,
    errors: Path,
    send: Connection,
    work: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    with errors.open("a") as file:
        os.dup2(file.fileno(), 2)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank}
    os.environ |= {name: str(value) for name, value in address.items()}
    world: World | None = None
    try:
        world = join(torch.device("cpu"), patience=patience)
        with world.report_failures():
            send.send(work(world, *args))
    except BaseException as error:
        error.add_note(traceback.format_exc())
        send.send(error)
    finally:
        if world is not None:
            world.close()
