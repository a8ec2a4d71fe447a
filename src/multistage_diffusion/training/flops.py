"""What training costs in floating-point operations, by count: the same on every machine."""

from __future__ import annotations

from ..config import RunConfig
from ..errors import UserError
from ..nets.cost import BACKWARD, network_cost
from .batches import row_counts, stage_shares


def flops_per_image(config: RunConfig) -> float:
    """Return the floating-point operations, 2 per multiply-add, of one image in a training step.

    Three times those of the forward pass (Kaplan et al. 2020, "Scaling laws for neural language models", 2.1), averaged
    over the stages with the rows that each gets, or, where a step trains one stage, with the share of the steps. The
    optimiser, the averaged weights, and what is not a convolution, linear layer or attention product are left out.

    Args:
        config: a run's; it knows the shape of what the network sees.

    Raises:
        UserError: if it does not.
    """
    shape, field = config.input_shape, "codec.shape" if config.codec.used else "data.shape"
    if len(shape) != 3:
        raise UserError(f"{field}={list(shape)} must be [channels, height, width]")
    shares = stage_shares(config.training, config.stages, config.diffusion.prior)
    rows = shares if config.training.update_mode == "one-stage" else row_counts(config.training, shares)
    stages = network_cost(config.network, *shape[1:]).stages
    forward = sum(count * stage.true_flops for count, stage in zip(rows, stages, strict=True)) / sum(rows)
    return (1 + BACKWARD) * forward
