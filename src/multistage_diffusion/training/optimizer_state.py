"""A PyTorch optimiser by its settings, and the state of any as named tensors, keyed by parameter name and state key."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..config import OptimizerConfig
from ..errors import UserError

_NUMBER = ":number"  # suffix for state values that are Python numbers, not tensors


Local = Callable[[Tensor, Tensor], Tensor]  # (saved tensor, its parameter or weight) -> what this process holds of it


def whole_tensor(saved: Tensor, _: Tensor) -> Tensor:
    """Return a saved tensor as it is: this process holds whole tensors."""
    return saved


def make_optimizer(settings: OptimizerConfig, module: nn.Module) -> torch.optim.Optimizer:
    """Return Adam or AdamW over all parameters; parameters without a gradient are skipped (no update or decay)."""
    kind = torch.optim.AdamW if settings.kind == "adamw" else torch.optim.Adam
    return kind(
        module.parameters(),
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def optimizer_tensors(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """Return an optimiser's state as {"PARAMETER.KEY": tensor}; parameters that were never updated have no state.

    Raises:
        TypeError: if the state holds anything but tensors, numbers and None.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}.{key}"] = value
            elif isinstance(value, int | float):
                tensors[f"{name}.{key}{_NUMBER}"] = torch.tensor(value, dtype=_dtype(value))
            elif value is not None:
                raise TypeError(f"{type(optimizer).__name__} keeps {key!r} as {type(value).__name__}: not supported")
    return tensors


def _dtype(value: float) -> torch.dtype:
    return torch.bool if isinstance(value, bool) else torch.int64 if isinstance(value, int) else torch.float64


def state_of(name: str) -> str:
    """Return the parameter name of a key of `optimizer_tensors`."""
    return name.rsplit(".", 1)[0]


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    module: nn.Module,
    tensors: dict[str, Tensor],
    most: int | None = None,
    local: Local = whole_tensor,
) -> None:
    """Restore an optimiser's state from named tensors, bit for bit; tensors of unknown parameters are ignored.

    Args:
        optimizer: optimiser over the module's parameters.
        module: the network.
        tensors: result of `optimizer_tensors`.
        most: upper bound of the step counts. None: no bound.
        local: returns what this process holds of a tensor with the shape of its parameter.

    Raises:
        UserError: if the state of a parameter does not match this optimiser: keys, dtypes, shapes, or invalid values.
    """
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        by_parameter.setdefault(state_of(name), {})[name.rsplit(".", 1)[1]] = value
    made: dict[tuple[torch.device, torch.dtype], dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if name not in by_parameter:
            continue
        kind = parameter.device, parameter.dtype
        if kind not in made:
            made[kind] = _made(optimizer, *kind)
        state = _checked(name, parameter, by_parameter[name], made[kind], most)
        for key, value in state.items():
            if isinstance(value, Tensor) and value.ndim and value.shape == parameter.shape:
                state[key] = local(value, parameter)
        optimizer.state[parameter] = state


_PROBE = (2, 3)
_SQUARES = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "acc_delta", "sum", "exp_inf"}  # non-negative state


def _made(optimizer: torch.optim.Optimizer, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return the state per parameter of an optimiser of this class and settings after one step, from a small probe."""
    accepted = inspect.signature(type(optimizer).__init__).parameters
    settings = {key: value for key, value in optimizer.defaults.items() if key in accepted}
    probe = nn.Parameter(torch.zeros(_PROBE, device=device, dtype=dtype))
    other = type(optimizer)([probe], **settings)
    probe.grad = torch.zeros_like(probe)
    other.step()
    return dict(other.state[probe])


def _checked(
    name: str, parameter: Tensor, given: dict[str, Tensor], made: dict[str, Any], most: int | None
) -> dict[str, Any]:
    wanted = {key if isinstance(v, Tensor) else key + _NUMBER: v for key, v in made.items() if v is not None}
    if given.keys() != wanted.keys():
        raise UserError(f"{name} has {', '.join(sorted(given))}; the optimiser keeps {', '.join(sorted(wanted))}")
    state: dict[str, Any] = dict.fromkeys(made)
    for key, value in given.items():
        model = wanted[key]
        if not isinstance(model, Tensor):
            model = torch.tensor(model, dtype=_dtype(model))
        shape = parameter.shape if model.shape == _PROBE else model.shape if model.ndim == 0 else value.shape
        if value.dtype != model.dtype or value.shape != shape:
            raise UserError(f"{name}.{key} is {value.dtype} {list(value.shape)}, not {model.dtype} {list(shape)}")
        if not bool(torch.isfinite(value).all()):
            raise UserError(f"{name}.{key} is not finite")
        if key in _SQUARES and bool((value < 0).any()):
            raise UserError(f"{name}.{key} has negative values; it is a mean or sum of squares")
        if key.removesuffix(_NUMBER) == "step" and most is not None and not 0 <= value.item() <= most:
            raise UserError(
                f"{name}.{key}={value.item():g} is not between 0 and {most}, what the checkpoint's step allows"
            )
        if key.endswith(_NUMBER):
            state[key.removesuffix(_NUMBER)] = value.item()
        else:
            # some optimisers keep step counts on the CPU
            state[key] = value.to(model.device)
    return state
