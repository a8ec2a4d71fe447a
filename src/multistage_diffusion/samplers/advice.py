"""Which samplers are likely to be worse than DDIM at the same NFE; the study is in docs/sampling.md."""

from __future__ import annotations

from ..config.sampling import SOLVERS
from .solvers import Plan, Solver


def shortcoming(plan: Plan) -> str | None:
    """Return one line on why a plan is likely to be over 10 % worse than DDIM at the same NFE; None if it is not.

    Of the solvers here, the rule detects all settings that are worse in the study but one (ratio 1.11). With
    lower_final="always" it has no false positives; with "published" it also reports some settings that are no worse.
    """
    solver: type[Solver] = SOLVERS[plan.solver]
    return solver.shortcoming(plan)
