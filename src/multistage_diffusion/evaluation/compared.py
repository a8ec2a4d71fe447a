"""The result of comparing runs."""

from __future__ import annotations

from dataclasses import dataclass

from .likelihood import Estimate


@dataclass(frozen=True, kw_only=True)
class ComparedRun:
    """A run in a comparison.

    Attributes:
        name: name of its folder; unique in the comparison.
        step: step of the checkpoint.
        edges: interior stage edges, sigma.
        errors: mean squared error per dimension at each noise level.
        differences: of the errors from the base's, relative to them; of an excess relative to the run's own error; empty for the
            base.
        bound: difference of the variational bound from the base's, in nats per dimension; None for the base.
        training: (petaFLOPs of training, Fréchet distance) of the evaluations while training.
        sampling: (gigaFLOPs per image, Fréchet distance) of the evaluations of this checkpoint.
    """

    name: str
    step: int
    edges: tuple[float, ...]
    errors: tuple[float, ...]
    differences: tuple[Estimate, ...]
    bound: Estimate | None
    training: tuple[tuple[float, float], ...]
    sampling: tuple[tuple[float, float], ...]


@dataclass(frozen=True, kw_only=True)
class RunsComparison:
    """Runs compared on the same rows and noise; the first one is the base.

    Attributes:
        sigmas: the noise levels, ascending.
        rows: number of images.
        excess: whether they are training images and the base is the optimal denoiser of all of these; else they are held out.
        features: of the Fréchet distances in the curves; empty if there are none.
        runs: in the order given.
    """

    sigmas: tuple[float, ...]
    rows: int
    excess: bool
    features: str
    runs: tuple[ComparedRun, ...]
