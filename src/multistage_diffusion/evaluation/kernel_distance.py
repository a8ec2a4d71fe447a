"""The kernel distance (KID), computed by torch-fidelity (extra `eval`)."""

from __future__ import annotations

from torch import Tensor

from ..errors import UserError
from .fidelity import torch_fidelity_package, why_unavailable
from .image_sets import ImageSets
from .registry import METRICS, Display, Metric, MetricValue

SUBSETS, SUBSET_SIZE = 100, 1000  # as published


@METRICS.add("kid")
class KernelDistance(Metric):
    """Kernel distance between samples and the kept features of a reference set; its deviation is over subsets."""

    shown = (
        Display(
            name="kid",
            label="Kernel distance (KID)",
            words="Mean and deviation over random subsets.",
            better="lower",
        ),
    )
    needs = frozenset({"features"})
    against = frozenset({"statistics"})

    def unavailable(self) -> str:
        """Return the missing package."""
        return why_unavailable()

    def measure(self, sets: ImageSets) -> dict[str, MetricValue]:
        """Return "kid"."""
        samples, real = sets.samples.features, sets.real.features
        subset = min(SUBSET_SIZE, len(real), len(samples))
        mean, deviation = kernel_distance(samples, real, subset)
        settings = {"subsets": SUBSETS, "features per subset": subset}
        return {"kid": MetricValue(value=mean, deviation=deviation, settings=settings)}


def kernel_distance(samples: Tensor, real: Tensor, subset: int = SUBSET_SIZE) -> tuple[float, float]:
    """Return the kernel distance (KID, Binkowski et al. 2018): mean and standard deviation over 100 random subsets.

    Args:
        samples: features (N, D).
        real: features (M, D).
        subset: features per subset drawn from each set; at least 2, at most N and M.

    Raises:
        UserError: if torch-fidelity is not installed, or a set is smaller than the subset.
    """
    torch_fidelity_package()
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    if not 2 <= subset <= min(len(samples), len(real)):
        raise UserError(
            f"kernel distance: subset={subset} must be at least 2 and at most the number of features, {len(samples)} of samples "
            f"and {len(real)} of real images"
        )
    found = kid_features_to_metric(
        samples.cpu().double(), real.cpu().double(), kid_subsets=SUBSETS, kid_subset_size=subset, verbose=False
    )
    return found[KEY_METRIC_KID_MEAN], found[KEY_METRIC_KID_STD]
