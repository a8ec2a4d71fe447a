"""Decoder widths of a plan, computed from measured gains and a budget; nothing is trained here.

The model: within the relevant widths, the loss of stage k falls by gain_k when its decoder's FLOPs c_k grow e-fold,

    loss_k(c_k) = const - gain_k ln c_k,

with gain_k measured (workflow.plan). The objective's loss is sum_k p_k loss_k, and the budget B of mean FLOPs per row
requires sum_k s_k c_k = B - encoder, where s_k is the stage's share of the training rows or, if sampling is to count, a
weighted mean of that and its share of the sampler's calls. The loss is then least (Lagrange) where c_k is proportional to
p_k gain_k / s_k.
The logarithm is a model; its slope is measured.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .config import NetworkConfig
from .errors import UserError
from .nets.cost import network_cost

TOLERANCE = 0.03  # relative distance of a network's cost from the budget; widths are discrete
STEP = 4  # candidate widths are its multiples, and the base's own
WIDEST = 4096


@dataclass(frozen=True)
class WidthOption:
    """A candidate width of a decoder, its forward FLOPs for one row (2 per multiply-add), and what else it sets.

    `others` are names and values of other settings per stage, see `NetworkConfig.decoder_choices`.
    """

    width: int
    flops: int
    others: tuple[tuple[str, Any], ...] = ()


def decoder_flops(
    network: NetworkConfig, stage: int, width: int, size: tuple[int, int], others: Mapping[str, Any] | None = None
) -> int | None:
    """Return the forward FLOPs of one stage's decoder for one row (including its encoder if nothing is shared).

    Args:
        network: its encoder and depth are kept.
        stage: index, 0 for the lowest noise.
        width: width of the decoder.
        size: (height, width) of the network's input.
        others: other settings per stage instead of the stage's own.

    Returns:
        None if that width is not valid there, or the family warns about it.
    """
    alone = _alone(network, stage, width, others or {})
    if alone is None:
        return None
    flops, shared = _cost(alone, size)
    return flops - shared


def _alone(network: NetworkConfig, stage: int, width: int, others: Mapping[str, Any]) -> NetworkConfig | None:
    """Return a network with one stage's decoder alone, at another width; None if that is not valid or no good."""
    try:
        alone = network.single_stage(stage, width, **others)
    except UserError:
        return None
    return None if alone.advice() else alone


def encoder_flops(network: NetworkConfig, size: tuple[int, int]) -> int:
    """Return the forward FLOPs of the shared encoder for one row; 0 if nothing is shared."""
    return _cost(network, size)[1]


def mean_flops(network: NetworkConfig, shares: Sequence[float], size: tuple[int, int]) -> float:
    """Return the mean forward FLOPs of a row, given each stage's share of the rows (the shares sum to 1)."""
    stages = network_cost(network, *size).stages
    return sum(share * stage.true_flops for share, stage in zip(shares, stages, strict=True))


def _cost(network: NetworkConfig, size: tuple[int, int]) -> tuple[int, int]:
    """Return the FLOPs of the first stage, and the shared encoder's part of them."""
    cost = network_cost(network, *size)
    return cost.stages[0].true_flops, cost.shared_true_flops


def width_options(network: NetworkConfig, stage: int, size: tuple[int, int], most: float) -> list[WidthOption]:
    """Return the valid widths of one stage's decoder, ascending, up to the first that takes more than `most` FLOPs.

    A width comes once for each of the family's `decoder_choices`.

    Args:
        network: the base, with one decoder per stage.
        stage: index, 0 for the lowest noise.
        size: (height, width) of the network's input.
        most: FLOPs of one row.
    """
    options = []
    for width in sorted({*range(STEP, WIDEST + 1, STEP), *network.decoder_widths}):
        found = []
        for others in network.decoder_choices(width):
            flops = decoder_flops(network, stage, width, size, others)
            if flops is not None:
                found.append(WidthOption(width, flops, tuple(others.items())))
        options += found
        if found and min(option.flops for option in found) > most:
            break
    return options


def probe_widths(network: NetworkConfig) -> tuple[int, int]:
    """Return the (narrow, wide) decoder widths of the two probes.

    Wide is the largest valid width up to the base's largest, narrow the valid width nearest to half of it.

    Raises:
        UserError: if fewer than two widths are valid for every stage.
    """
    largest, stages = max(network.decoder_widths), range(len(network.decoder_widths))
    valid = [w for w in range(2, largest + 1) if all(_alone(network, k, w, {}) is not None for k in stages)]
    if len(valid) < 2:
        raise UserError(
            f"network.decoder_widths={list(network.decoder_widths)}: a plan compares two widths, but up to {largest} no two "
            "are valid; give a larger one"
        )
    wide = valid.pop()
    return min(valid, key=lambda w: abs(w - wide / 2)), wide


def halfway_shares(masses: Sequence[float]) -> tuple[float, ...]:
    """Return each stage's share of rows: the mean of the prior's mass (the masses sum to 1) and an equal share."""
    return tuple((mass + 1 / len(masses)) / 2 for mass in masses)


