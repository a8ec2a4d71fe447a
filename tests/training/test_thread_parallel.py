from __future__ import annotations

import threading
from functools import partial

import pytest
import torch

from multistage_diffusion.training.thread_parallel import ThreadParallel, add_gradients


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_everything_is_done_at_once_the_first_here_and_told_in_order() -> None:
    meeting = threading.Barrier(3, timeout=30)  # passed only if all three are at work
    seen: dict[int, tuple[threading.Thread, int]] = {}

    def work(number: int) -> int:
        meeting.wait()
        seen[number] = threading.current_thread(), torch.get_num_threads()
        return 10 * number

    side_by_side = ThreadParallel(3)
    for _ in range(2):  # the second time by the same threads
        assert side_by_side([partial(work, number) for number in range(3)]) == [0, 10, 20]
        assert seen[0][0] is threading.current_thread()
        assert len({thread for thread, _ in seen.values()}) == 3
        assert [count for _, count in seen.values()] == [1, 1, 1]  # 4 // 3
        assert torch.get_num_threads() == 4


def test_fewer_than_most_share_the_threads() -> None:
    side_by_side = ThreadParallel(4)
    assert side_by_side([torch.get_num_threads] * 4) == [1] * 4
    assert side_by_side([torch.get_num_threads] * 2) == [2] * 2
    assert side_by_side([torch.get_num_threads]) == [4]


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_is_raised_once_all_have_ended(failing: int) -> None:
    ended = threading.Event()

    def work(number: int) -> None:
        if number == failing:
            raise ZeroDivisionError
        threading.Event().wait(0.2)
        ended.set()

    with pytest.raises(ZeroDivisionError):
        ThreadParallel(2)([partial(work, 0), partial(work, 1)])
    assert ended.is_set()
    assert torch.get_num_threads() == 4


def test_gradients_are_added_to_what_is_there() -> None:
    parameters = [torch.zeros(2, requires_grad=True) for _ in range(3)]
    ones = torch.ones(2)
    add_gradients(parameters, [ones.clone(), None, None])
    add_gradients(parameters, [2 * ones, 3 * ones, None])
    assert torch.equal(parameters[0].grad, 3 * ones)
    assert torch.equal(parameters[1].grad, 3 * ones)
    assert parameters[2].grad is None
