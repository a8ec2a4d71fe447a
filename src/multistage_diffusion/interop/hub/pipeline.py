"""Sampling of a run in diffusers."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

OUTPUTS = ("pil", "np", "pt", "latent")


class MultistagePipeline(DiffusionPipeline):  # type: ignore[misc]
    """Draws images with a network whose decoder is chosen by the noise level.

    Args:
        unet: the network.
        scheduler: the sampler.
        vae: the autoencoder of a network on latents, or None.
        calls: network calls per image, unless told otherwise.
        guidance: classifier-free guidance, unless told otherwise; 1: none.
        guidance_interval: (low, high); guidance acts only for low < sigma <= high. None: everywhere.
        initial_std: standard deviation of the starting noise; None: the scheduler's.
        times: first and last time of rectified flow; None for other schedulers.
        final_scale: factor from the scheduler's last state to the sample.
    """

    model_cpu_offload_seq = "unet->vae"
    _optional_components = ["vae"]  # noqa: RUF012 - as diffusers has it
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012

    def __init__(
        self,
        unet: Any,
        scheduler: Any,
        vae: Any = None,
        calls: int = 20,
        guidance: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        initial_std: float | None = None,
        times: tuple[float, float] | None = None,
        final_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae)
        self.register_to_config(
            calls=calls,
            guidance=guidance,
            guidance_interval=guidance_interval,
            initial_std=initial_std,
            times=times,
            final_scale=final_scale,
        )

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        class_labels: int | list[int] | Tensor | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] = ("latents",),
    ) -> Any:
        """Draw images.

        Args:
            batch_size: number of images, unless labels or latents give it.
            class_labels: class of every image, or one for all; None: no class.
            num_inference_steps: network calls.
            guidance_scale: 0 is unconditional, 1 conditional; other values evaluate the network twice.
            generator: of the noise.
            latents: standard normal noise (B, C, H, W) to start from.
            output_type: "pil", "np" (B, H, W, C) or "pt" (B, C, H, W) in [0, 1], or "latent": the sampler's result.
            return_dict: whether to return an ImagePipelineOutput instead of a tuple.
            callback_on_step_end: called with (pipeline, number, timestep, {"latents": state}) after each network call.
            callback_on_step_end_tensor_inputs: names that the callback is given; "latents" is the only one.
        """
        if output_type not in OUTPUTS:
            raise ValueError(f"output_type={output_type!r} must be one of {', '.join(OUTPUTS)}")
        if num_inference_steps is not None and num_inference_steps < 1:
            raise ValueError(f"num_inference_steps={num_inference_steps} must be positive")
        device, dtype = self._execution_device, self.unet.dtype
        labels = self._labels(class_labels, batch_size, latents)
        count = len(latents) if latents is not None else len(labels) if labels is not None else batch_size
        config = self.unet.config
        if latents is None:
            shape = (count, config.in_channels, *config.sample_size)
            latents = randn_tensor(shape, generator=generator, device=torch.device(device), dtype=torch.float32)
        calls = self.config.calls if num_inference_steps is None else num_inference_steps
        self._set_timesteps(calls, device)
        std = self.config.initial_std
        x = latents.to(device) * (self.scheduler.init_noise_sigma if std is None else std)
        guidance = self.config.guidance if guidance_scale is None else guidance_scale
        extra = {}
        if "generator" in inspect.signature(self.scheduler.step).parameters:
            extra["generator"] = generator
        if hasattr(self.scheduler, "use_generator"):
            self.scheduler.use_generator(generator)
        for number, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            scaled = x
            if hasattr(self.scheduler, "scale_model_input"):
                scaled = self.scheduler.scale_model_input(x, t)
            out = self._guided(scaled.to(dtype), t, labels, guidance).to(x.dtype)
            x = self.scheduler.step(out, t, x, **extra, return_dict=False)[0]
            if callback_on_step_end is not None:
                given = {"latents": x} if "latents" in callback_on_step_end_tensor_inputs else {}
                x = (callback_on_step_end(self, number, t, given) or {}).get("latents", x)
        images = self._images(x * self.config.final_scale, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _set_timesteps(self, calls: int, device: Any) -> None:
        """Plan the network calls; a scheduler of rectified flow is given its times."""
        if self.config.times is None:
            self.scheduler.set_timesteps(calls, device=device)
            return
        first, last = self.config.times
        self.scheduler.set_timesteps(sigmas=np.linspace(first, last, calls), device=device)

    def _labels(self, given: Any, batch_size: int, latents: Tensor | None) -> Tensor | None:
        """Return the class of every image, int64 (B,)."""
        if given is None:
            return None
        labels = torch.as_tensor(given, device=self._execution_device).reshape(-1)
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(f"class_labels={given!r} must be whole numbers")
        count = batch_size if latents is None else len(latents)
        if len(labels) not in (1, count) and (latents is not None or batch_size != 1):
            raise ValueError(f"class_labels: {len(labels)} for {count} images; give one, or one for each")
        labels = labels.to(torch.int64)
        return labels.expand(count) if len(labels) == 1 else labels

    def _guided(self, x: Tensor, t: Any, labels: Tensor | None, guidance: float) -> Tensor:
        """Return the network's output, with classifier-free guidance where it acts."""
        interval = self.config.guidance_interval
        if interval is not None and not interval[0] < self.scheduler.sigma <= interval[1]:
            guidance = 1.0
        if guidance == 1 or labels is None:
            if guidance != 1:
                raise ValueError(f"guidance_scale={guidance} needs class_labels")
            out: Tensor = self.unet(x, t, class_labels=labels, return_dict=False)[0]
            return out
        none = torch.full_like(labels, -1)
        if guidance == 0:
            out = self.unet(x, t, class_labels=none, return_dict=False)[0]
            return out
        both = self.unet(torch.cat([x, x]), t, class_labels=torch.cat([labels, none]), return_dict=False)[0]
        labelled, unlabelled = both.chunk(2)
        result: Tensor = unlabelled + guidance * (labelled - unlabelled)
        return result

    def _images(self, x: Tensor, output_type: str) -> Any:
        """Return images in the form that is asked for."""
        if output_type == "latent":
            return x
        if self.vae is not None:
            settings = self.vae.config
            latents = x / settings.scaling_factor + (settings.get("shift_factor") or 0.0)
            x = self.vae.decode(latents.to(self.vae.dtype)).sample
        if output_type == "pil":
            levels = ((x.float() + 1.0) * 127.5).round().clamp(0, 255)
            return self.numpy_to_pil((levels / 255).cpu().permute(0, 2, 3, 1).numpy())
        images = (x.float() / 2 + 0.5).clamp(0, 1)
        return images if output_type == "pt" else images.cpu().permute(0, 2, 3, 1).numpy()

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **options: Any) -> None:
        """Save the pipeline with its code, which diffusers leaves out.

        Args:
            save_directory: the folder.
            push_to_hub: not possible here; upload the folder afterwards.
            options: see DiffusionPipeline.save_pretrained.
        """
        if push_to_hub:
            raise ValueError("push_to_hub: save the pipeline, then upload the folder (huggingface-cli upload)")
        super().save_pretrained(save_directory, **options)
        place = Path(save_directory)
        index = json.loads((place / "model_index.json").read_text())
        for name, part in (("", self), *self.components.items()):
            kind = type(part)
            if part is None or kind.__module__.startswith("diffusers."):
                continue
            source = Path(inspect.getfile(kind))
            shutil.copyfile(source, place / name / source.name)
            index[name or "_class_name"] = [source.stem, kind.__name__]
        (place / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
