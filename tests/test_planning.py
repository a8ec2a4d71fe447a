from __future__ import annotations

import dataclasses
import itertools
import math
import random
import re
from collections.abc import Sequence

import pytest

from multistage_diffusion.config import NetworkConfig
from multistage_diffusion.config.presets import preset
from multistage_diffusion.nets.cost import network_cost
from multistage_diffusion.planning import (
    TOLERANCE,
    Budget,
    PlannedStage,
    WidthOption,
    best_widths,
    counted_gain,
    decoder_flops,
    encoder_flops,
    halfway_shares,
    ideal_flops,
    mean_flops,
    nearest_costs,
    probe_widths,
    reasons,
    width_options,
)

SIZE = (8, 8)
DIGITS = preset("digits").network
SHARES = (0.55, 0.35, 0.1)

Options = Sequence[Sequence[WidthOption]]


def value(worth: Sequence[float], flops: Sequence[float]) -> float:
    return sum(w * math.log(f) for w, f in zip(worth, flops, strict=True))


def cost(shares: Sequence[float], flops: Sequence[float]) -> float:
    return sum(s * f for s, f in zip(shares, flops, strict=True))


def plain_loop(
    options: Options, worth: Sequence[float], shares: Sequence[float], low: float, high: float
) -> tuple[WidthOption, ...] | None:
    best, most = None, -math.inf
    for chosen in itertools.product(*options):
        flops = [option.flops for option in chosen]
        if low <= cost(shares, flops) <= high and value(worth, flops) > most:
            best, most = chosen, value(worth, flops)
    return best


def random_problem(seed: int) -> tuple[list[list[WidthOption]], list[float], list[float], float]:
    draw = random.Random(seed)
    stages = draw.choice([1, 2, 3, 4, 5])
    options = [
        [WidthOption(w, round(w**2 * draw.uniform(0.9, 1.1) * 100)) for w in sorted(draw.sample(range(4, 80, 4), 6))]
        for _ in range(stages)
    ]
    shares = [draw.uniform(0.05, 1) for _ in range(stages)]
    worth = [draw.choice([0.0, draw.uniform(0, 2)]) for _ in range(stages)]
    budget = cost(shares, [draw.choice(o).flops for o in options]) * draw.uniform(0.9, 1.1)
    return options, worth, shares, budget


# -- allocation -------------------------------------------------------------------------------------------------------


def test_the_closed_form_beats_every_other_point_of_a_fine_grid() -> None:
    worth, shares, budget = (0.5, 0.2, 0.05), (0.5, 0.3, 0.2), 100.0
    ideal = ideal_flops(worth, shares, budget)
    assert cost(shares, ideal) == pytest.approx(budget)
    assert ideal == pytest.approx([budget * w / 0.75 / s for w, s in zip(worth, shares, strict=True)])
    best, most = None, -math.inf
    for first, second in itertools.product(range(1, 400), repeat=2):  # parts of the budget, in quarters of a percent
        if first + second >= 400:
            continue
        parts = (first, second, 400 - first - second)
        flops = [budget * part / 400 / share for part, share in zip(parts, shares, strict=True)]
        if value(worth, flops) > most:
            best, most = flops, value(worth, flops)
    assert best == pytest.approx(ideal, rel=0.05)
    assert most <= value(worth, ideal)
    assert value(worth, ideal) - most < 1e-4


def test_a_gain_counts_at_least_as_its_error() -> None:
    assert [counted_gain(0.3, 0.1), counted_gain(0.05, 0.1), counted_gain(-0.2, 0.1)] == [0.3, 0.1, 0.1]


def test_shares_lie_halfway_to_equal_ones() -> None:
    assert halfway_shares((0.7, 0.2, 0.1)) == pytest.approx(((0.7 + 1 / 3) / 2, (0.2 + 1 / 3) / 2, (0.1 + 1 / 3) / 2))


# -- the search -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(60))
def test_the_search_finds_what_a_plain_loop_finds(seed: int) -> None:
    options, worth, shares, budget = random_problem(seed)
    low, high = 0.97 * budget, 1.03 * budget
    found, wanted = best_widths(options, worth, shares, low, high), plain_loop(options, worth, shares, low, high)
    assert (found is None) == (wanted is None)
    if found is not None and wanted is not None:
        assert all(option in known for option, known in zip(found, options, strict=True))
        assert low <= cost(shares, [o.flops for o in found]) <= high
        assert value(worth, [o.flops for o in found]) == pytest.approx(value(worth, [o.flops for o in wanted]))


def test_the_random_problems_have_answers_and_none() -> None:
    answers = [
        best_widths(options, worth, shares, 0.97 * budget, 1.03 * budget)
        for options, worth, shares, budget in map(random_problem, range(60))
    ]
    assert 5 < sum(a is None for a in answers) < 55


@pytest.mark.parametrize("seed", range(20))
def test_the_nearest_costs_are_those_of_a_plain_loop(seed: int) -> None:
    options, _, shares, budget = random_problem(seed)
    costs = [cost(shares, [o.flops for o in chosen]) for chosen in itertools.product(*options)]
    below, above = nearest_costs(options, shares, budget)
    assert below == (pytest.approx(max(c for c in costs if c < budget)) if min(costs) < budget else None)
    assert above == (pytest.approx(min(c for c in costs if c >= budget)) if max(costs) >= budget else None)


