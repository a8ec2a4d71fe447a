"""Averages of any power-function profile, chosen after training (Karras et al. 2024, "Analyzing and Improving the Training
Dynamics of Diffusion Models", section 3.1).

The average at time t with exponent gamma is the integral of the weights at time tau times the profile

    p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1), 0 <= tau <= t.

Averages are linear in their profiles. So the average of a target profile is nearly sum_i x_i (average i), where x minimises
the squared distance of sum_i x_i p_i from the target. It depends only on inner products, which have a closed form: for
t_a <= t_b,

    <p_a, p_b> = (gamma_a + 1) (gamma_b + 1) / (gamma_a + gamma_b + 1) (t_a / t_b)^gamma_b / t_b.

These are integrals over time, which stand for sums over steps. Unlike in the paper, sum_i x_i = 1 is required (by a Lagrange
multiplier): weights that do not change keep their values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..config.training import WIDEST_PROFILE
from ..errors import UserError, require
from .checkpoint import checkpoint_step, list_checkpoints, profile_file, restore_module, stored_tensors
from .ema import power_exponent

TOLERANCE = 0.1  # largest relative distance of a combination from its profile
_WIDTHS = tuple(k / 1000 for k in range(5, 289))  # that messages suggest


@dataclass(frozen=True)
class Profile:
    """A power-function profile: its width (standard deviation over step, see `power_exponent`), and the step of its end."""

    sigma_rel: float
    step: int


def inner_products(a: Sequence[Profile], b: Sequence[Profile]) -> Tensor:
    """Return the integral of the product of every two profiles, per step, float64 (len(a), len(b))."""
    (one, end), (other, other_end) = _numbers(a), _numbers(b)
    one, end = one[:, None], end[:, None]
    first, last = torch.minimum(end, other_end), torch.maximum(end, other_end)
    later = torch.where(end > other_end, one, other)  # exponent of the profile that ends last
    return (one + 1) * (other + 1) / (one + other + 1) * (first / last) ** later / last


def _numbers(profiles: Sequence[Profile]) -> tuple[Tensor, Tensor]:
    """Return the exponents and the steps of profiles."""
    pairs = [(power_exponent(profile.sigma_rel), profile.step) for profile in profiles]
    exponents, steps = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    return exponents, steps


def combinations(stored: Sequence[Profile], targets: Sequence[Profile]) -> tuple[Tensor, Tensor]:
    """Return the combination of stored profiles that is nearest to each target.

    Args:
        stored: profiles that all differ.
        targets: M profiles.

    Returns:
        The factors, whose sums are 1, float64 (M, len(stored)), and the distances of the combinations from the targets, each
        divided by the norm of its target (root mean square over steps), float64 (M,).
    """
    gram, right = inner_products(stored, stored), inner_products(stored, targets)
    norms = gram.diagonal().sqrt()[:, None]  # solved for factors of normalised profiles, which is better conditioned
    size, sums = len(stored), norms.min() / norms
    system, given = gram.new_zeros(size + 1, size + 1), gram.new_empty(size + 1, len(targets))
    system[:size, :size], system[:size, size:], system[size:, :size] = gram / norms / norms.T, sums, sums.T
    given[:size], given[size] = right / norms, norms.min()
    factors = torch.linalg.lstsq(system, given).solution[:size] / norms
    squares = torch.stack([inner_products([target], [target])[0, 0] for target in targets])
    distances = squares - 2 * (factors * right).sum(0) + (factors * (gram @ factors)).sum(0)
    return factors.T, (distances.clamp(min=0) / squares).sqrt()


def combination(stored: Sequence[Profile], target: Profile) -> Tensor:
    """Return the factors of the combination of stored profiles that is nearest to a target, float64 (len(stored),).

    Raises:
        UserError: if it is not near, naming the nearest width that has one.
    """
    factors, distances = combinations(stored, [target])
    if distances[0] > TOLERANCE:
        widths = sorted({*_WIDTHS, *(profile.sigma_rel for profile in stored)})
        _, others = combinations(stored, [Profile(width, target.step) for width in widths])
        near = [width for width, other in zip(widths, others.tolist(), strict=True) if other <= TOLERANCE]
        nearest = min(near, key=lambda width: abs(width - target.sigma_rel))
        raise UserError(
            f"ema={target.sigma_rel}: the {len(stored)} averages stored up to step {target.step} give a profile of this width "
            f"only to within {distances[0]:.0%}; give {nearest}, the nearest that they do, or train with more snapshots "
            "(training.ema_snapshot_every)"
        )
    return factors[0]


@torch.no_grad()
def load_average(
    module: nn.Module, checkpoint: Path, snapshots: Path, widths: Sequence[float], sigma_rel: float
) -> None:
    """Load the average of a power-function profile at a checkpoint's step into a whole network, on the CPU.

    Stored tensors are read one at a time; the sums are float64.

    Args:
        module: the network.
        checkpoint: folder of the checkpoint.
        snapshots: folder of the snapshots; those before the checkpoint are used, and the checkpoint's own averages.
        widths: training.ema_profiles of the run.
        sigma_rel: width of the profile.

    Raises:
        UserError: if the run has no such averages, they do not represent a profile of this width, or a file is damaged.
    """
    require(0 < sigma_rel < WIDEST_PROFILE, f"ema={sigma_rel} must be above 0 and below {WIDEST_PROFILE:.4f}")
    step = checkpoint_step(checkpoint)
    if not widths or not step:
        raise UserError(
            f"ema={sigma_rel}: {checkpoint} holds no averages to combine; leave it out, or train a run with "
            "training.ema_profiles=[0.05,0.1]"
        )
    near = sigma_rel if sigma_rel in widths else widths[0]
    restore_module(module, checkpoint, profile_file(near))
    if near == sigma_rel:
        return
    folders = [path for path in list_checkpoints(snapshots) if checkpoint_step(path) < step] + [checkpoint]
    files = [(folder, width) for folder in folders for width in widths]
    factors = combination(
        [Profile(width, checkpoint_step(folder)) for folder, width in files], Profile(sigma_rel, step)
    )
    parameters = dict(module.named_parameters())
    sums = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in parameters.items()}
    for (folder, width), factor in zip(files, factors.tolist(), strict=True):
        for name, value in stored_tensors(folder, profile_file(width), parameters):
            sums[name].add_(value, alpha=factor)
    for name, parameter in parameters.items():
        parameter.copy_(sums[name])
