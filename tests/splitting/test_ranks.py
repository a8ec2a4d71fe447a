import multiprocessing
import os
import socket
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from multistage_diffusion.splitting import Ranks, SplitResult, SplitSettings, find_stages

IMAGES = np.round(load_digits().images[:150] * 255 / 16).astype(np.uint8)[:, None]
SPLITS = {
    "first": SplitSettings(samples=200, times=8, grid=1000),
    "second": SplitSettings(algorithm=2, samples=100, stages=4),
    # at last one more sample: not one for every process
    "precise": SplitSettings(samples=201, times=4, grid=1000, precision=1e-6),
}


def test_alone_without_torchrun(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    ranks = Ranks.join()
    assert ranks == Ranks()
    assert (ranks.first, ranks.shard, ranks.share(range(5, 9))) == (True, (0, 1), range(5, 9))
    found = torch.rand(4, 3)
    assert ranks.gather(found, range(5, 9)) is found
    ranks.reduce(found.clone(), "sum")  # nobody to ask


@pytest.mark.parametrize(("world", "image_shards"), [(3, 2), (1, 2), (4, 3), (4, 0), (2, -1)])
def test_processes_must_make_whole_groups(world, image_shards):
    with pytest.raises(
        ValueError, match=f"split: image_shards={image_shards} must divide .* {world}; .*nproc-per-node"
    ):
        Ranks(world=world, image_shards=image_shards)


@pytest.mark.parametrize(("world", "image_shards"), [(1, 1), (3, 1), (4, 2), (6, 3), (4, 4)])
def test_every_sample_is_drawn_by_one_group_over_all_images(world, image_shards):
    ranks = [Ranks(rank=rank, world=world, image_shards=image_shards) for rank in range(world)]
    shares: dict[range, list[tuple[int, int]]] = {}
    for each in ranks:
        shares.setdefault(each.share(range(10, 31)), []).append(each.shard)
    assert sorted(number for share in shares for number in share) == list(range(10, 31))
    assert all(shards == [(i, image_shards) for i in range(image_shards)] for shards in shares.values())
    assert [each.first for each in ranks] == [True] + [False] * (world - 1)


def work(rank: int, world: int, port: int, shards: tuple[int, ...], folder: Path) -> None:
    """Split in one of several processes, with the environment that torchrun gives it."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for image_shards in shards:
        ranks = Ranks.join(image_shards)
        assert (ranks.rank, ranks.world) == (rank, world)
        for count in range(1, 8):
            numbers = range(5, 5 + count)
            mine = torch.tensor([[n, -n] for n in ranks.share(numbers)], dtype=torch.float64).view(-1, 2)
            assert ranks.gather(mine, numbers).tolist() == [[n, -n] for n in numbers]
        group = range(rank - rank % image_shards, rank - rank % image_shards + image_shards)
        for how, expected in (("sum", sum(group)), ("max", max(group))):
            value = torch.tensor([float(rank)])
            ranks.reduce(value, how)
            assert value.item() == expected
        for name, settings in SPLITS.items():
            done: list[tuple[int, int]] = []
            result = find_stages(IMAGES, settings, ranks=ranks, progress=lambda *count, done=done: done.append(count))
            result.save(folder / f"{name}-{image_shards}-{rank}.json")
            if ranks.first:
                assert done[-1] == (settings.samples, settings.samples)
                assert all(0 < count <= of for count, of in done)


@pytest.fixture(scope="module")
def alone() -> dict[str, SplitResult]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {name: find_stages(IMAGES, settings) for name, settings in SPLITS.items()}


@pytest.mark.parametrize(("world", "shards"), [(2, (1, 2)), (3, (1,)), (4, (2,))])
def test_processes_find_together_what_one_finds_alone(alone, tmp_path, world, shards):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "sklearn.datasets", "multistage_diffusion.splitting.finding"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = [context.Process(target=work, args=(rank, world, port, shards, tmp_path)) for rank in range(world)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        worker.kill()  # if it hangs
    assert [worker.exitcode for worker in workers] == [0] * world
    for name, one in alone.items():
        for image_shards in shards:
            files = [(tmp_path / f"{name}-{image_shards}-{rank}.json").read_bytes() for rank in range(world)]
            assert len(set(files)) == 1  # every process knows the same
            together = SplitResult.load(tmp_path / f"{name}-{image_shards}-0.json")
            assert together.samples == one.samples
            # a coordinate that lies on the threshold may fall on its other side
            assert together.edges_t == pytest.approx(one.edges_t, abs=1e-3)  # one step of the grid
            assert np.array(together.intervals_t) == pytest.approx(np.array(one.intervals_t), abs=2e-3)
            for curve, values in one.curves.items():
                if curve not in ("table", "objective_value"):
                    assert np.array(together.curves[curve]) == pytest.approx(np.array(values), abs=2e-3)
            assert together.float64_difference <= 1.01 / 64
