from __future__ import annotations

import dataclasses
import json
import time

import pytest
import torch

from multistage_diffusion.config.serialization import read_json
from multistage_diffusion.performance.execution import Execution
from multistage_diffusion.performance.timing import PARTS
from multistage_diffusion.training.profiling import Profile
from multistage_diffusion.training.run import Run
from multistage_diffusion.training.trainer import Trainer


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "threads"), [("mixed", 1), ("sequential", 1), ("mixed", 2)])
def test_a_profile_is_of_the_run_and_does_not_change_it(tmp_path, tiny_config, tiny_data, monkeypatch, mode, threads):
    monkeypatch.setattr(time, "perf_counter", time.thread_time)  # blind to other processes and to a slow disk
    told, weights = [], []
    for callbacks in ([], [Profile(told.append, skipped=1, timed=2, traced=1)]):
        config = tiny_config(training__steps=6, training__update_mode=mode, execution__thread_parallel=threads)
        run = Run.create(tmp_path / str(len(callbacks)), config)
        trainer = Trainer(run, tiny_data(), device="cpu", callbacks=callbacks)
        trainer.fit()
        weights.append(trainer.denoiser.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    result = callbacks[0].result
    assert tuple(result.parts) == PARTS
    assert all(seconds > 0 for seconds in result.parts.values())
    assert 0.75 * result.seconds < sum(result.parts.values()) <= result.seconds
    assert result.images_per_s == pytest.approx(12 / result.seconds)
    assert result.memory > 1 << 20
    folder = tmp_path / "1" / "profile"
    assert read_json(folder / "parts.json")["parts"] == pytest.approx(result.parts)
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    assert {"msdiff data", "msdiff optimizer", "aten::conv2d"} <= {event.get("name") for event in events}
    assert len({event["tid"] for event in events if event.get("name") == "aten::conv2d"}) == threads
    (table,) = told
    assert [line.split()[0] for line in table.splitlines()[1:8]] == [*PARTS, "rest"]
    assert table.splitlines()[0].endswith("computed plain" if threads == 1 else "computed 2 threads")
    assert not trainer.passes.timer.running
    # of a graph's inside nothing is known
    graphed = dataclasses.replace(result, execution=Execution(cuda_graphs=True)).table().splitlines()
    assert [line.split()[0] for line in graphed[1:7]] == ["data", "network", *PARTS[3:], "rest"]
    together = result.parts["encoder"] + result.parts["decoders"]
    assert float(graphed[2].split()[1]) == pytest.approx(together, abs=1e-4)


def test_a_run_that_ends_early_is_left_in_order(tmp_path, tiny_config, tiny_data):
    run = Run.create(tmp_path / "run", tiny_config(training__steps=3))
    profile = Profile(skipped=1, timed=1, traced=9)
    Trainer(run, tiny_data(), device="cpu", callbacks=[profile]).fit()
    assert profile.result is not None
    assert not (tmp_path / "run" / "profile" / "trace.json").exists()
    with torch.profiler.profile():  # the profiler is free
        pass
