from __future__ import annotations

import errno

import pytest
import torch

from multistage_diffusion.errors import NotFiniteError, UserError, explained, out_of_memory


def test_what_a_user_can_mend() -> None:
    assert explained(UserError("a=1: must be 2")) == "a=1: must be 2"
    assert explained(NotFiniteError("not finite")) == "not finite"
    assert explained(OSError(errno.EACCES, "Denied", b"caf\xff")) is not None
    for bug in (ValueError("a"), KeyError("a"), OSError("a"), FloatingPointError("a"), RuntimeError("a")):
        assert explained(bug) is None


def test_the_cpu_allocator_s_own_words() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert out_of_memory(caught.value)
    line = explained(caught.value)
    assert line is not None
    assert "\n" not in line
    assert not out_of_memory(RuntimeError("shapes differ"))