@pytest.mark.slow
def test_a_stage_with_all_the_gain_gets_all_it_can() -> None:
    budget = Budget.of(18.6e6, DIGITS, SHARES, SIZE)
    for stage in range(3):
        chosen = budget.choose([float(k == stage) for k in range(3)])
        assert chosen is not None
        others = sum(SHARES[k] * budget.options[k][0].flops for k in range(3) if k != stage)
        room = (1 + TOLERANCE) * budget.flops - budget.encoder - others
        affordable = [o for o in budget.options[stage] if SHARES[stage] * o.flops <= room]
        assert chosen[stage] == affordable[-1]
        assert chosen[stage].width >= 32


def test_of_equals_the_cheapest_is_taken() -> None:
    options = [[WidthOption(w, w) for w in (4, 8, 12, 16)] for _ in range(4)]
    found = best_widths(options, (1.0, 0.0, 0.0, 0.0), (1.0,) * 4, 25, 32)
    assert found is not None
    assert [o.width for o in found] == [16, 4, 4, 4]
    found = best_widths(options, (0.0, 0.0, 0.0, 1.0), (1.0,) * 4, 30, 32)  # too dear to be left alone
    assert found is not None
    assert sorted(o.width for o in found) == [4, 4, 8, 16]
    assert found[3].width == 16


# -- costs of real networks -------------------------------------------------------------------------------------------


LDM = NetworkConfig.of(
    family="ldm",
    encoder_width=64,
    decoder_widths=(128, 64),
    channel_mult=(1,),
    blocks_per_level=1,
    attention_factors=(1,),
    decoder_attention=(True, False),
)


@pytest.mark.parametrize(
    "network", [DIGITS, dataclasses.replace(DIGITS, separate=True), LDM], ids=["one", "many", "ldm"]
)
def test_the_parts_add_up_to_the_whole_network(network: NetworkConfig) -> None:
    whole = network_cost(network, *SIZE)
    parts = [decoder_flops(network, k, width, SIZE) for k, width in enumerate(network.decoder_widths)]
    encoder = encoder_flops(network, SIZE)
    assert [encoder + (part or 0) for part in parts] == [stage.true_flops for stage in whole.stages]
    assert (encoder == 0) == network.separate
    shares = (0.5, 0.3, 0.2)[: len(parts)]
    assert mean_flops(network, shares, SIZE) == pytest.approx(cost(shares, [s.true_flops for s in whole.stages]))


def test_a_decoder_that_does_not_attend_is_cheaper() -> None:
    first, second = (decoder_flops(LDM, k, 96, SIZE) for k in range(2))
    assert first is not None
    assert second is not None
    assert second < first
    assert decoder_flops(LDM, 0, 32, SIZE) is None  # valid, but deaf to its noise


def test_the_options_are_the_valid_widths_up_to_the_first_too_dear() -> None:
    options = width_options(DIGITS, 0, SIZE, 30e6)
    assert [o.width for o in options] == [4, 8, 12, 16, 20, 24, 32, 40]
    assert options[-2].flops <= 30e6 < options[-1].flops
    odd = NetworkConfig.of(
        family="ddpmpp", encoder_width=6, decoder_widths=(6,), channel_mult=(1,), attention_factors=(1,)
    )
    assert 6 in [o.width for o in width_options(odd, 0, SIZE, 1e6)]  # the base's own is no multiple of four


def test_probes_are_of_the_largest_width_and_its_half() -> None:
    assert probe_widths(DIGITS) == (16, 32)
    assert probe_widths(preset("images-32-gpu").network) == (64, 128)
    assert probe_widths(preset("celebahq-ldm").network) == (128, 256)
    with pytest.raises(ValueError, match=r"network\.decoder_widths=\[4\]: .* give a larger one"):
        probe_widths(NetworkConfig.of(family="ddpmpp", encoder_width=8, decoder_widths=(4,), attention_factors=()))


@pytest.mark.parametrize(("flops", "known"), [(2e6, False), (1e6, False), (18.6e6, True)])
def test_a_budget_that_cannot_be_met_names_those_that_can(flops: float, known: bool) -> None:
    if known:
        assert Budget.of(flops, DIGITS, SHARES, SIZE).choose([1, 1, 1])
        return
    with pytest.raises(ValueError, match="no valid decoder widths come within 3%") as error:
        Budget.of(flops, DIGITS, SHARES, SIZE)
    near = re.findall(r"[\d.]+", str(error.value).rpartition(":")[2])
    assert near
    for text in near:
        assert Budget.of(float(text) * 1e6, DIGITS, SHARES, SIZE).flops > flops


