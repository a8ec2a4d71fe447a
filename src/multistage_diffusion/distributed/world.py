"""The processes of a job and the communication between them.

torchrun starts the processes and sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; another launcher can
set them, too. Tensors go through process groups (gloo for the CPU, NCCL for CUDA). JSON objects go through the store.
Nothing is pickled.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed.rendezvous import rendezvous

from ..errors import NotFiniteError, UserError
from .heartbeat import PATIENCE, Heartbeat, RankLost

_LOG = logging.getLogger(__name__)
_FOREVER = timedelta(days=7)  # timeout when waiting for a live process
NOTICE = 20.0  # seconds of waiting for other processes to join before a warning is logged
GOODBYE = 30.0  # seconds that rank 0, which may host the store, waits at exit for the other processes to leave
Reduction = Literal["sum", "max"]
_OPERATIONS: dict[Reduction, dist.ReduceOp.RedOpType] = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}
ErrorType = TypeVar("ErrorType", bound=BaseException)
T = TypeVar("T")
_MENDABLE = (NotFiniteError, UserError, ValueError, OSError, FloatingPointError)  # the first match is reported
_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def share(count: int, place: int, places: int) -> range:
    """Return part `place` of range(count) divided into `places` consecutive, almost equal parts."""
    return range(count * place // places, count * (place + 1) // places)


class World:
    """The processes of a job; a single process communicates nothing.

    Attributes:
        rank: rank of this process.
        size: number of processes.
    """

    def __init__(self, rank: int = 0, size: int = 1, store: Store | None = None) -> None:
        self.rank, self.size = rank, size
        self._store, self._turn = store, 0
        self._heart: Heartbeat | None = None
        self._shared: BaseException | None = None  # an error that the others need not be informed of
        self._failed = False

    @property
    def is_main_process(self) -> bool:
        """Whether this is rank 0, which writes files and prints messages."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Return this process's part of range(count); see the function `share`."""
        return share(count, self.rank, self.size)

    # -- JSON objects --------------------------------------------------------------------------------------------------

    def all_gather_object(self, value: Any) -> list[Any]:
        """Return the JSON-serialisable values of all processes, by rank."""
        if self._store is None:
            if self.size > 1:
                raise UserError("this world has no store to exchange words through; make it with distributed.join")
            return [value]
        self._turn += 1
        with self.translate_errors():
            self._store.set(f"word/{self._turn}/{self.rank}", json.dumps(value))
            keys = [f"word/{self._turn}/{rank}" for rank in range(self.size)]
            self._store.wait(keys, _FOREVER)
            values = [json.loads(self._store.get(key)) for key in keys]
            # every process has reached this turn, so all have read the values of the previous turn
            if self._turn > 1:
                self._store.delete_key(f"word/{self._turn - 1}/{self.rank}")
        return values

    def broadcast_object(self, value: Any) -> Any:
        """Return the JSON-serialisable value of rank 0."""
        return self.all_gather_object(value if self.is_main_process else None)[0]

    @contextmanager
    def synchronize_errors(self) -> Iterator[None]:
        """Wait for all processes at the end of the block; if one raised a user-fixable error, all raise an error.

        The block must not communicate.

        Raises:
            UserError, ValueError, OSError, FloatingPointError: the process's own error, or else that of the first rank
                that failed, prefixed with this rank; there, an OSError with an errno becomes a UserError.
        """
        error: Exception | None = None
        try:
            yield
        except RankLost:
            raise
        except _MENDABLE as raised:
            error = raised
        if self._store is None and error is not None:
            raise error
        kinds = [isinstance(error, kind) for kind in _MENDABLE]
        number = error.errno if isinstance(error, OSError) else None
        told = self.all_gather_object(None if error is None else [kinds.index(True), number, str(error)])
        if error is not None:
            raise self.known_to_all(error)
        for rank, failure in enumerate(told):
            if failure is not None:
                kind, number, text = failure
                words = f"rank {rank}: {text}"
                # an OSError with an errno is not a bug of this package, so raise a UserError
                raise self.known_to_all(_MENDABLE[kind](words) if number is None else UserError(words))

    def require_equal(self, facts: dict[str, Any]) -> None:
        """Raise UserError on all processes if facts (JSON) differ; the message names the first difference."""
        told = self.all_gather_object(facts)
        names = list(dict.fromkeys(name for theirs in told for name in theirs))
        for rank, theirs in enumerate(told):
            for name in names:
                if theirs.get(name) != told[0].get(name):
                    error = UserError(
                        f"rank {rank} has {name} {theirs.get(name)!r}, rank 0 {told[0].get(name)!r}; all processes must run "
                        "the same release on the same data with the same configuration"
                    )
                    raise self.known_to_all(error)

    def known_to_all(self, error: ErrorType) -> ErrorType:
        """Mark an error as raised on all processes, so that `report_failures` does not report it; return it."""
        self._shared = error
        return error

    # -- tensors -------------------------------------------------------------------------------------------------------

    def group(self, ranks: Sequence[int]) -> dist.ProcessGroup | None:
        """Return a process group, None for fewer than two ranks; all processes must call this in the same order."""
        if len(ranks) < 2:
            return None
        if len(ranks) == self.size:
            return dist.group.WORLD
        with self.translate_errors():
            made = dist.new_group(list(ranks))
        return made if isinstance(made, dist.ProcessGroup) else None

    def all_reduce(self, values: Tensor, how: Reduction = "sum") -> Tensor:
        """Reduce a tensor in place to the sum or maximum over all processes, bit-identical on all, and return it."""
        if self.size > 1:
            with self.translate_errors():
                dist.all_reduce(values, _OPERATIONS[how])
        return values

    def all_gather(self, values: Tensor) -> list[Tensor]:
        """Return the tensors of all processes, by rank; all must have the same shape, dtype and device type."""
        if self.size == 1:
            return [values]
        parts = [torch.empty_like(values) for _ in range(self.size)]
        with self.translate_errors():
            dist.all_gather(parts, values.contiguous())
        return parts

    def all_reduce_within(self, values: Tensor, how: Reduction, group: dist.ProcessGroup | None) -> None:
        """Reduce values in place to the sum or maximum over a group (see `group`); None: leave them unchanged."""
        if group is not None:
            with self.translate_errors():
                dist.all_reduce(values, _OPERATIONS[how], group=group)

    def broadcast(self, values: Tensor, source: int) -> Tensor:
        """Overwrite a tensor with that of rank `source` and return it."""
        if self.size > 1:
            with self.translate_errors():
                dist.broadcast(values, source)
        return values

    def gather_named(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the named tensors of all processes on rank 0, on the CPU; an empty dict on the others."""
        found = {name: t.detach().cpu() for name, t in tensors.items()} if self.is_main_process else {}
        if self.size == 1:
            return found
        lists = self.all_gather_object(
            [[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors.items()]
        )
        with self.translate_errors():
            for rank, names in enumerate(lists[1:], start=1):
                for name, dtype, shape in names:
                    if self.is_main_process:
                        found[name] = torch.empty(shape, dtype=getattr(torch, dtype))
                        dist.recv(found[name], rank)
                    elif self.rank == rank:
                        dist.send(tensors[name].detach().cpu().contiguous(), 0)
        return found

    def all_gather_rows(self, rows: Tensor) -> Tensor:
        """Return the concatenated rows of all processes in rank order, on the CPU, on every process.

        Args:
            rows: (N, ...) of this process, on any device; if N is 0, the other dimensions and the dtype are ignored.
        """
        rows = rows.cpu().contiguous()
        if self.size == 1:
            return rows
        told = self.all_gather_object([list(rows.shape), str(rows.dtype).removeprefix("torch.")])
        parts = [
            self.broadcast(rows if rank == self.rank else torch.empty(shape, dtype=getattr(torch, dtype)), rank)
            for rank, (shape, dtype) in enumerate(told)
            if shape[0]
        ]
        return torch.cat(parts) if parts else rows

    # -- failures ------------------------------------------------------------------------------------------------------

    @contextmanager
    def translate_errors(self) -> Iterator[None]:
        """Convert a communication error into an error that names the lost process.

        Raises:
            RankLost: if another process is dead, hangs or has failed.
        """
        if self._heart is None:
            yield
            return
        self._heart.waiting = time.monotonic()
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # what torch.distributed raises
            reason = self._heart.explain()
            if not reason:
                raise
            self._failed = True
            lost = RankLost(f"{reason}; rerun the same command to go on from the last checkpoint")
            raise self.known_to_all(lost) from error
        finally:
            self._heart.waiting = None

    def main_first(self, work: Callable[[], T]) -> T:
        """Return what `work` returns, on the main process before the others, which find what it wrote into caches.

        Raises:
            UserError, ValueError, OSError, FloatingPointError: see `synchronize_errors`; the work must not communicate.
        """
        found: list[T] = []
        for turn in (True, False):
            with self.synchronize_errors():
                if turn == self.is_main_process:
                    found.append(work())
        return found[0]

    @contextmanager
    def report_failures(self) -> Iterator[None]:
        """Report an error of this process to the other processes, so that they do not wait for it."""
        try:
            yield
        except BaseException as error:
            if self._shared is None or self._shared not in (error, error.__cause__):
                self._failed = True
                self.leave(" ".join(str(error).split()) or type(error).__name__)
            raise

    def leave(self, failure: str = "") -> None:
        """Report through the heartbeat that this process has finished, or why it failed."""
        if self._heart is not None:
            self._heart.leave(failure)

    def close(self) -> None:
        """Leave the world and destroy the process groups; called at exit."""
        if self._heart is None:
            return
        self.leave()
        if self.is_main_process:
            self._heart.outlast(GOODBYE)
        if dist.is_initialized() and not self._failed:  # can hang if a peer is dead
            dist.destroy_process_group()


ALONE = World()
_joined: World | None = None


def is_main_process() -> bool:
    """Tell whether this process is rank 0 by the environment variables; usable before `join`."""
    return "WORLD_SIZE" not in os.environ or os.environ.get("RANK", "0") == "0"


def in_many() -> bool:
    """Tell whether this process is one of several by the environment variables; usable before `join`."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def join(device: torch.device, *, patience: float = PATIENCE) -> World:
    """Join the world described by the environment variables; without WORLD_SIZE, or if it is 1, return ALONE.

    Later calls return the same world.

    Args:
        device: device of this process; CUDA tensors use NCCL, CPU tensors gloo.
        patience: seconds without a heartbeat after which another process counts as lost.

    Raises:
        UserError: if the variables are incomplete.
    """
    global _joined
    if _joined is None:
        given = [name for name in _VARIABLES if name in os.environ]
        if "WORLD_SIZE" not in given or os.environ["WORLD_SIZE"] == "1":
            return ALONE
        if len(given) < len(_VARIABLES):
            missing = ", ".join(name for name in _VARIABLES if name not in given)
            raise UserError(f"WORLD_SIZE={os.environ['WORLD_SIZE']} but {missing} is not set; start with torchrun")
        _joined = _enter(device, patience)
    return _joined


def _meet(store: Store, rank: int, size: int) -> str:
    """Return a unique name for this rendezvous; the store may still hold keys of an earlier group that died.

    Each process writes a random id. Rank 0 publishes the list of ids until every process has found its own id in it.
    """
    mine = uuid.uuid4().hex
    store.set(f"msdiff/hello/{rank}", mine)
    _wait_for(store, range(size) if rank == 0 else [0])
    while True:
        if rank == 0:
            seen = [store.get(f"msdiff/hello/{other}").decode() for other in range(size)]
            store.set("msdiff/seen", json.dumps(seen))
        seen = json.loads(store.get("msdiff/seen"))
        name = uuid.uuid5(uuid.NAMESPACE_OID, "".join(seen)).hex
        if mine in seen:
            store.set(f"msdiff/found/{name}/{rank}", "1")
        if rank == 0 and store.check([f"msdiff/found/{name}/{other}" for other in range(size)]):
            store.set("msdiff/met", json.dumps(seen))
        if store.check(["msdiff/met"]) and mine in (met := json.loads(store.get("msdiff/met"))):
            return uuid.uuid5(uuid.NAMESPACE_OID, "".join(met)).hex
        time.sleep(0.05)


def _wait_for(store: Store, others: Iterable[int]) -> None:
    """Wait until other ranks have written their ids; after NOTICE seconds, log which have not."""
    start, told = time.monotonic(), False
    while missing := [str(other) for other in others if not store.check([f"msdiff/hello/{other}"])]:
        if not told and time.monotonic() - start > NOTICE:
            told = True
            _LOG.warning(
                "msdiff: waiting for rank %s; did it start, and can it reach this machine?", ", ".join(missing)
            )
        time.sleep(0.05)


@contextmanager
def _noticed(text: str) -> Iterator[None]:
    """Log a warning if the block takes more than NOTICE seconds."""
    timer = threading.Timer(NOTICE, _LOG.warning, (text,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _enter(device: torch.device, patience: float) -> World:
    own, size, place = (os.environ[name] for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))
    with _noticed(f"msdiff: rank {own} waits for the other processes of {size} at {place}:{os.environ['MASTER_PORT']}"):
        store, rank, size = next(iter(rendezvous("env://")))
    prefix = f"msdiff/{_meet(store, rank, size)}"
    words = PrefixStore(f"{prefix}/words", store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if not dist.is_initialized():
        dist.init_process_group(backend, store=PrefixStore(f"{prefix}/groups", store), rank=rank, world_size=size)
    world = World(rank, size, words)
    names = world.all_gather_object(f"rank {rank} (process {os.getpid()} on {socket.gethostname()})")
    # a separate client: a client that waits for a key blocks its other requests
    line = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    world._heart = Heartbeat(PrefixStore(f"{prefix}/life", line), rank, names, patience=patience)
    world._heart.start()
    atexit.register(world.close)
    return world
