from __future__ import annotations

import dataclasses
import math

from multistage_diffusion.training.sums import RunningSums


def test_running_sums_survive_a_round_trip_and_leave_out_skipped_steps():
    sums = RunningSums(2)
    sums.add([0.5, None], {"encoder": 2.0, "decoder.1": math.inf})
    sums.add([1.5, None], {"encoder": math.nan})
    again = RunningSums(**dataclasses.asdict(sums))
    assert again.means() == ([1.0, None], {"encoder": 2.0})
    again.clear()
    assert again == RunningSums(2)