def test_both_neighbours_of_a_budget_are_named() -> None:
    costs = [encoder_flops(LDM, SIZE) + o.flops for o in width_options(LDM, 0, SIZE, 1e8)[:2]]
    between = math.sqrt(costs[0] * costs[1])
    with pytest.raises(ValueError) as error:
        Budget.of(between, LDM, (1.0,), SIZE)
    assert str(error.value).endswith(f"can be met: {costs[0] / 1e6:.4g} and {costs[1] / 1e6:.4g} MFLOPs")


# -- depth ------------------------------------------------------------------------------------------------------------

DIT = NetworkConfig.of(
    "dit", channels=1, encoder_width=16, decoder_widths=(32, 16, 16), decoder_depths=(4, 2, 1), encoder_depth=2, head_channels=8
)  # fmt: skip


def test_a_transformer_s_options_have_depths_in_proportion_to_their_widths() -> None:
    options = width_options(DIT, 2, SIZE, 2e6)
    found = {width: [dict(o.others)["decoder_depths"] for o in options if o.width == width] for width in (8, 16, 32)}
    assert found == {8: [1], 16: [2, 3], 32: [3, 4, 5, 6]}
    assert all(option.width % 8 == 0 for option in options)
    for option in options:
        alone = DIT.single_stage(2, option.width, **dict(option.others))
        cost = network_cost(alone, *SIZE)
        assert option.flops == cost.stages[0].true_flops - cost.shared_true_flops
    assert min(o.flops for o in options if o.width == options[-1].width) > 2e6


def test_depths_are_chosen_with_the_widths() -> None:
    whole = mean_flops(DIT, SHARES, SIZE)
    chosen = Budget.of(whole, DIT, SHARES, SIZE).choose([1.0, 0.1, 0.1])
    assert chosen is not None
    assert chosen[0].width > chosen[1].width
    planned_network = dataclasses.replace(
        DIT,
        decoder_widths=tuple(o.width for o in chosen),
        decoder_depths=tuple(dict(o.others)["decoder_depths"] for o in chosen),
    )
    assert mean_flops(planned_network, SHARES, SIZE) == pytest.approx(whole, rel=0.03)


def test_probes_of_other_numbers_of_stages_are_as_deep_as_the_deepest() -> None:
    assert DIT.largest_decoders(2) == {
        "decoder_widths": (32, 32),
        "decoder_depths": (4, 4),
        "decoder_head_channels": None,
    }


# -- words ------------------------------------------------------------------------------------------------------------


def planned(stage: int, **changes: object) -> PlannedStage:
    values: dict[str, object] = {
        "stage": stage,
        "sigma": (0.0, None),
        "share": 0.5,
        "calls": 7,
        "cost_share": 0.5,
        "weight": 0.5,
        "loss_narrow": 1.0,
        "loss_wide": 0.8,
        "loss_optimal": 0.5,
        "flops_narrow": 10,
        "flops_wide": 40,
        "gain": 0.2 / stage,
        "gain_error": 0.01,
        "gain_counted": 0.2 / stage,
        "flops_ideal": 3e6,
        "width": 8,
        "flops": 20,
    }
    return PlannedStage(**{**values, **changes})  # type: ignore[arg-type]


def test_the_reasons_name_the_stages_that_they_are_about() -> None:
    deep = [planned(1, others={"decoder_depths": 3}), planned(2, others={"decoder_depths": 1})]
    assert "Their decoder_depths are 3 / 1." in reasons(deep, 20e6, 19.9e6)
    plain = reasons([planned(1), planned(2)], 20e6, 19.9e6)
    assert len(plain) == 3
    assert plain[0].startswith("A row of stage 1 gains most from a wider decoder: ")
    assert "its loss falls by 0.2 (± 0.01), 20% of the narrow probe's" in plain[0]
    assert "3 / 3 MFLOPs" in plain[1]
    assert "8 / 8 serve that best; they cost 19.9" in plain[2]
    assert "50 / 50 %" in plain[2]
    unsure = planned(2, gain=0.005, gain_counted=0.01)
    assert reasons([planned(1), unsure], 20e6, 2e7)[3].startswith("The gain of stage 2 is below its standard error")
    worse = planned(2, gain=-0.03, gain_counted=0.01)
    said = reasons([planned(1), worse], 20e6, 2e7)
    assert said[0].startswith("A row of stage 1 gains most")
    assert (len(said), said[3][:38]) == (4, "In stage 2 the wide probe is worse, be")
    assert reasons([worse, worse], 20e6, 2e7)[0].startswith("In no stage the wide probe has the lower loss")
    for flops in (4, 81):
        assert "decoder of stage 2 lies far outside" in reasons([planned(1), planned(2, flops=flops)], 2e7, 2e7)[3]
    for optimal, words in (
        (0.75, "In stage 2 the wide probe is within 10 %"),
        (0.81, "In stage 2 the wide probe does better"),
    ):
        said = reasons([planned(1, loss_optimal=None), planned(2, loss_optimal=optimal)], 2e7, 2e7)
        assert len(said) == 4
        assert said[3].startswith(words)
    both = reasons([planned(1, loss_optimal=0.9), planned(2, loss_optimal=0.9)], 2e7, 2e7)
    assert both[3].startswith("In stages 1 and 2 the wide")