def counted_gain(gain: float, error: float) -> float:
    """Return the gain that a plan uses: at least its standard error, because smaller gains are not resolved."""
    return max(gain, error)


def ideal_flops(worth: Sequence[float], shares: Sequence[float], budget: float) -> list[float]:
    """Return the decoders' FLOPs that maximise sum_k worth_k ln(flops_k) where sum_k share_k flops_k = budget.

    Args:
        worth: p_k gain_k of each stage, >= 0, not all zero.
        shares: each stage's share of the rows, positive.
        budget: mean FLOPs of a row that the decoders may take.
    """
    return [budget * w / sum(worth) / share for w, share in zip(worth, shares, strict=True)]


def best_widths(
    options: Sequence[Sequence[WidthOption]],
    worth: Sequence[float],
    shares: Sequence[float],
    low: float,
    high: float,
) -> tuple[WidthOption, ...] | None:
    """Return the best combination within a budget, exactly, with one option for each stage.

    It maximises sum_k worth_k ln(flops_k); of equal combinations the cheapest is returned. The combinations of each
    half of the stages are listed and sorted by cost. A sliding maximum over one list gives the best partner of each
    entry of the other. So all combinations are considered, but only about the square root of their number is listed.

    Args:
        options: candidate widths of each stage.
        worth: p_k gain_k of each stage, >= 0.
        shares: each stage's share of the rows.
        low, high: bounds of the mean FLOPs of a row, sum_k share_k flops_k.

    Returns:
        None if no combination lies within the bounds.
    """
    half = len(options) // 2
    left = _combinations(options[:half], worth[:half], shares[:half])
    right = _combinations(options[half:], worth[half:], shares[half:])
    best: tuple[float, float, tuple[WidthOption, ...]] | None = None
    window: deque[int] = deque()  # indices into right: costs ascend, values descend
    entering = 0
    for cost, value, chosen in reversed(left):
        while entering < len(right) and right[entering][0] <= high - cost:
            while window and right[window[-1]][1] < right[entering][1]:
                window.pop()
            window.append(entering)
            entering += 1
        while window and right[window[0]][0] < low - cost:
            window.popleft()
        if window:
            more, other, rest = right[window[0]]
            if best is None or (value + other, -cost - more) > best[:2]:
                best = value + other, -cost - more, chosen + rest
    return None if best is None else best[2]


def nearest_costs(
    options: Sequence[Sequence[WidthOption]], shares: Sequence[float], budget: float
) -> tuple[float | None, float | None]:
    """Return the largest mean FLOPs below a budget and the smallest from it on, over all combinations (None: none)."""
    half = len(options) // 2
    nothing = [0.0] * len(options)
    left = [c for c, _, _ in _combinations(options[:half], nothing[:half], shares[:half])]
    right = [c for c, _, _ in _combinations(options[half:], nothing[half:], shares[half:])]
    below, above = -math.inf, math.inf
    for cost in left:
        at = bisect.bisect_left(right, budget - cost)
        if at:
            below = max(below, cost + right[at - 1])
        if at < len(right):
            above = min(above, cost + right[at])
    return below if math.isfinite(below) else None, above if math.isfinite(above) else None


