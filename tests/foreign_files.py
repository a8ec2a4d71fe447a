"""Checkpoints as other code writes them, from the golden weights: score_sde's, EDM's and latent diffusion's layouts."""

from __future__ import annotations

import io
import json
import pickle
import re
import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = {"ncsnpp": "ncsnpp", "edm": "ddpmpp", "ldm": "ldm"}  # golden file: our family
Weights = dict[str, Tensor]


def golden(name: str) -> tuple[dict[str, Any], Weights, dict[str, Weights]]:
    """Return a golden file's configuration, its weights (fp32, published names, buffers included) and its cases."""
    with safe_open(GOLDEN / f"{name}_multistage.safetensors", "pt") as file:
        meta = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
    weights = {k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")}
    cases: dict[str, Weights] = {}
    for key, value in tensors.items():
        if key.startswith("case"):
            case, field = key.split(".")
            cases.setdefault(case, {})[field] = value
    return meta, dict(sorted(weights.items())), cases


def one_stage(name: str, weights: Weights, stage: int = 0) -> Weights:
    """Return the encoder and one decoder under the names of the family's own, one-stage code."""
    encoder_modules = 1 + max((int(k.split(".")[1]) for k in weights if k.startswith("en_modules.")), default=0)
    renamed: Weights = {}
    for key, value in weights.items():
        parts = key.split(".")
        if name == "ncsnpp" and parts[0] == "en_modules":
            parts[0] = "all_modules"
        elif name == "ncsnpp" and parts[0] == "de_modules":
            if int(parts[1]) != stage:
                continue
            parts = ["all_modules", str(encoder_modules + int(parts[2])), *parts[3:]]
        elif name == "edm" and parts[1] == "decs":
            if int(parts[2]) != stage:
                continue
            parts = ["model", "dec", *parts[3:]]
        elif name == "ldm" and parts[0] in ("de_modules", "outs"):
            if int(parts[1]) != stage:
                continue
            parts = [{"de_modules": "output_blocks", "outs": "out"}[parts[0]], *parts[2:]]
        renamed[".".join(parts)] = value
    return renamed


def averaged(weights: Mapping[str, Tensor]) -> Weights:
    """Return weights that stand for an average: others than the model's, the buffers the same."""
    return {k: v if "sigmas" in k or "resample_filter" in k else v * 1.25 for k, v in weights.items()}


def write_score_sde(
    path: Path, weights: Weights, ema: Weights | None, *, prefix: str = "module.", old: bool = False, **others: Any
) -> Path:
    """Write {optimizer, model, ema, step}; ema holds a list in the order of the parameters, without their names."""
    content: dict[str, Any] = {"optimizer": {"state": {}, "param_groups": []}, "step": 250000, **others}
    content["model"] = {prefix + name: value for name, value in weights.items()}
    if ema is not None:
        shadow = [nn.Parameter(ema[name]).requires_grad_(False) for name in weights if name != "sigmas"]
        content["ema"] = {"decay": 0.9999, "num_updates": 250000, "shadow_params": shadow}
    torch.save(content, path, _use_new_zipfile_serialization=not old)
    return path


def write_ldm(path: Path, weights: Weights, ema: Weights | None, **others: Any) -> Path:
    """Write a Lightning checkpoint with callbacks named by their classes, OmegaConf settings and optimizer states."""
    betas = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64) ** 2
    state = {"betas": betas.float(), "alphas_cumprod": torch.cumprod(1 - betas, 0).float(), "logvar": torch.zeros(1000)}
    state |= {f"model.diffusion_model.{name}": value for name, value in weights.items()}
    if ema is not None:
        state |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(9, dtype=torch.int32)}
        state |= {f"model_ema.{f'diffusion_model.{n}'.replace('.', '')}": v for n, v in ema.items()}
    state |= others.pop("state", {})
    with fake_modules():
        modules = sys.modules
        checkpoint = modules["pytorch_lightning.callbacks.model_checkpoint"].ModelCheckpoint
        attributes = modules["pytorch_lightning.utilities.parsing"].AttributeDict(lr=1e-4)
        settings = modules["omegaconf.dictconfig"].DictConfig()
        content = {
            "epoch": 3,
            "global_step": 410000,
            "pytorch-lightning_version": "1.4.2",
            "state_dict": state,
            "callbacks": {checkpoint: {"best_model_score": torch.tensor(0.1), "best_model_path": "x.ckpt"}},
            "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]}],
            "hyper_parameters": attributes,
            "settings": settings,
            **others,
        }
        torch.save(content, path)
    return path


INTERVALS = [[[0, 2.5103]], [[2.5103, 7.6577]], [[7.6577, float("inf")]]]  # the multi-stage network's default


