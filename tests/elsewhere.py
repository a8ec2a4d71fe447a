"""A device for machines without a GPU: it computes on the CPU, but refuses what CUDA refuses and notes when the host waits.

Its tensors (`Away`) report a device of their own; operations with tensors of both places raise, as do generators of the wrong
place. A copy to or from ordinary memory waits, whatever it was told; what a copy without waiting brings is garbage until somebody
has waited for it. `API` has what the package uses of torch.cuda; a graph is a list of operations that is done again. It says
nothing about kernels, speed, memory or rounding, and cannot take a parameter's data from one place to the other.

A copy of the package with CUDA's name changed to this device's takes it for CUDA. Registering it cannot be undone: only a process
of its own should import this.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "elsewhere"
aten = torch.ops.aten

ASKS = {  # what looks at a result to know how large the next is, or what to do
    aten._local_scalar_dense.default,
    aten._unique2.default,
    aten.bincount.default,
    aten.equal.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.repeat_interleave.Tensor,
    aten.unique_consecutive.default,
    aten.unique_dim.default,
}
INDEXES = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
LOWER = ("addmm", "baddbmm", "bmm", "conv2d", "linear", "matmul", "mm", "scaled_dot_product_attention")  # by autocast

ANSWERS = {  # of the device's module, whatever it is asked with
    "_is_in_bad_fork": False,
    "current_device": 0,
    "device_count": 1,
    "get_amp_supported_dtype": [torch.bfloat16, torch.float16],
    "get_device_name": "Elsewhere",
    "is_available": True,
    "is_bf16_supported": True,
    "is_initialized": True,
    "manual_seed_all": None,
    "max_memory_allocated": 2**30,
    "mem_get_info": (2**33, 2**34),
    "memory_allocated": 0,
    "memory_reserved": 0,
}

waits: list[str] = []  # why and where the host has waited


def note_wait(why: str) -> None:
    """Note that the host waits for the device."""
    if API.captured is not None:
        raise RuntimeError(f"{why}: a graph is being captured")
    frames = [f for f in traceback.extract_stack() if "multistage_diffusion" in f.filename]
    waits.append(f"{why} in {frames[-1].name} of {Path(frames[-1].filename).name}" if frames else why)


# -- tensors ----------------------------------------------------------------------------------------------------------


class Away(Tensor):
    """A tensor of the device."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Away:
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        made = Tensor._make_wrapper_subclass(cls, inner.size(), dtype=inner.dtype, device=DEVICE, **layout)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    def __repr__(self) -> str:
        return f"Away({self.inner!r})"

    def tolist(self) -> Any:  # torch refuses this of subclasses
        return self.cpu().tolist()

    def record_stream(self, stream: Stream) -> None:
        assert isinstance(stream, Stream)


class Mode(TorchDispatchMode):
    """Lets tensors be made on the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Do an operation where its tensors are, or where its result is asked for."""
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    asked = kwargs.get("device")
    there = any(isinstance(t, Away) for t in tensors) if asked is None else torch.device(asked).type == NAME
    if func is aten._pin_memory.default:
        return _pinned(args[0].clone())
    if func is aten._to_copy.default and isinstance(args[0], Away) != there:
        return _sent(args[0], kwargs)
    if func is aten.copy_.default and isinstance(args[0], Away) != isinstance(args[1], Away):
        return _copied(args[0], args[1], kwargs.get("non_blocking", len(args) > 2 and args[2]))
    if there:
        _check(func, args, kwargs, tensors)
    inner_args, inner_kwargs = tree_map_only(Away, lambda t: t.inner, (args, kwargs))
    pinned = inner_kwargs.pop("pin_memory", False)
    if there and asked is not None:
        inner_kwargs["device"] = torch.device("cpu")
    out = func(*inner_args, **inner_kwargs)
    if API.captured is not None:
        API.captured.append((func, inner_args, inner_kwargs, out))
    if not there or func in (aten._local_scalar_dense.default, aten.equal.default):
        return _pinned(out) if pinned else out
    out = tree_map_only(Tensor, lambda t: t if isinstance(t, Away) else Away(t), out)
    return return_and_correct_aliasing(func, args, kwargs, out) if tensors else out


def _check(func: Any, args: Any, kwargs: dict[str, Any], tensors: list[Tensor]) -> None:
    """Raise RuntimeError for what CUDA refuses, note what it waits for."""
    here = [t for t in tensors if not isinstance(t, Away)]
    if func in INDEXES and isinstance(args[0], Away):
        indices = [i for i in args[1] if i is not None]
        if any(not isinstance(i, Away) or i.dtype == torch.bool for i in indices):
            note_wait("index by a mask or from here")
        here = [t for t in here if not any(t is i for i in indices)]
    # numbers as tensors without dimensions may be anywhere
    if any(t.dim() for t in here) or (here and func in (aten.cat.default, aten.stack.default)):
        shapes = [(type(t).__name__, tuple(t.shape)) for t in tensors]
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, found {shapes}")
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type != NAME:
        raise RuntimeError(f"{func}: expected a generator of {NAME}, found {generator.device.type}")
    if func in ASKS and tensors:
        note_wait(str(func))