def _combinations(
    options: Sequence[Sequence[WidthOption]], worth: Sequence[float], shares: Sequence[float]
) -> list[tuple[float, float, tuple[WidthOption, ...]]]:
    """Return (mean FLOPs, value, options) of every combination, sorted by FLOPs."""
    found = []
    for chosen in itertools.product(*options):
        cost = sum(share * option.flops for share, option in zip(shares, chosen, strict=True))
        value = sum(w * math.log(option.flops) for w, option in zip(worth, chosen, strict=True))
        found.append((cost, value, chosen))
    return sorted(found, key=lambda combination: combination[0])


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The compute budget of a network's decoders.

    Attributes:
        flops: mean forward FLOPs of a row, encoder included.
        encoder: the shared encoder's part of them.
        shares: each stage's share of the rows.
        options: candidate widths of each stage.

    Raises:
        UserError: if no combination of the options is within TOLERANCE of it, naming the nearest possible budgets.
    """

    flops: float
    encoder: int
    shares: tuple[float, ...]
    options: tuple[tuple[WidthOption, ...], ...]

    @classmethod
    def of(cls, flops: float, network: NetworkConfig, shares: Sequence[float], size: tuple[int, int]) -> Budget:
        """Return a budget with all the widths that can meet it."""
        encoder = encoder_flops(network, size)
        room = max(0.0, (1 + TOLERANCE) * flops - encoder)
        options = (tuple(width_options(network, k, size, room / share)) for k, share in enumerate(shares))
        return cls(flops=flops, encoder=encoder, shares=tuple(shares), options=tuple(options))

    def __post_init__(self) -> None:
        if self.choose([0.0] * len(self.shares)) is not None:
            return
        found = nearest_costs(self.options, self.shares, self.flops - self.encoder)
        near = " and ".join(f"{(cost + self.encoder) / 1e6:.4g}" for cost in found if cost is not None)
        raise UserError(
            f"budget={self.flops / 1e6:.4g} MFLOPs: no valid decoder widths come within {TOLERANCE:.0%} of it beside an encoder "
            f"of {self.encoder / 1e6:.4g} MFLOPs; the nearest budgets that can be met: {near} MFLOPs"
        )

    def choose(self, worth: Sequence[float]) -> tuple[WidthOption, ...] | None:
        """Return the best options within TOLERANCE of the budget, given p_k gain_k of each stage; see `best_widths`."""
        low, high = ((1 + sign * TOLERANCE) * self.flops - self.encoder for sign in (-1, 1))
        return best_widths(self.options, worth, self.shares, low, high)


@dataclass(frozen=True, kw_only=True)
class PlannedStage:
    """The results of a plan for one stage.

    Attributes:
        stage: 1 for the lowest noise.
        sigma: (low, high) of its noise; None for infinity.
        share: share of the training rows.
        calls: the sampler's calls of the denoiser, per image.
        cost_share: share with which the decoder's FLOPs count for the budget.
        weight: lambda_k in the objective.
        loss_narrow, loss_wide: held-out losses of the two probes.
        loss_optimal: loss of the optimal denoiser of the training images on the same rows; None if they are too many.
        flops_narrow, flops_wide: forward FLOPs of the probes' decoders for one row.
        gain: decrease of the loss when the decoder's FLOPs grow e-fold; `gain_error` is its standard error over rows.
        gain_counted: the gain that the plan uses, see `counted_gain`.
        flops_ideal: FLOPs of the decoder if any width were possible.
        width, flops: of the chosen decoder.
        others: its other settings that were planned.
    """

    stage: int
    sigma: tuple[float, float | None]
    share: float
    calls: int
    cost_share: float
    weight: float
    loss_narrow: float
    loss_wide: float
    loss_optimal: float | None
    flops_narrow: int
    flops_wide: int
    gain: float
    gain_error: float
    gain_counted: float
    flops_ideal: float
    width: int
    flops: int
    others: dict[str, Any] = field(default_factory=dict)


def reasons(stages: Sequence[PlannedStage], budget: float, flops: float) -> list[str]:
    """Return sentences that explain a plan.

    Args:
        stages: the stages of the plan.
        budget, flops: mean forward FLOPs of a row, requested and planned.
    """
    worth = [s.weight * s.gain_counted for s in stages]
    first = max(stages, key=lambda s: s.gain)
    if first.gain > 0:
        most = (
            f"A row of stage {first.stage} gains most from a wider decoder: for each factor e of its arithmetic its loss falls "
            f"by {first.gain:.2g} (± {first.gain_error:.1g}), {first.gain / first.loss_narrow:.0%} of the narrow probe's."
        )
    else:
        most = "In no stage the wide probe has the lower loss: the probes are too short. Give more --probe-steps."
    costs = [s.cost_share * s.flops for s in stages]
    said = [
        most,
        "If loss falls with the logarithm of arithmetic (a model; its slopes are measured), arithmetic per row belongs in "
        f"proportion to weight x gain / share: {_listed(s.flops_ideal / 1e6 for s in stages)} MFLOPs.",
        f"Of the valid widths that cost within {TOLERANCE:.0%} of {budget / 1e6:.4g} MFLOPs a row, "
        f"{_listed(s.width for s in stages)} serve that best; they cost {flops / 1e6:.4g}, and share k x decoder k is "
        f"{_listed(100 * cost / sum(costs) for cost in costs)} % of the decoders'.",
    ]
    said += [f"Their {name} are {_listed(s.others[name] for s in stages)}." for name in stages[0].others]
    worse = [s.stage for s in stages if s.gain < -2 * s.gain_error]
    if worse:
        said.append(
            f"In {_stages(worse)} the wide probe is worse, beyond chance: it learns more slowly, and these probes are too short "
            "to compare widths there. The plan counts a gain of one standard error; more --probe-steps would tell more."
        )
    unsure = [
        s.stage
        for s, value in zip(stages, worth, strict=True)
        if value and s.gain < s.gain_error and s.stage not in worse
    ]
    if unsure:
        said.append(
            f"The gain of {_stages(unsure)} is below its standard error and counts as that: more --probe-steps or held-out "
            "images would tell more."
        )
    far = [s.stage for s in stages if not s.flops_narrow / 2 <= s.flops <= 2 * s.flops_wide]
    if far:
        said.append(f"The decoder of {_stages(far)} lies far outside the probed widths: the model is stretched there.")
    known = [(s.stage, s.loss_wide / s.loss_optimal) for s in stages if s.loss_optimal]
    below, near = [k for k, ratio in known if ratio < 1], [k for k, ratio in known if 1 <= ratio <= 1.1]
    if below:
        said.append(
            f"In {_stages(below)} the wide probe does better on unseen images than a perfect memory of the training images: "
            "that loss is no floor there."
        )
    if near:
        said.append(
            f"In {_stages(near)} the wide probe is within 10 % of what a perfect memory of the training images reaches."
        )
    return said


def _stages(numbers: Sequence[int]) -> str:
    return f"stage{'s' * (len(numbers) > 1)} {' and '.join(map(str, numbers))}"


def _listed(values: Iterable[float]) -> str:
    return " / ".join(f"{value:.3g}" for value in values)
