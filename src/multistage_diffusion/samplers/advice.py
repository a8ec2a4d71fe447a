"""A rule for samplers that are likely to be worse than DDIM at the same NFE; the study is in docs/sampling.md."""

from __future__ import annotations

import math

from .orders import LONGEST_HEUN_STEP, LONGEST_LAST_STEP, LONGEST_STEP
from .plan import Plan, Step

SLACK = 1.05  # a step may exceed the maximum length by this factor without a warning
LONGEST_UNCORRECTED = 6.0  # of Heun's steps; DDIM has one step per call, so it divides a longer step into two
FEW_FOR_HEUN = 20


def shortcoming(plan: Plan) -> str | None:
    """Return one line on why a plan is likely to be over 10 % worse than DDIM at the same NFE; None if it is not.

    In the study, the rule detects all worse settings but one (ratio 1.11). With lower_final="always" it has no false
    positives; with "published" it also reports some settings that are no worse.
    """
    if plan.solver == "ddim":
        return None
    if plan.solver == "heun":
        return _of_heun(plan)
    longest = LONGEST_STEP.get((plan.solver, plan.method), {})
    steps = [step for step in plan.steps if step.end > 0]
    for step in steps:
        allowed = longest.get(step.order, math.inf)
        if step is steps[-1] and step.order > 1:
            allowed = min(allowed, LONGEST_LAST_STEP)
        if _length(step) > SLACK * allowed:
            which = "last step" if step is steps[-1] else "step"
            return (
                f"{plan.solver} {plan.method}: the {which} from sigma {step.calls[0]:.3g} to {step.end:.3g} is long for order "
                f"{step.order}, so that ddim may be better at {len(plan.calls)} calls; consider --lower-final always"
            )
    return None


def _of_heun(plan: Plan) -> str | None:
    calls = len(plan.calls)
    for step in plan.steps[:-1]:
        if _length(step) > SLACK * (LONGEST_HEUN_STEP if step.order == 2 else LONGEST_UNCORRECTED):
            mend = "--lower-final always, or" if step.order == 2 else "another spacing, or"
            return (
                f"heun: the step from sigma {step.calls[0]:.3g} to {step.end:.3g} is long, so that ddim may be better at {calls} "
                f"calls; consider {mend} more calls"
            )
    if calls < FEW_FOR_HEUN - 1:  # config.calls is an upper limit for Heun: 20 can give a plan of 19 calls
        return f"heun: {calls} calls are few for it, so that ddim may be better; consider {FEW_FOR_HEUN} or more"
    return None


def _length(step: Step) -> float:
    return math.log(step.calls[0] / step.end)
