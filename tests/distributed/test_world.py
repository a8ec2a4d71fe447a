from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import processes
import pytest
import torch
from torch.distributed import HashStore

from multistage_diffusion.distributed import ALONE, World, is_main_process, join
from multistage_diffusion.distributed import world as world_module

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


# -- one process ------------------------------------------------------------------------------------------------------


def test_a_lone_process_is_a_world_of_one():
    assert (ALONE.rank, ALONE.size, ALONE.is_main_process) == (0, 1, True)
    assert ALONE.all_gather_object({"a": 1}) == [{"a": 1}]
    assert ALONE.broadcast_object([1, 2]) == [1, 2]
    assert ALONE.share(5) == range(5)
    assert ALONE.group((0,)) is None
    x = torch.randn(3)
    assert ALONE.all_reduce(x) is x
    assert torch.equal(ALONE.gather_named({"x": x})["x"], x)
    assert torch.equal(ALONE.all_gather_rows(x), x)
    ALONE.require_equal({"a": 1})
    with pytest.raises(ValueError, match=r"^what went wrong$"), ALONE.synchronize_errors():
        raise ValueError("what went wrong")


def test_named_tensors_of_one_process_are_on_the_cpu_without_gradient(monkeypatch):
    copied = []
    own = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: copied.append(tensor) or own(tensor))
    x = torch.randn(3, requires_grad=True)
    found = ALONE.gather_named({"x": x})["x"]
    assert (found.device.type, found.requires_grad, len(copied)) == ("cpu", False, 1)  # as those of several processes
    assert torch.equal(found, x)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [0, 1, 6, 20])
def test_shares_are_in_order_without_overlap_and_even(size, count):
    shares = [World(rank, size).share(count) for rank in range(size)]
    assert [i for share in shares for i in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_an_incomplete_environment_is_refused(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert join(torch.device("cpu")) is ALONE
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert join(torch.device("cpu")) is ALONE
    assert is_main_process()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ValueError, match="WORLD_SIZE=2 but MASTER_ADDR, MASTER_PORT is not set; start with torchrun"):
        join(torch.device("cpu"))
    assert not is_main_process()


def test_a_world_without_a_store_has_no_words():
    with pytest.raises(ValueError, match=r"this world has no store .* distributed\.join"):
        World(1, 2).broadcast_object(1)


def ends_early(world: World) -> str:
    if world.rank == 0:
        return ""
    return raised(lambda: world.all_gather_object("anybody there?"))


@pytest.mark.slow
def test_who_waits_for_a_process_that_has_ended_is_told():
    pair = processes.Processes(2, ends_early, patience=3.0)
    _, told = pair.results(40.0)
    (line,) = [told] if told else [line for line in pair.errors() if line.startswith("msdiff: ")]
    assert f"rank 0 (process {pair.processes[0].pid}" in line
    assert "has ended, but is waited for" in line


def test_processes_that_start_again_do_not_hear_those_before_them():
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True)
    for key in ("hello/0", "hello/1"):  # of an attempt that has died
        store.set(f"msdiff/{key}", "old")
    store.set("msdiff/seen", '["old", "old"]')
    store.set("msdiff/met", '["old", "old"]')
    with ThreadPoolExecutor(2) as pool:
        clients = [torch.distributed.TCPStore("127.0.0.1", store.port, is_master=False) for _ in range(2)]
        names = list(pool.map(lambda rank: world_module._meet(clients[rank], rank, 2), range(2)))
        again = list(pool.map(lambda rank: world_module._meet(clients[rank], rank, 2), range(2)))
    assert names[0] == names[1] != again[0]
    assert again[0] == again[1]


# -- three processes --------------------------------------------------------------------------------------------------


