"""The three published checkpoint layouts, read into and written from one dataclass (`Published`).

score_sde, DPM-Solver (.pth)   {optimizer, model: {name: weight}, ema: {shadow_params: [weight]}, step}
EDM (.pkl)                     {ema: a persistent module}; written as .safetensors: `net.NAME`, `ema.NAME` (see `edm`)
latent diffusion (.ckpt)       {state_dict: {model.diffusion_model.NAME, model_ema.NAMEWITHOUTDOTS,
                               first_stage_model.NAME}}

EDM's own files contain source code, which this library neither runs nor writes. Files written here also contain
settings that shapes do not determine (`Published.settings`), such as stage edges and channels of an attention head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..nets.blocks import GROUPS
from .edm import edm_bytes, read_edm_pickle, read_edm_safetensors
from .names import dotless
from .parts import ORIGINAL, Published, Tensors, learnt, listed, mapping, plain, require_family, said_groups, tensors
from .published import kind_of, read_pickle, read_torch, torch_bytes

SUFFIXES: dict[str, str] = {"ncsnpp": ".pth", "ddpmpp": ".safetensors", "ldm": ".ckpt"}
_UNET, _AVERAGE, _CODEC = "model.diffusion_model.", "model_ema.", "first_stage_model."


def read_published(path: Path) -> Published:
    """Read a published checkpoint to the CPU without running code from it.

    Raises:
        UserError: one line naming the file and its fault: damaged, hostile, of another layout.
    """
    kind = kind_of(path)
    try:
        if kind == "safetensors":
            return read_edm_safetensors(path)
        if kind == "pickle":
            return read_edm_pickle(mapping(read_pickle(path), "the pickle"))
        content = mapping(read_torch(path), "the file")
        if "state_dict" in content:
            return _from_ldm(content)
        if "model" in content:
            return _from_score_sde(content)
        raise UserError(f"has neither 'model' (score_sde) nor 'state_dict' (latent diffusion), but {listed(content)}")
    except UserError as error:
        text = str(error)
        raise UserError(text if text.startswith(str(path)) else f"{path}: {text}") from None


def published_bytes(published: Published) -> bytes:
    """Return the file content of a checkpoint that has both model and EMA, in the layout of its family."""
    assert published.model is not None
    assert published.ema is not None
    if published.family == "ncsnpp":
        return torch_bytes(_to_score_sde(published, published.model, published.ema))
    if published.family == "ldm":
        return torch_bytes(_to_ldm(published, published.model, published.ema))
    return edm_bytes(published, published.model, published.ema)


# --- score_sde and DPM-Solver


def _from_score_sde(content: Mapping[Any, Any]) -> Published:
    found = tensors(content["model"], "model")
    prefix = "module." if all(name.startswith("module.") for name in found) else ""
    model = learnt({name.removeprefix(prefix): value for name, value in found.items()})
    require_family("ncsnpp", model)
    fourier = [name for name in model if name in ("all_modules.0.W", "en_modules.0.W")]
    if fourier:
        # fixed random frequencies: not trained, so the average lists one tensor less than the model
        raise UserError(
            f"embeds the noise by random Fourier features ({fourier[0]}), as score_sde's VE networks do; only its VP "
            "NCSN++ (positional embedding) is read"
        )
    arguments = plain(content.get("arguments"))
    groups = said_groups(arguments)
    original = any(name.startswith("all_modules.") for name in model)
    return Published(
        family="ncsnpp",
        model=model,
        ema=_listed_average(content["ema"], model) if content.get("ema") is not None else None,
        norm_groups=groups or (ORIGINAL if original else GROUPS),
        norm_groups_known=groups is not None or original,
        arguments=arguments,
    )


def _listed_average(ema: Any, model: Tensors) -> Tensors:
    """Return the EMA weights by name; the file lists them in the order of the module's state dict."""
    shadow = mapping(ema, "ema").get("shadow_params")
    if not isinstance(shadow, list) or len(shadow) != len(model):
        count = len(shadow) if isinstance(shadow, list) else "no"
        raise UserError(f"ema.shadow_params: {count} tensors for the model's {len(model)}")
    average = tensors(dict(zip(model, shadow, strict=True)), "ema.shadow_params")
    for name, value in average.items():
        if value.shape != model[name].shape:
            raise UserError(
                f"ema.shadow_params: the tensor in the place of {name} is {list(value.shape)}, not "
                f"{list(model[name].shape)}"
            )
    return average


def _to_score_sde(published: Published, model: Tensors, ema: Tensors) -> dict[str, Any]:
    # score_sde also restores an optimizer, so write a new Adam state for the same number of parameters
    group = {"lr": 2e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0, "amsgrad": False}
    return {
        "optimizer": {"state": {}, "param_groups": [{**group, "params": list(range(len(model)))}]},
        "model": {"module.sigmas": _score_sde_sigmas()} | {f"module.{name}": value for name, value in model.items()},
        "ema": {"decay": 0.9999, "num_updates": published.step, "shadow_params": [ema[name] for name in model]},
        "step": published.step,
        "arguments": {**published.arguments, **published.written_settings()},
    }


def _score_sde_sigmas() -> Tensor:
    """Return the noise levels in the buffer of score_sde's networks; VP networks do not use them."""
    return torch.linspace(math.log(50.0), math.log(0.01), 1000, dtype=torch.float64).exp()


# --- latent diffusion


def _from_ldm(content: Mapping[Any, Any]) -> Published:
    found = tensors(content["state_dict"], "state_dict")
    model = _under(found, _UNET)
    if not model:
        raise UserError(f"state_dict holds no U-Net ({_UNET}*), but {listed(found)}")
    require_family("ldm", model)
    average = _under(found, _AVERAGE)
    arguments = plain(content.get("hyper_parameters"))
    said_groups(arguments)  # always 32
    return Published(
        family="ldm",
        model=model,
        ema=_dotless_average(average, model) if average else None,
        codec=_under(found, _CODEC),
        buffers={
            name: value
            for name, value in found.items()
            if not name.startswith((_UNET, _AVERAGE, _CODEC))  # betas, scale_factor, ...
        },
        arguments=arguments,
    )


def _under(found: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}


def _dotless_average(average: Tensors, model: Tensors) -> Tensors:
    full = {dotless(name): name for name in model}
    left = [name for name in average if name not in full and name not in ("decay", "num_updates")]
    missing = [name for short, name in full.items() if short not in average]
    if left or missing:
        what = f"{left[0]} averages no weight of the U-Net" if left else f"no average of {missing[0]}"
        raise UserError(f"model_ema: {what} ({len(left)} too many, {len(missing)} missing)")
    return {name: average[short] for short, name in full.items()}


def _to_ldm(published: Published, model: Tensors, ema: Tensors) -> dict[str, Any]:
    average = {"decay": torch.tensor(0.9999), "num_updates": torch.tensor(published.step, dtype=torch.int32)}
    average |= {dotless(name): value for name, value in ema.items()}
    assert len(average) == len(ema) + 2, "two names are the same without their dots"
    state = {f"{_UNET}{name}": value for name, value in model.items()}
    state |= {f"{_AVERAGE}{name}": value for name, value in average.items()}
    state |= {f"{_CODEC}{name}": value for name, value in published.codec.items()}
    return {
        "global_step": published.step,
        "state_dict": published.buffers | state,
        "hyper_parameters": {**published.arguments, **published.settings},
    }
