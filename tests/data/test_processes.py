import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import multistage_diffusion
from multistage_diffusion.data import processes
from multistage_diffusion.data.processes import Processes
from multistage_diffusion.errors import UserError

pytestmark = pytest.mark.skipif(not processes.available(), reason="this system does not fork")


def doubled(question):
    """Answer with the process, what was asked, and arrays of that many bytes."""
    sizes = question["sizes"]
    return {"process": os.getpid(), **question}, [
        np.full((1, size), number, np.uint8) for number, size in enumerate(sizes)
    ]


@pytest.mark.parametrize("sizes", [[], [0], [3, 5], [3_000_000, 2]])
def test_an_answer_comes_whole_from_another_process(sizes):
    told, arrays = Processes(doubled, 1).ask({"sizes": sizes, "text": "é\n"})
    assert told["process"] != os.getpid()
    assert (told["sizes"], told["text"]) == (sizes, "é\n")
    assert arrays.tobytes() == b"".join(bytes([number]) * size for number, size in enumerate(sizes))


def test_several_threads_ask_at_once():
    found, pool = {}, Processes(doubled, 3)

    def ask(thread):
        for number in range(30):
            found[thread, number] = pool.ask({"sizes": [thread * 100 + number]})

    threads = [threading.Thread(target=ask, args=(thread,)) for thread in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(len(arrays) == t * 100 + n for (t, n), (_, arrays) in found.items())
    assert len(found) == 150
    assert len({told["process"] for told, _ in found.values()}) <= 3


def alive(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_processes_end_with_their_object_and_leave_nothing():
    first, second = Processes(doubled, 1), Processes(doubled, 1)
    one, other = (pool.ask({"sizes": []})[0]["process"] for pool in (first, second))
    del first
    assert not alive(one)
    assert second.ask({"sizes": [2]})[0]["process"] == other
    del second
    assert not alive(other)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_for_the_process_that_asks(number):
    pool = Processes(doubled, 1)
    process = pool.ask({"sizes": []})[0]["process"]
    os.kill(process, number)
    time.sleep(0.05)
    assert pool.ask({"sizes": []})[0]["process"] == process


def test_a_process_that_is_killed_is_named():
    pool = Processes(doubled, 1)
    process = pool.ask({"sizes": []})[0]["process"]
    os.kill(process, signal.SIGKILL)
    with pytest.raises(
        UserError, match=rf"process {process}, which decodes images, has ended; was it killed because mem"
    ):
        pool.ask({"sizes": []})


@pytest.mark.slow
def test_processes_end_with_the_one_that_made_them(tmp_path):
    script = (
        "import os, signal, tests_processes as t\n"
        "pools = [t.Processes(t.doubled, 2), t.Processes(t.doubled, 1)]\n"
        "print(*{p.ask({'sizes': []})[0]['process'] for p in pools for _ in range(2)}, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    script = script.replace("tests_processes", Path(__file__).stem)
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(multistage_diffusion.__file__).parents[1])])
    environment = {**os.environ, "PYTHONPATH": path}
    with (tmp_path / "out").open("w") as out:  # not a pipe, which they would hold open
        done = subprocess.run([sys.executable, "-c", script], stdout=out, env=environment)
    assert done.returncode == -signal.SIGKILL
    made = [int(word) for word in (tmp_path / "out").read_text().split()]
    assert len(made) >= 2
    deadline = time.monotonic() + 10
    while any(map(alive, made)) and time.monotonic() < deadline:
        time.sleep(0.01)
    left = [process for process in made if alive(process)]
    for process in left:
        os.kill(process, signal.SIGKILL)
    assert not left


def test_all_can_be_ended_while_threads_wait_for_answers():
    def slow(question):
        time.sleep(60)
        return question, []

    pool, raised = Processes(slow, 4), []

    def ask():
        try:
            pool.ask(1)
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    while not pool._idle.empty():
        time.sleep(0.01)
    made = list(pool._made)
    processes._end_all(pool._made, os.getpid())
    for thread in threads:
        thread.join(60)
    assert len(raised) == 4
    assert all(isinstance(error, OSError | EOFError) for error in raised)  # not a UserError, and no new processes
    assert not pool._made
    assert not any(alive(process) for process in made)


def test_ctrl_c_while_processes_end_is_no_news(monkeypatch):
    pool = Processes(doubled, 2)
    made = list(pool._made)
    end = processes._end

    def interrupted(process, connection):
        end(process, connection)
        raise KeyboardInterrupt

    monkeypatch.setattr(processes, "_end", interrupted)
    processes._end_all(pool._made, os.getpid())
    assert not pool._made
    assert not any(alive(process) for process in made)