def raised(work) -> str:
    try:
        work()
    except (ValueError, OSError, FloatingPointError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def exchanges(world: World) -> dict[str, object]:
    rank = world.rank
    mine = {0: {"a": torch.arange(3.0)}, 1: {"b": torch.full((2, 2), 7, dtype=torch.int64)}, 2: {}}[rank]
    collected = world.gather_named(mine)
    few = torch.full((rank, 2), rank, dtype=torch.uint8)  # rank 0 has none
    pair = world.group((1, 2))
    within = torch.tensor([float(rank)])
    if pair is not None:
        torch.distributed.all_reduce(within, group=pair)

    def fails_on(rank: int, kind: type[Exception]) -> None:
        with world.synchronize_errors():
            if world.rank == rank:
                raise kind("a full disk")

    return {
        "exchange": world.all_gather_object([rank, "x" * rank]),
        "agree": world.broadcast_object({"rank": rank}),
        "sum": world.all_reduce(torch.tensor([1.0, rank], dtype=torch.float64)).tolist(),
        "max": world.all_reduce(torch.tensor([1.0 - rank, rank]), "max").tolist(),
        "spread": world.broadcast(torch.full((2,), float(rank)), 1).tolist(),
        "collected": {name: tensor.tolist() for name, tensor in collected.items()},
        "types": [str(t.dtype) for t in collected.values()],
        "rows": world.all_gather_rows(few).tolist(),
        "nothing": world.all_gather_rows(torch.empty(0)).tolist(),
        "pair": within.tolist(),
        "value": raised(lambda: fails_on(2, ValueError)),
        "os": raised(lambda: fails_on(0, OSError)),
        "nan": raised(lambda: fails_on(1, FloatingPointError)),
        "none": raised(lambda: fails_on(5, ValueError)),
        "equal": raised(lambda: world.require_equal({"data": "abc", "release": [1, 2]})),
        "lacking": raised(lambda: world.require_equal({} if rank == 0 else {"extra": 1})),
        "unequal": raised(lambda: world.require_equal({"release": 1, "data": "abc" if rank < 2 else "abd"})),
    }


def test_what_three_processes_tell_one_another():
    a, b, c = processes.run(3, exchanges)
    for found in (a, b, c):
        assert found["exchange"] == [[0, ""], [1, "x"], [2, "xx"]]
        assert found["agree"] == {"rank": 0}
        assert (found["sum"], found["max"]) == ([3.0, 3.0], [1.0, 2.0])
        assert found["spread"] == [1.0, 1.0]
        assert found["rows"] == [[1, 1], [2, 2], [2, 2]]
        assert found["nothing"] == []
        assert (found["none"], found["equal"]) == ("", "")
        assert "rank 1 has extra 1, rank 0 None" in found["lacking"]
        assert "rank 2 has data 'abd', rank 0 'abc'" in found["unequal"]
    assert a["collected"] == {"a": [0.0, 1.0, 2.0], "b": [[7, 7], [7, 7]]}
    assert a["types"] == ["torch.float32", "torch.int64"]
    assert (b["collected"], c["collected"]) == ({}, {})
    assert [found["pair"] for found in (a, b, c)] == [[0.0], [3.0], [3.0]]
    assert [f["value"] for f in (a, b, c)] == [*["ValueError: rank 2: a full disk"] * 2, "ValueError: a full disk"]
    assert [f["os"] for f in (a, b, c)] == ["OSError: a full disk", *["OSError: rank 0: a full disk"] * 2]
    assert a["nan"] == c["nan"] == "FloatingPointError: rank 1: a full disk"


@pytest.mark.slow
def test_a_process_whose_others_never_come_says_so():
    code = (
        "import torch; from multistage_diffusion.distributed import world; world.NOTICE = 0.2;"
        "world.join(torch.device('cpu'))"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    given = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env={**os.environ, **given}
    )
    try:
        assert process.stderr is not None
        lines = (line for line in process.stderr if line.startswith("msdiff: "))
        assert next(lines) == f"msdiff: rank 0 waits for the other processes of 2 at 127.0.0.1:{port}\n"
        assert process.poll() is None  # it goes on waiting
    finally:
        process.kill()
        process.wait()


def test_ranks_that_have_not_said_hello_are_named(monkeypatch, caplog):
    monkeypatch.setattr(world_module, "NOTICE", 0.05)
    store = HashStore()
    for rank in (0, 2):
        store.set(f"msdiff/hello/{rank}", "here")
    late = threading.Timer(0.4, lambda: [store.set(f"msdiff/hello/{rank}", "here") for rank in (1, 3)])
    late.start()
    world_module._wait_for(store, range(4))
    late.join()
    assert [record.message for record in caplog.records] == [
        "msdiff: waiting for rank 1, 3; did it start, and can it reach this machine?"
    ]
