import os
import signal
import time
import warnings
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from sklearn.datasets import load_digits

from multistage_diffusion.distributed import World
from multistage_diffusion.errors import UserError
from multistage_diffusion.stage_finding import Sharing, StageResult, StageSettings, compute_stages

IMAGES = np.round(load_digits().images[:150] * 255 / 16).astype(np.uint8)[:, None]
CASES_OF_STAGES = {
    "first": StageSettings(samples=200, times=8, grid=1000),
    "second": StageSettings(algorithm=2, samples=100, stages=4),
    # at last one more sample: not one for every process
    "precise": StageSettings(samples=201, times=4, grid=1000, precision=1e-6),
}


def test_alone_there_is_nobody_to_ask():
    sharing = Sharing()
    assert (sharing.groups, sharing.shard, sharing.share(range(5, 9))) == (1, (0, 1), range(5, 9))
    found = torch.rand(4, 3)
    assert sharing.gather(found, range(5, 9)) is found
    assert sharing.agree(0.5) == 0.5
    sharing.reduce(found.clone(), "sum")


@pytest.mark.parametrize(("world", "image_shards"), [(3, 2), (1, 2), (4, 3), (4, 0), (2, -1)])
def test_processes_must_make_whole_groups(world, image_shards):
    with pytest.raises(
        ValueError, match=f"stages: image_shards={image_shards} must divide .* {world}; .*nproc-per-node"
    ):
        Sharing(world=World(0, world), image_shards=image_shards)


@pytest.mark.parametrize(("world", "image_shards"), [(1, 1), (3, 1), (4, 2), (6, 3), (4, 4)])
def test_every_sample_is_drawn_by_one_group_over_all_images(world, image_shards):
    ranks = [Sharing(world=World(rank, world), image_shards=image_shards) for rank in range(world)]
    shares: dict[range, list[tuple[int, int]]] = {}
    for each in ranks:
        shares.setdefault(each.share(range(10, 31)), []).append(each.shard)
    assert sorted(number for share in shares for number in share) == list(range(10, 31))
    assert all(shards == [(i, image_shards) for i in range(image_shards)] for shards in shares.values())


def work(world: World, shards: tuple[int, ...], folder: Path) -> None:
    """Split in one of several processes."""
    warnings.simplefilter("ignore")
    rank = world.rank
    for image_shards in shards:
        sharing = Sharing(world=world, image_shards=image_shards)
        for count in range(1, 8):
            numbers = range(5, 5 + count)
            mine = torch.tensor([[n, -n] for n in sharing.share(numbers)], dtype=torch.float64).view(-1, 2)
            assert sharing.gather(mine, numbers).tolist() == [[n, -n] for n in numbers]
        assert sharing.agree(rank + 1 / 3) == 1 / 3
        group = range(rank - rank % image_shards, rank - rank % image_shards + image_shards)
        for how, expected in (("sum", sum(group)), ("max", max(group))):
            value = torch.tensor([float(rank)])
            sharing.reduce(value, how)
            assert value.item() == expected
        for name, settings in CASES_OF_STAGES.items():
            done: list[tuple[int, int]] = []
            result = compute_stages(
                IMAGES, settings, sharing=sharing, progress=lambda *count, done=done: done.append(count)
            )
            result.save(folder / f"{name}-{image_shards}-{rank}.json")
            if world.is_main_process:
                assert done[-1] == (settings.samples, settings.samples)
                assert all(0 < count <= of for count, of in done)


@pytest.fixture(scope="module")
def alone() -> dict[str, StageResult]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {name: compute_stages(IMAGES, settings) for name, settings in CASES_OF_STAGES.items()}


@pytest.mark.parametrize(
    ("world", "shards"),
    [
        pytest.param(2, (1, 2), marks=pytest.mark.slow),
        pytest.param(3, (1,), marks=pytest.mark.slow),
        pytest.param(4, (2,), marks=pytest.mark.slow),
    ],
)
def test_processes_find_together_what_one_finds_alone(alone, tmp_path, world, shards):
    processes.run(world, work, shards, tmp_path)
    for name, one in alone.items():
        for image_shards in shards:
            files = [(tmp_path / f"{name}-{image_shards}-{rank}.json").read_bytes() for rank in range(world)]
            assert len(set(files)) == 1  # every process knows the same
            together = StageResult.load(tmp_path / f"{name}-{image_shards}-0.json")
            assert together.samples == one.samples
            # a coordinate that lies on the threshold may fall on its other side
            assert together.edges_t == pytest.approx(one.edges_t, abs=1e-3)  # one step of the grid
            assert np.array(together.intervals_t) == pytest.approx(np.array(one.intervals_t), abs=2e-3)
            for curve, values in one.curves.items():
                if curve not in ("table", "objective_value"):
                    assert np.array(together.curves[curve]) == pytest.approx(np.array(values), abs=2e-3)
            assert together.float64_difference <= 1.01 / 64


def killed(world: World, folder: Path) -> str:
    """Split until rank 1 is killed; return what rank 0 is told."""
    from multistage_diffusion.data import ImageData
    from multistage_diffusion.workflow.stages import find_stages

    def progress(done: int, _: int) -> None:
        if world.rank == 1 and done:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        data = ImageData(IMAGES, None, "digits")
        find_stages(data, CASES_OF_STAGES["first"], out=folder / "stages.json", device="cpu", progress=progress)
    except OSError as error:
        return str(error)
    return "nothing"


@pytest.mark.slow
def test_when_one_is_killed_the_others_end_in_seconds(tmp_path):
    pair = processes.Processes(2, killed, tmp_path, patience=3.0)
    start = time.monotonic()
    told, died = pair.results(40.0)
    assert time.monotonic() - start < 40.0
    assert died is None
    lines = [str(told)] if told else pair.errors()
    assert any(f"rank 1 (process {pair.processes[1].pid}" in line for line in lines)
    assert not (tmp_path / "stages.json").exists()


def differs(world: World) -> str:
    """Split with other settings, or draw samples, on rank 1; return the error."""
    from multistage_diffusion.data import ImageData
    from multistage_diffusion.performance.devices import joined
    from multistage_diffusion.workflow.stages import find_stages

    told = []
    for attempt in (
        lambda: find_stages(ImageData(IMAGES, None, "digits"), StageSettings(seed=world.rank), device="cpu"),
        lambda: joined("cpu", ["stages", "train"][world.rank]),
    ):
        with pytest.raises(UserError) as caught:
            attempt()
        told.append(str(caught.value))
    return "\n".join(told)


@pytest.mark.slow
def test_processes_with_other_settings_or_commands_are_refused():
    for told in processes.run(2, differs):
        settings, command = told.splitlines()
        assert settings.startswith("rank 1 has seed 1, rank 0 0")
        assert command.startswith("rank 1 has command 'train', rank 0 'stages'")