# -- copies from one place to the other -------------------------------------------------------------------------------


class _Late:
    """A copy that nobody has waited for yet: its target holds garbage."""

    def __init__(self, target: Tensor) -> None:
        self.target, self.value = target, target.clone()
        target.fill_(torch.nan if target.is_floating_point() else 99)

    def settle(self) -> None:
        if self.value is not None:
            self.target.copy_(self.value)
            self.value = None


def _pinned(tensor: Tensor) -> Tensor:
    tensor.pinned = True
    return tensor


def _sent(source: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """Return a copy of a tensor at the other place."""
    value = source.inner if isinstance(source, Away) else source
    value = value.to(kwargs.get("dtype"), memory_format=kwargs.get("memory_format"), copy=True)
    target = value if isinstance(source, Away) else Away(value)
    _copy(source, target, value, kwargs.get("non_blocking", False))
    return target


def _copied(target: Tensor, source: Tensor, non_blocking: bool) -> Tensor:
    inner = target.inner if isinstance(target, Away) else target
    inner.copy_(source.inner if isinstance(source, Away) else source)
    _copy(source, target, inner, non_blocking)
    return target


def _copy(source: Tensor, target: Tensor, value: Tensor, non_blocking: bool) -> None:
    """Note the wait of a copy that has been made, its target being of this value, or let it be late."""
    stream, there = API.current_stream(), isinstance(target, Away)
    if not (non_blocking and getattr(source if there else target, "pinned", False)):
        stream.settle()
        note_wait("copy there" if there else "copy back")
    elif not there or stream is not API.default:  # what follows on the same stream comes after it
        stream.late.append(_Late(value))


# -- what the package uses of torch.cuda ------------------------------------------------------------------------------


class Stream:
    """An order of work; see `_Late`."""

    def __init__(self, device: object = None) -> None:
        self.late: list[_Late] = []

    def wait_stream(self, other: Stream) -> None:
        if other is not self:
            other.settle()

    def settle(self) -> None:
        for copy in self.late:
            copy.settle()
        self.late = []


class Event:
    """A moment of the current stream."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.timed, self.at = enable_timing, 0.0

    def record(self) -> None:
        self.at, self.before = time.perf_counter(), list(API.current_stream().late)

    def synchronize(self) -> None:
        for copy in self.before:
            copy.settle()

    def elapsed_time(self, other: Event) -> float:
        assert self.timed
        assert other.timed
        return 1e3 * (other.at - self.at)


class Graph:
    """Operations that are done again; CUDAGraph."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Api:
    """torch.elsewhere."""

    Stream, Event, CUDAGraph = Stream, Event, Graph

    def __init__(self) -> None:
        self.default = self._current = Stream()
        self.captured: list[Any] | None = None

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in ANSWERS:
            raise AttributeError(name)
        return lambda *_, **__: ANSWERS[name]

    def current_stream(self, device: object = None) -> Stream:
        return self._current

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self._current = self._current, stream
        try:
            yield
        finally:
            self._current = before

    def synchronize(self, device: object = None) -> None:
        self._current.settle()
        note_wait("synchronize")

    @contextmanager
    def graph(self, graph: Graph) -> Iterator[None]:
        self.captured = graph.calls
        try:
            yield
        finally:
            self.captured = None

    def make_graphed_callables(self, call: Any, examples: Any, **_: Any) -> Any:
        """Leave the call as it is: passes with gradients are not recorded here."""
        assert all(isinstance(example, Away) for example in examples)
        return call


API = Api()
_setup_privateuseone_for_python_backend(NAME, API)
DEVICE = torch.device(NAME, 0)

# autocast: what computes in the lower type, and what is left alone
_anything, _named = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
_anything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")


def _lowered(name: str) -> Callable[..., Tensor]:
    def cast(tensor: Tensor) -> Tensor:
        real = tensor.is_floating_point() and tensor.dtype != torch.float64
        return tensor.to(torch.get_autocast_dtype(NAME)) if real else tensor

    def kernel(*args: Any, **kwargs: Any) -> Tensor:
        args, kwargs = tree_map_only(Tensor, cast, (args, kwargs))
        with torch.autocast(NAME, enabled=False):
            return getattr(aten, name)(*args, **kwargs)

    return kernel


for _name in LOWER:
    _named.impl(_name, _lowered(_name), "AutocastPrivateUse1")


def _placed(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return torch.tensor or torch.as_tensor for both places: modes do not see what they do."""

    def place(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        tensor = data.to(*args, **kwargs) if isinstance(data, Away) else make(data, *args, **kwargs)
        return tensor if device is None else tensor.to(device)

    return place


torch.tensor, torch.as_tensor = _placed(torch.tensor), _placed(torch.as_tensor)
