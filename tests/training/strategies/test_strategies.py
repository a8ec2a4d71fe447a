"""What all strategies have in common, and that one more file adds one."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import processes
import pytest
from tiny import tiny_config, tiny_data

from multistage_diffusion.distributed import World
from multistage_diffusion.errors import UserError
from multistage_diffusion.training import strategies
from multistage_diffusion.training.run import Run
from multistage_diffusion.training.strategies import STRATEGIES, divided, make_strategy, stage_of, stage_of_part
from multistage_diffusion.workflow.train import train

SHAPE = (1, 4, 4)
SIZES = (1, 2, 3, 4, 7)


def test_every_file_is_a_strategy():
    assert set(STRATEGIES.names()) == {"fsdp", "memory", "time"}
    with pytest.raises(UserError, match=r"strategy='fast' must be one of .*memory"):
        make_strategy("fast", tiny_config(), SHAPE, World(0, 2))


@pytest.mark.parametrize("name", ["fsdp", "memory", "time"])
def test_a_batch_needs_a_row_for_each_process(name):
    with pytest.raises(UserError, match=r"training\.batch=12 has fewer rows than there are processes, 13"):
        make_strategy(name, tiny_config(), SHAPE, World(0, 13))


@pytest.mark.parametrize("name", ["fsdp", "memory", "time"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("counts", [(5, 4, 3), (12, 0, 0), (1, 1, 10), (4, 4, 4)])
def test_every_row_is_trained_once(name, size, counts):
    config = tiny_config(training__shares=(0.4, 0.3, 0.3))
    found = [make_strategy(name, config, SHAPE, World(rank, size)) for rank in range(size)]
    for stage, count in enumerate(counts):
        shares = [strategy.rows(counts)[stage] for strategy in found]
        assert sorted(row for share in shares for row in share) == list(range(count))
        if name == "memory":
            holders = found[0].holders[stage]
            assert all(not share or rank in holders for rank, share in enumerate(shares))
            shares = [shares[rank] for rank in holders]
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("name", ["fsdp", "memory", "time"])
@pytest.mark.parametrize("accumulate", [1, 3, 20])
def test_micro_batches_hold_every_row_once(name, accumulate):
    counts, size = (7, 2, 1), 3
    found = [make_strategy(name, tiny_config(), SHAPE, World(rank, size)) for rank in range(size)]
    every = [strategy.micro_batches(counts, accumulate) for strategy in found]
    for stage, count in enumerate(counts):
        counted = [m for own in every for m in own if m.counted[stage]]
        assert sorted(row for m in counted for row in m.rows[stage]) == list(range(count))
    assert all(len(own) <= accumulate for own in every)
    if name == "fsdp":  # every process calls the same parts as often
        assert len({len(own) for own in every}) == 1
        assert all(len(rows) > 0 for own in every for m in own for rows in m.rows)


@pytest.mark.parametrize("name", ["fsdp", "time"])
def test_what_does_not_divide_evenly_is_spread(name):
    found = [make_strategy(name, tiny_config(), SHAPE, World(rank, 3)).rows((1, 1, 1)) for rank in range(3)]
    assert [sum(map(len, rows)) for rows in found] == [1, 1, 1]


def test_rows_are_divided_in_order():
    assert divided([range(2, 7), range(0)], 2) == [(range(2, 4), range(0)), (range(4, 7), range(0))]


def test_stages_of_names():
    assert stage_of("network.encoders.0.conv_in.weight", separate=False) is None
    assert stage_of("network.encoders.1.conv_in.weight", separate=True) == 1
    assert stage_of("network.decoders.2.conv_out.weight.exp_avg", separate=False) == 2
    assert (stage_of_part("encoder"), stage_of_part("encoder.2"), stage_of_part("decoder.1")) == (None, 1, 0)


def test_an_unknown_strategy_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    np.save(tmp_path / "data.npy", tiny_data(40).images)
    settings = tiny_config(data__source=str(tmp_path / "data.npy"), data__shape=())
    with pytest.raises(UserError, match=r"strategy='fast' must be one of .*time"):
        train(settings, tmp_path / "run", device="cpu", strategy="fast")
    assert not (tmp_path / "run").exists()


# -- one more file ------------------------------------------------------------------------------------------------------

TOY = '''
"""Every process holds the whole network; gradients are gathered and summed one tensor after the other."""

from multistage_diffusion.training.strategies import STRATEGIES, PartShare, Strategy


@STRATEGIES.add("toy")
class Toy(Strategy):
    def rows(self, counts):
        return tuple(self.world.share(count) for count in counts)

    def place(self, network, device, dtype):
        network.to(device, dtype)

    def gather_state(self, tensors):
        return dict(tensors) if self.world.is_main_process else {}

    def gather_model(self, module, build):
        return module

    def part_shares(self, names):
        return {name: PartShare(held=1.0, processes=self.world.size, transfers=1) for name in names}

    def watch(self, parts, *, shared):
        self.parameters = [parameter for own in parts.values() for parameter in own]

    def sum_gradients(self):
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad = sum(self.world.all_gather(parameter.grad))

    def norm_terms(self, parts):
        return super().norm_terms(parts) if self.world.is_main_process else {}
'''


def trained(world: World, folder: str, data: str, out: str, strategy: str) -> list[list[float]]:
    """Train a run through the public function; the package of strategies has one more folder."""
    if folder not in strategies.__path__:
        strategies.__path__.append(folder)
    settings = tiny_config(
        data__source=data, data__shape=(), training__steps=6, training__precision="fp64", network__dropout=0.0
    )
    train(settings, out, device="cpu", strategy=strategy)
    return [record["loss"] for record in Run(Path(out)).records()]


def test_one_more_file_adds_a_strategy(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "toy.py").write_text(TOY)
    data = tmp_path / "data.npy"
    np.save(data, tiny_data(40).images)
    found = [
        processes.run(2, trained, str(tmp_path / "more"), str(data), str(tmp_path / name), name)[0]
        for name in ("time", "toy")
    ]
    np.testing.assert_allclose(found[1], found[0], rtol=1e-6)
    assert f"{strategies.__name__}.toy" not in sys.modules  # only those processes know it
