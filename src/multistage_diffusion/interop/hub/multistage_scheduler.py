"""The sampler of a run as a scheduler of diffusers."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ...config.sampling import SOLVERS, SamplingConfig
from ...preconditioning.base import Coefficients, Preconditioning, per_row
from ...samplers.guidance import Clipped, Thresholded
from ...samplers.plan import make_plan
from ...schedules.base import NoiseSchedule


class PendingCall(Exception):
    """A solver needs the denoiser's output at a state that is not known yet."""

    def __init__(self, state: Tensor) -> None:
        super().__init__()
        self.state = state


@dataclass
class MultistageSchedulerOutput(BaseOutput):  # type: ignore[misc]
    """Result of a step.

    Attributes:
        prev_sample: where the network is called next; after the last call, the result.
        pred_original_sample: the denoised images.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor


class MultistageScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """Follows the plan of a solver; each step takes one output of the network, also where a solver's step has several.

    States are unscaled, x = y + sigma n. Timesteps are the network's own noise levels.

    Args:
        sampling: settings of the sampler.
        schedule: settings of the noise schedule.
        sigma_data: of EDM's preconditioning; None: of one without.
    """

    order = 1
    schedule_class: type[NoiseSchedule]
    preconditioning_class: Any

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, sampling: dict[str, Any], schedule: dict[str, Any], sigma_data: float | None = None) -> None:
        self._schedule = self.schedule_class(**_tuples(schedule))
        if sigma_data is not None:
            self._preconditioning: Preconditioning = self.preconditioning_class(sigma_data)
        elif "schedule" in getattr(self.preconditioning_class, "__dataclass_fields__", {}):
            self._preconditioning = self.preconditioning_class(self._schedule)
        else:
            self._preconditioning = self.preconditioning_class()
        self.set_timesteps()

    def set_timesteps(self, num_inference_steps: int | None = None, device: torch.device | str | None = None) -> None:
        """Plan a trajectory of so many network calls (at most); None: as many as the run's own sampler makes."""
        sampling = _tuples(dict(self.config.sampling))
        if num_inference_steps is not None:
            sampling["calls"] = num_inference_steps
        self._sampling = SamplingConfig(**sampling)
        self._plan = make_plan(self._sampling, self._schedule)
        self.num_inference_steps = len(self._plan.calls)
        self._sigmas = torch.tensor(self._plan.calls, dtype=torch.float64)
        self.timesteps = self._coefficients(self._sigmas).noise
        if device is not None:
            half = torch.device(device).type == "mps"  # which has no float64
            self.timesteps = (self.timesteps.float() if half else self.timesteps).to(device)
        self._solver = SOLVERS[self._plan.solver]()
        self._number, self._call = 0, 0  # of the solver's step, and of the network call
        self._begun: Tensor | None = None  # state at the start of the solver's step
        self._answers: list[Tensor] = []  # denoised images of the step's calls so far
        self._noise: Tensor | None = None
        self._generator: Any = None
        self._state: Tensor | None = None  # where the network is called
        self._told: Tensor | None = None  # the sample that stands for it

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the starting noise."""
        return self._plan.initial_noise_std

    @property
    def sigma(self) -> float:
        """Noise level of the network call that is next."""
        return self._plan.calls[self._call]

    def use_generator(self, generator: torch.Generator | list[torch.Generator] | None) -> None:
        """Draw the noise of a stochastic solver from a generator; `scale_model_input` may need it before the first step."""
        self._generator = generator

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Return what the network is given, c_in x."""
        x = self._at(sample)
        return per_row(self._row_coefficients(x).input, x) * x

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> MultistageSchedulerOutput | tuple[Tensor]:
        """Take the network's output at a state, and return the state at which it is called next.

        Args:
            model_output: raw output of the network, (B, C, H, W).
            timestep: ignored: calls are made in the order of `timesteps`.
            sample: as returned by the step before.
            generator: of the noise of stochastic solvers.
            return_dict: whether to return a MultistageSchedulerOutput instead of a tuple.
        """
        if generator is not None:
            self._generator = generator
        x = self._at(sample)
        c = self._row_coefficients(x)
        denoised = self._bounded(per_row(c.skip, x) * x + per_row(c.out, x) * model_output.to(x.dtype), x)
        self._answers.append(denoised)
        self._call += 1
        self._told = self._state = self._next()
        if not return_dict:
            return (self._told,)
        return MultistageSchedulerOutput(prev_sample=self._told, pred_original_sample=denoised)

    def _at(self, sample: Tensor) -> Tensor:
        """Return the state at which the network is called.

        A sample that no step returned replaces the state, but not between the calls of one step of the solver.
        """
        if self._state is None or (not self._answers and sample is not self._told):
            self._begun = sample if sample.dtype == torch.float64 else sample.float()
            self._noise = None
            self._state, self._told = self._next(), sample
        return self._state

    def _next(self) -> Tensor:
        """Return the state of the next network call, or the result."""
        steps = self._plan.steps
        while self._number < len(steps):
            step, solver = steps[self._number], copy.copy(self._solver)
            answers = iter(self._answers)

            def denoise(x: Tensor, sigma: float, known: Any = answers) -> Tensor:
                for answer in known:
                    found: Tensor = answer
                    return found
                raise PendingCall(x)

            def add_noise(x: Tensor, std: float = step.noise_std) -> Tensor:
                if std == 0:
                    return x
                if self._noise is None:
                    self._noise = randn_tensor(x.shape, generator=self._generator, device=x.device, dtype=x.dtype)
                return x + std * self._noise

            assert self._begun is not None
            try:
                if not solver.ends_at_zero and step.end == 0:  # the output at sigma_min is the result
                    x = denoise(self._begun, step.calls[0])
                    x = x if step.clip is None else x.clamp(-step.clip, step.clip)
                else:
                    x = solver.step(self._begun, step, denoise, add_noise)
            except PendingCall as pending:
                return pending.state
            self._solver, self._begun, self._answers, self._noise = solver, x, [], None
            self._number += 1
        assert self._begun is not None
        return self._begun

    def _coefficients(self, sigma: Tensor) -> Coefficients:
        return self._preconditioning.coefficients(sigma)

    def _row_coefficients(self, x: Tensor) -> Coefficients:
        return self._coefficients(torch.full((len(x),), self.sigma, dtype=torch.float64, device=x.device))

    def _bounded(self, denoised: Tensor, x: Tensor) -> Tensor:
        """Return denoised images within the bounds of sampling.threshold or sampling.clip."""
        if self._sampling.threshold is not None:
            return Thresholded(lambda *_: denoised, self._sampling.threshold)(x, self.sigma)
        if self._sampling.clip is not None and not self._solver.clips:
            return Clipped(lambda *_: denoised, self._sampling.clip)(x, self.sigma)
        return denoised

    def __len__(self) -> int:
        return len(self.timesteps)


def _tuples(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings read from JSON, which has lists for tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
