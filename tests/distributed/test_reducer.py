from __future__ import annotations

import processes
import torch
from torch import nn

from multistage_diffusion.distributed import World
from multistage_diffusion.distributed.reducer import Reducer


def model() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    parts = {"encoder": nn.Linear(3, 4), "decoder.1": nn.Linear(4, 2), "decoder.2": nn.Linear(4, 2)}
    parts["decoder.2"].register_parameter("idle", nn.Parameter(torch.ones(2)))  # never used
    return {name: part.double() for name, part in parts.items()}


def rows(step: int, rank: int) -> dict[str, torch.Tensor]:
    """Return this process's rows of each decoder: rank 0 has none of the second in step 0, nobody in step 3."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    counts = {"decoder.1": 2, "decoder.2": 0 if step == 3 or (step == 0 and rank == 0) else 1 + rank}
    return {k: torch.randn(n, 3, generator=generator, dtype=torch.float64) for k, n in counts.items() if n}


def loss(parts: dict[str, nn.Module], given: dict[str, torch.Tensor]) -> torch.Tensor:
    return sum(parts[name](parts["encoder"](x).tanh()).square().sum() for name, x in given.items())


def gradients(parts: dict[str, nn.Module]) -> list[list[float] | None]:
    return [None if p.grad is None else p.grad.flatten().tolist() for part in parts.values() for p in part.parameters()]


def clear(parts: dict[str, nn.Module]) -> None:
    for part in parts.values():
        part.zero_grad(set_to_none=True)


def reduced(world: World, bucket_bytes: int) -> tuple[list[object], list[bool], int]:
    parts = model()
    everybody = world.group(range(world.size))
    parameters = {name: list(part.parameters()) for name, part in parts.items()}
    reducer = Reducer(parameters, dict.fromkeys(parts, everybody), bucket_bytes)
    found, early = [], []
    for step in range(4):
        clear(parts)
        given = rows(step, world.rank)
        active = ["encoder", "decoder.1"] + (["decoder.2"] if step < 3 else [])
        reducer.start(active, ["encoder", *given])
        loss(parts, given).backward()
        early.append(reducer._launched > 0)
        reducer.finish()
        found.append(gradients(parts))
    return found, early, reducer.bytes


def test_gradients_are_sums_over_all_processes():
    for bucket_bytes in (1, 1 << 20):
        results = processes.run(2, reduced, bucket_bytes)
        for step in range(4):
            parts = model()
            (loss(parts, rows(step, 0)) + loss(parts, rows(step, 1))).backward()
            for found, _, _ in results:
                for mine, expected in zip(found[step], gradients(parts), strict=True):
                    if expected is None:  # of no process: it stays without, and the optimiser leaves it alone
                        assert mine is None
                    else:
                        torch.testing.assert_close(torch.tensor(mine), torch.tensor(expected), rtol=1e-12, atol=1e-12)
        # sums begin during the backward pass, once the first step has shown which parameters take part
        assert all(early == [False, True, True, True] for _, early, _ in results)
        used = {"encoder": 16, "decoder.1": 10, "decoder.2": 10}
        assert results[0][2] == results[1][2] == 8 * (3 * sum(used.values()) + 26)


def test_a_closed_reducer_lets_go(monkeypatch):
    parts = model()
    parameters = {name: list(part.parameters()) for name, part in parts.items()}
    reducer = Reducer(parameters, dict.fromkeys(parts, object()))
    calls = []
    monkeypatch.setattr(Reducer, "_launch", lambda self, end: calls.append(end))
    reducer.close()
    reducer.start(["encoder"], ["encoder"])
    loss(parts, rows(1, 0)).backward()
    assert calls == []
