"""Where the time of a training step goes: data, encoder, decoders, clipping, optimiser, averages."""

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
    """Adds up the seconds of parts of a step while it runs, in the thread that has set it going; else its sections cost nothing.

    On a GPU the clock is read on the device (CUDA events): sections do not wait for one another, as without a timer.

    Args:
        device: where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._thread: int | None = None
        self._spans: list[tuple[str, Any, Any]] = []

    @property
    def running(self) -> bool:
        """Whether it counts what this thread does."""
        return self._thread == threading.get_ident()

    @running.setter
    def running(self, running: bool) -> None:
        self._thread = threading.get_ident() if running else None

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what is inside as one of PARTS."""
        if not self.running:
            yield
            return
        start = self.now()
        with torch.profiler.record_function(f"msdiff {name}"):
            yield
        self.add(name, start, self.now())

    def now(self) -> Any:
        """Return the time, to be given to `add`."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def add(self, name: str, start: Any, end: Any) -> None:
        """Count a span as a part."""
        self._spans.append((name, start, end))

    def seconds(self) -> dict[str, float]:
        """Return the seconds of every part so far, and forget them."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        found = dict.fromkeys(PARTS, 0.0)
        for name, start, end in self._spans:
            found[name] += start.elapsed_time(end) / 1e3 if self.device.type == "cuda" else end - start
        self._spans.clear()
        return found


class PassTimer:
    """Divides the forward and backward passes of a network into encoder and decoders.

    Forward, an encoder's span is from its call to its return. Backward, gradients come out of the decoders before they go into
    the encoder: the moment is when the gradient of the encoder's deepest feature map is complete. What belongs to neither,
    such as the loss, counts as the decoders'. Of separate networks, whose backward passes take turns, only the last turn is
    known: the encoders before it count as decoders.
    """

    def __init__(self, timer: Timer) -> None:
        self.timer = timer
        self._inside: list[tuple[Any, Any]] = []  # when encoders were called and returned in this forward pass
        self._left: Any = None
        self._handles: list[RemovableHandle] = []

    def watch(self, encoders: Iterable[nn.Module]) -> None:
        """Watch these encoders from now on, and no others."""
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
        """Count what the encoder does not take as the decoders'."""
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
        """Divide a backward pass where it leaves the decoders."""
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