def write_edm(
    path: Path, weights: Weights, *, groups: int = 16, protocol: int = 4, intervals: Any = INTERVALS, **changes: Any
) -> Path:
    """Write {ema, loss_fn, augment_pipe, dataset_kwargs} as EDM's training does: persistent objects with their source.

    The multi-stage code's network has its intervals as an attribute, whether it was given them as an argument or not;
    None leaves the attribute out.
    """
    several = any(name.startswith("model.decs.") for name in weights)
    kwargs = {
        "img_resolution": 16,
        "img_channels": 3,
        "label_dim": 0,
        "model_type": "MultistageUNet" if several else "SongUNet",
        "embedding_type": "positional",
        "encoder_type": "standard",
        "decoder_type": "standard",
        "channel_mult_noise": 1,
        "resample_filter": [1, 1],
        "model_channels": 16,
        "channel_mult": [1, 2],
        "dropout": 0.13,
        **changes.pop("kwargs", {}),
    }
    with fake_modules():
        net = _module(weights, groups, kwargs)
        net.kind = changes.pop("kind", "EDMPrecond")
        inner: Any = net._modules.get("model", net)
        if inner is not net:
            inner.kind = changes.pop("network", kwargs["model_type"])
        if several and intervals is not None:
            inner.stage_interval = intervals
        if odd := changes.pop("odd", ""):
            net.get_submodule(odd).num_groups = 8  # type: ignore[assignment]
        content = {
            "ema": net,
            "loss_fn": Persistent("EDMLoss"),
            "augment_pipe": Persistent("AugmentPipe"),
            "dataset_kwargs": sys.modules["dnnlib.util"].EasyDict(path="cifar10.zip", use_labels=False),
            **changes,
        }
        path.write_bytes(pickle.dumps(content, protocol))
    return path


class Persistent(nn.Module):
    """A module of EDM's code: pickled with its class's source, rebuilt by torch_utils.persistence."""

    def __init__(self, kind: str, **kwargs: Any) -> None:
        super().__init__()
        self.kind, self._init_args, self._init_kwargs = kind, (), sys.modules["dnnlib.util"].EasyDict(kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        source = "raise AssertionError('the source in a pickle was run')"
        meta = {
            "type": "class",
            "version": 6,
            "module_src": source,
            "class_name": self.kind,
            "state": self.__dict__,
        }
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (meta,), None


def _module(weights: Weights, groups: int, kwargs: dict[str, Any]) -> Persistent:
    """Return a tree of modules that has these parameters and buffers."""
    root = Persistent("EDMPrecond", **kwargs)
    root.sigma_data = kwargs.get("sigma_data", 0.5)
    for name, value in weights.items():
        *path, last = name.split(".")
        module: nn.Module = root
        for depth, part in enumerate(path):
            if part not in module._modules:
                plain = part in ("enc", "dec", "decs") or (depth == 2 and path[1] == "decs")
                module.add_module(part, nn.ModuleDict() if plain else Persistent("UNetBlock", **kwargs))
            child = module._modules[part]
            assert child is not None
            module = child
        if last == "resample_filter":
            module.register_buffer(last, value)
        else:
            module.register_parameter(last, nn.Parameter(value))
        if "norm" in path[-1] and last == "weight":
            module.num_groups, module.eps = min(len(value) // 4, groups), 1e-6  # type: ignore[assignment]
    return root


class _EasyDict(dict[str, Any]):
    pass


class _AttributeDict(dict[str, Any]):
    pass


class _ModelCheckpoint:
    pass


class _DictConfig:
    def __init__(self) -> None:
        self.content = {"beta": _Node()}


class _Node:
    pass


def _reconstruct_persistent_obj(meta: Any) -> Any:
    raise AssertionError("a persistent object was rebuilt")


_FAKES = {
    "dnnlib.util.EasyDict": _EasyDict,
    "torch_utils.persistence._reconstruct_persistent_obj": _reconstruct_persistent_obj,
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint": _ModelCheckpoint,
    "pytorch_lightning.utilities.parsing.AttributeDict": _AttributeDict,
    "omegaconf.dictconfig.DictConfig": _DictConfig,
    "omegaconf.nodes.AnyNode": _Node,
}


@contextmanager
def fake_modules() -> Iterator[None]:
    """Let pickles name what other projects define; afterwards it is not there, as for a user of this library."""
    added = {}
    for full, value in _FAKES.items():
        module, _, name = full.rpartition(".")
        parts = module.split(".")
        for package in (".".join(parts[: i + 1]) for i in range(len(parts))):
            added.setdefault(package, types.ModuleType(package))
        setattr(added[module], name, value)
        value.__module__, value.__name__, value.__qualname__ = module, name, name
    before = dict(sys.modules)
    sys.modules.update(added)
    try:
        yield
    finally:
        for name in added:
            del sys.modules[name]
        sys.modules.update({name: before[name] for name in added if name in before})


def legacy_bytes(value: Any) -> bytes:
    """Return what torch.save wrote before it wrote zip archives, as it still does inside plain pickles."""
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


_COMPVIS = (
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"\.resnets\.", ".block."),
    (r"\.attentions\.", ".attn."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.(down|up)samplers\.0\.", r".\1sample."),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.group_norm\.", ".norm."),
    (r"\.to_(q|k|v)\.", r".\1."),
    (r"\.to_out\.0\.", ".proj_out."),
    (r"^encoder\.down_blocks\.", "encoder.down."),
)


def compvis_weights(model: Any) -> Weights:
    """Return a diffusers VQModel's weights under CompVis' names, attention maps as 1x1 convolutions."""
    levels, weights = len(model.config.block_out_channels), {}
    for name, value in model.state_dict().items():
        for pattern, new in _COMPVIS:
            name = re.sub(pattern, new, name)
        name = re.sub(r"^decoder\.up_blocks\.(\d+)", lambda m: f"decoder.up.{levels - 1 - int(m[1])}", name)
        pointwise = re.search(r"\.attn[._]\d.*\.(q|k|v|proj_out)\.weight", name)
        weights[name] = value[..., None, None] if pointwise else value
    return weights
