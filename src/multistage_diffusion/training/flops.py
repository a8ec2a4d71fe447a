"""Analytic count of the floating-point operations of training; it does not depend on the machine."""

from __future__ import annotations

from ..config import RunConfig
from ..errors import UserError
from ..nets.cost import BACKWARD, network_cost
from ..shares import row_counts, stage_shares


def flops_per_image(config: RunConfig) -> float:
    """Return the FLOPs per image of a training step, 2 per multiply-add.

    This is three times the forward pass (Kaplan et al. 2020, "Scaling laws for neural language models", 2.1), averaged
    over the stages. The weights of this average are each stage's rows, or its share of the steps if a step trains one
    stage. Only convolutions, linear layers and attention products count; the optimiser and the EMA do not. A frozen
    encoder has no backward pass.

    Args:
        config: of the run; `codec.shape` or `data.shape` is the input shape of the network.

    Raises:
        UserError: if that shape is not [channels, height, width].
    """
    shape, field = config.input_shape, "codec.shape" if config.codec.used else "data.shape"
    if len(shape) != 3:
        raise UserError(f"{field}={list(shape)} must be [channels, height, width]")
    shares = stage_shares(config.training, config.stages, config.diffusion.prior)
    rows = shares if config.training.update_mode == "one-stage" else row_counts(config.training, shares)
    cost = network_cost(config.network, *shape[1:])
    forward = sum(count * stage.true_flops for count, stage in zip(rows, cost.stages, strict=True)) / sum(rows)
    frozen = cost.shared_true_flops if config.training.freeze == "encoder" else 0
    return (1 + BACKWARD) * forward - BACKWARD * frozen
