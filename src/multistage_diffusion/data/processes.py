"""Processes that decode images: Pillow holds Python's lock for half of the time that a small image takes."""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import sys
import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import UserError

Answer = tuple[Any, Sequence[npt.NDArray[np.uint8]]]  # what JSON can hold, and arrays that follow it

_HEAD = 16  # bytes of two lengths, of the JSON text and of the arrays
_BUFFER = 1 << 20
_OURS: weakref.WeakSet[socket.socket] = weakref.WeakSet()  # this process's ends of all connections


def available() -> bool:
    """Return whether this system can fork processes that decode images."""
    return sys.platform == "linux"


class Processes:
    """Processes that answer questions. They are forked, so they know all that the caller knows when it makes them.

    They end with this object or with the process that made them; Ctrl-C and SIGTERM are for that process to answer.

    Args:
        answer: answers a question in one of the processes; it must start no threads and not use torch.
        number: of processes.
    """

    def __init__(self, answer: Callable[[Any], Answer], number: int) -> None:
        self._answer = answer
        self._made: dict[int, socket.socket] = {}
        self._idle: SimpleQueue[int] = SimpleQueue()
        for _ in range(number):
            self._idle.put(self._new())
        weakref.finalize(self, _end_all, self._made, os.getpid())

    def ask(self, question: Any) -> tuple[Any, npt.NDArray[np.uint8]]:
        """Return the answer of a process that is idle, and its arrays as one (uint8, flat); called from several threads.

        Raises:
            UserError: if the process has ended; another takes its place.
        """
        process = self._idle.get()
        connection, asked = self._made[process], process
        try:
            _send(connection, question, ())
            return _receive(connection)
        except BaseException as error:  # Ctrl-C too: half an answer may be left
            ours = self._made.pop(process, None)
            if ours is None:  # all have been ended, with the program, while this thread waited
                raise
            _end(process, ours)
            process = self._new()
            if isinstance(error, OSError | EOFError):
                raise UserError(
                    f"process {asked}, which decodes images, has ended; was it killed because memory ran out? Start again"
                ) from None
            raise
        finally:
            self._idle.put(process)

    def _new(self) -> int:
        connection, process = _forked(self._answer)
        self._made[process] = connection
        return process


def _forked(answer: Callable[[Any], Answer]) -> tuple[socket.socket, int]:
    """Return a connection to a new process that answers questions, and the number of the process."""
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
    _OURS.add(ours)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, none of which the new process needs
        process = os.fork()
    if process == 0:
        _serve(theirs, answer)
    theirs.close()
    return ours, process


def _serve(connection: socket.socket, answer: Callable[[Any], Answer]) -> None:
    """Answer questions until the other end is closed; never return."""
    code = 1
    try:
        gc.freeze()  # what the other process has made is not for this one to free
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        warnings.simplefilter("ignore")
        for end in list(_OURS):  # otherwise no process would see the end of the one that made it
            end.close()
        while True:
            question, _ = _receive(connection)
            _send(connection, *answer(question))
    except EOFError:
        code = 0
    finally:
        os._exit(code)


def _end_all(made: dict[int, socket.socket], owner: int) -> None:
    """End all processes; threads that wait for an answer may end and make some meanwhile."""
    while made:
        process, connection = made.popitem()
        connection.close()
        if os.getpid() == owner:
            with suppress(KeyboardInterrupt):  # the program is ending already
                _end(process, connection)


def _end(process: int, connection: socket.socket) -> None:
    """End a process at once: it holds nothing that could be lost."""
    connection.close()
    with suppress(ProcessLookupError, ChildProcessError):
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


def _send(connection: socket.socket, told: Any, arrays: Sequence[npt.NDArray[np.uint8]]) -> None:
    text = json.dumps(told).encode()
    size = sum(array.nbytes for array in arrays)
    connection.sendall(len(text).to_bytes(_HEAD // 2, "little") + size.to_bytes(_HEAD // 2, "little") + text)
    for array in arrays:
        connection.sendall(array.reshape(-1).data)


def _receive(connection: socket.socket) -> tuple[Any, npt.NDArray[np.uint8]]:
    """Return what `_send` sent.

    Raises:
        EOFError: if the other end has been closed.
    """
    head = _exactly(connection, _HEAD).tobytes()
    text = _exactly(connection, int.from_bytes(head[: _HEAD // 2], "little")).tobytes()
    return json.loads(text), _exactly(connection, int.from_bytes(head[_HEAD // 2 :], "little"))


def _exactly(connection: socket.socket, count: int) -> npt.NDArray[np.uint8]:
    found = np.empty(count, np.uint8)
    rest = found.data
    while rest:
        got = connection.recv_into(rest, len(rest), socket.MSG_WAITALL)
        if not got:
            raise EOFError
        rest = rest[got:]
    return found
