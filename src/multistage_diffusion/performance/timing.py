"""Timing of the parts of a training step: data, encoder, decoders, gradients, optimiser, EMA."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

PARTS = ("data", "encoder", "decoders", "gradients", "optimizer", "average")


class Timer:
    """Sums the seconds of each part of a step while it is running.

    It measures only the thread that started it. When it is not running, its sections cost nothing. On a GPU it uses
    CUDA events, so sections need no synchronisation.

    Args:
        device: of the computation.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._thread: int | None = None
        self._spans: list[tuple[str, Any, Any]] = []

    @property
    def running(self) -> bool:
        """Whether the timer measures this thread."""
        return self._thread == threading.get_ident()

    @running.setter
    def running(self, running: bool) -> None:
        self._thread = threading.get_ident() if running else None

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time inside the context to one of PARTS."""
        if not self.running:
            yield
            return
        start = self.now()
        with torch.profiler.record_function(f"msdiff {name}"):
            yield
        self.add(name, start, self.now())

    def now(self) -> Any:
        """Return a timestamp for `add`: seconds, or a CUDA event."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def add(self, name: str, start: Any, end: Any) -> None:
        """Add a time span to a part."""
        self._spans.append((name, start, end))

    def seconds(self) -> dict[str, float]:
        """Return the seconds of every part so far and reset them."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        found = dict.fromkeys(PARTS, 0.0)
        for name, start, end in self._spans:
            found[name] += start.elapsed_time(end) / 1e3 if self.device.type == "cuda" else end - start
        self._spans.clear()
        return found


class PassTimer:
    """Divides the time of a network's forward and backward passes into encoder and decoders.

    In the forward pass, the encoder's time is from its call to its return. In the backward pass, it starts when the
    gradient of the encoder's lowest-resolution output is complete, because gradients leave the decoders before they
    reach the encoder. All other time, such as the loss, counts as decoder time. The backward passes of separate
    networks alternate between decoders and encoders, but only the last transition is recorded. The encoders before it
    count as decoders.
    """

    def __init__(self, timer: Timer) -> None:
        self.timer = timer
        self._inside: list[tuple[Any, Any]] = []  # call and return times of encoders in this forward pass
        self._left: Any = None
        self._handles: list[RemovableHandle] = []

    def watch(self, encoders: Iterable[nn.Module]) -> None:
        """Measure these encoders from now on, and no others."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for encoder in encoders:
            self._handles.append(encoder.register_forward_pre_hook(self._enter))
            self._handles.append(encoder.register_forward_hook(self._leave))

    def _enter(self, *_: object) -> None:
        if self.timer.running:
            self._entered = self.timer.now()

    def _leave(self, _: nn.Module, __: object, encoded: Any) -> None:
        if not self.timer.running:
            return
        self._inside.append((self._entered, self.timer.now()))
        if encoded.h.requires_grad:
            encoded.h.register_hook(self._turn)

    def _turn(self, _: Tensor) -> None:
        self._left = self.timer.now()

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Measure a forward pass; time outside the encoders counts as decoder time."""
        if not self.timer.running:
            yield
            return
        self._inside.clear()
        start = self.timer.now()
        with torch.profiler.record_function("msdiff forward"):
            yield
        end = self.timer.now()
        for enter, leave in self._inside:
            self.timer.add("encoder", enter, leave)
            self.timer.add("decoders", start, enter)
            start = leave
        self.timer.add("decoders", start, end)

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Measure a backward pass, divided at the transition from decoders to encoder."""
        if not self.timer.running:
            yield
            return
        start, self._left = self.timer.now(), None
        with torch.profiler.record_function("msdiff backward"):
            yield
        end = self.timer.now()
        left = end if self._left is None else self._left
        self.timer.add("decoders", start, left)
        self.timer.add("encoder", left, end)
