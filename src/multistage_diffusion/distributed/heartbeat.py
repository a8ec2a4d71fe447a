"""A sign of life from every process, through the store: a process that dies, hangs or fails is named by all others.

A collective's own timeout names nobody, takes half an hour, and cannot tell a dead process from one that writes a large
checkpoint. Here a thread of each process counts up in the store once a second and reads the others' counts.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta

from torch._C._distributed_c10d import Store

EVERY = 1.0  # seconds between signs of life
PATIENCE = 20.0  # seconds without one after which a process is lost; torchrun kills what outlives a failure by 30 s
DOUBT = 5  # signs of life missed after which one is lost where an exchange has failed already
GRACE = 5.0  # seconds of waiting in which the main thread may still tell the reason itself
LAST = 35.0  # seconds in which it may finish what needs nobody, such as a checkpoint
_LEFT, _FAILED = "left", "failed "


class RankLost(ConnectionError):
    """Another process of the world has died, hangs or has failed."""


class Heartbeat:
    """Signs of life of this process, and what is known of the others.

    Args:
        store: a client of its own (one that waits for a key lets nobody else speak).
        rank: of this process.
        names: of all processes, as messages call them.
        every, patience: seconds, see EVERY and PATIENCE.
        end: what ends a process that waits in vain; it is given the exit code.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        names: list[str],
        *,
        every: float = EVERY,
        patience: float = PATIENCE,
        end: Callable[[int], None] = os._exit,
    ) -> None:
        self.store, self.rank, self.names = store, rank, names
        self.every, self.patience, self._end = every, patience, end
        self.reason = ""  # why the others can no longer be waited for
        self.waiting: float | None = None  # since when (time.monotonic) this process has needed the others
        self._known = threading.Event()
        self._explaining = False
        self._word = ""  # the last one: that this process has left, or why it failed
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Begin."""
        self.store.set_timeout(timedelta(seconds=self.patience))
        self.store.set(self._key(self.rank), "0")
        self._thread.start()

    def leave(self, failure: str = "") -> None:
        """Say that this process is done, or why it fails; nobody waits for further signs of it then."""
        if self._word:
            return
        self._word = _FAILED + failure if failure else _LEFT
        self._stop.set()
        self._thread.join(self.patience)
        try:
            self.store.set(self._key(self.rank), self._word)
        except RuntimeError:  # the store has gone with the process that kept it
            return

    def outlast(self, seconds: float) -> None:
        """Wait until all others have left, failed or died, at most so many seconds: the store may be this process's."""
        start = time.monotonic()
        heard = {self._key(rank): (b"", start) for rank in range(len(self.names)) if rank != self.rank}
        try:
            while heard and (now := time.monotonic()) < start + seconds:
                words = {key: self.store.get(key) for key in heard}
                heard = {key: (words[key], now if words[key] != last else when) for key, (last, when) in heard.items()}
                heard = {k: (w, when) for k, (w, when) in heard.items() if w.isdigit() and now - when < self.patience}
                time.sleep(0.05)
        except RuntimeError:  # the store has gone
            return

    def explain(self) -> str:
        """Return why an exchange has failed, waiting until it is known; "" if all others are alive."""
        self._explaining = True
        self.patience = min(self.patience, DOUBT * self.every)
        self._known.wait(self.patience + 3 * self.every)
        return self.reason

    def _key(self, rank: int) -> str:
        return f"heartbeat/{rank}"

    def _run(self) -> None:
        beats = 0
        heard = {rank: (b"", time.monotonic()) for rank in range(len(self.names)) if rank != self.rank}
        while not self._stop.wait(self.every):
            beats += 1
            try:
                self.store.set(self._key(self.rank), str(beats))
                now = time.monotonic()
                for rank, (last, when) in heard.items():
                    key = self._key(rank)
                    word = self.store.get(key) if self.store.check([key]) else b""
                    heard[rank] = (last, when) if word == last else (word, now)
                reason = self._judge(heard)
            except RuntimeError:
                reason = f"{self.names[0]}, or the machine that keeps the store of all processes, is gone"
            if reason and not self._stop.is_set():
                self._tell(reason)
                return

    def _judge(self, heard: dict[int, tuple[bytes, float]]) -> str:
        now = time.monotonic()
        waited = 0.0 if self.waiting is None else now - self.waiting
        for rank, (word, when) in heard.items():
            if word.decode().startswith(_FAILED):
                return f"{self.names[rank]} has failed: {word.decode().removeprefix(_FAILED)}"
            if word.decode() == _LEFT:
                if waited > DOUBT * self.every and now - when > DOUBT * self.every:
                    return f"{self.names[rank]} has ended, but is waited for"
            elif now - when > self.patience:
                return f"{self.names[rank]} is dead or hangs: no sign of life for {now - when:.0f} s"
        return ""

    def _tell(self, reason: str) -> None:
        """Leave the reason to the main thread; where that waits in vain, or works on for long, end the process."""
        self.reason = reason
        self._known.set()
        deadline = time.monotonic() + LAST
        while (now := time.monotonic()) < deadline and not (self.waiting is not None and now - self.waiting > GRACE):
            if self._stop.wait(self.every / 5) or self._explaining:
                return
        # in one piece, newline included: others tell the same at the same moment
        sys.stderr.write(f"msdiff: {reason}; rerun the same command to go on from the last checkpoint\n")
        sys.stderr.flush()
        self._end(2)
