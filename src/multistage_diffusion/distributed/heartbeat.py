"""Heartbeats of all processes through the store, to detect a process that is dead, hangs or has failed.

The timeout of a collective does not name the lost process, takes half an hour, and does not distinguish a dead process
from one that writes a large checkpoint. Here, a thread in each process increments a counter in the store once a second
and reads the counters of the others.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta

from torch._C._distributed_c10d import Store

EVERY = 1.0  # seconds between heartbeats
PATIENCE = 20.0  # seconds without a heartbeat before a process is lost; torchrun kills survivors 30 s after a failure
DOUBT = 5  # missed heartbeats before a process is lost if communication has already failed
GRACE = 5.0  # seconds the main thread may wait in communication before the heartbeat thread ends the process
LAST = 35.0  # seconds the main thread may continue local work, such as a checkpoint, after a process is lost
_LEFT, _FAILED = "left", "failed "


class RankLost(ConnectionError):
    """Another process of the world is dead, hangs or has failed."""


class Heartbeat:
    """Sends the heartbeats of this process and monitors those of the others.

    Args:
        store: a separate client (a client that waits for a key blocks its other requests).
        rank: rank of this process.
        names: names of all processes in messages, by rank.
        every, patience: seconds, see EVERY and PATIENCE.
        end: ends this process when another is lost; called with the exit code.
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
        self.reason = ""  # why communication can no longer succeed; "" if it can
        self.waiting: float | None = None  # start time (time.monotonic) of the communication in progress
        self._known = threading.Event()
        self._explaining = False
        self._word = ""  # final status: this process has left, or why it failed
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Start the heartbeat thread."""
        self.store.set_timeout(timedelta(seconds=self.patience))
        self.store.set(self._key(self.rank), "0")
        self._thread.start()

    def leave(self, failure: str = "") -> None:
        """Stop the heartbeats and publish that this process has finished, or why it failed."""
        if self._word:
            return
        self._word = _FAILED + failure if failure else _LEFT
        self._stop.set()
        self._thread.join(self.patience)
        try:
            self.store.set(self._key(self.rank), self._word)
        except RuntimeError:  # the process that hosts the store has ended
            return

    def outlast(self, seconds: float) -> None:
        """Wait until all others have left, failed or died, at most `seconds`: this process may host the store."""
        start = time.monotonic()
        heard = {self._key(rank): (b"", start) for rank in range(len(self.names)) if rank != self.rank}
        try:
            while heard and (now := time.monotonic()) < start + seconds:
                words = {key: self.store.get(key) for key in heard}
                heard = {key: (words[key], now if words[key] != last else when) for key, (last, when) in heard.items()}
                heard = {k: (w, when) for k, (w, when) in heard.items() if w.isdigit() and now - when < self.patience}
                time.sleep(0.05)
        except RuntimeError:  # the store is closed
            return

    def explain(self) -> str:
        """Wait for the reason of a communication error and return it; "" if all others are alive."""
        usual = self.patience
        self._explaining, self.patience = True, min(usual, DOUBT * self.every)
        self._known.wait(self.patience + 3 * self.every)
        if not self.reason:  # the error had another cause: processes lost later are reported as before
            self._explaining, self.patience = False, usual
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
        """Pass the reason to the main thread; end the process if it is not reported in time (GRACE, LAST)."""
        self.reason = reason
        self._known.set()
        deadline = time.monotonic() + LAST
        while (now := time.monotonic()) < deadline and not (self.waiting is not None and now - self.waiting > GRACE):
            if self._stop.wait(self.every / 5) or self._explaining:
                return
        # one write with the newline: other processes write the same message at the same time
        sys.stderr.write(f"msdiff: {reason}; rerun the same command to go on from the last checkpoint\n")
        sys.stderr.flush()
        self._end(2)
