from __future__ import annotations

import errno
import io
import json
import math
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from multistage_diffusion.errors import UserError
from multistage_diffusion.training import checkpoint as ckpt
from multistage_diffusion.training.checkpoint import Checkpoint, list_checkpoints, prune, save_checkpoint

NAMES = ("model", "ema", "optimizer")


def made(step: int, score: float | None = None, **state: object) -> Checkpoint:
    g = torch.Generator().manual_seed(step)
    tensors = [{"a.weight": torch.randn(3, 2, generator=g), "b": torch.randn(4, generator=g)} for _ in NAMES]
    return Checkpoint(*tensors, state={"step": step, "score": score, "sums": {"loss": [0.1 + step]}, **state})


def steps(folder: Path) -> list[int]:
    return [ckpt.checkpoint_step(p) for p in list_checkpoints(folder)]


def leftovers(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if not p.name.startswith("step_")]


def test_round_trip_is_bit_exact(tmp_path):
    original = made(7)
    original.model["odd"] = torch.tensor([float("nan"), -0.0, 1e-45, float("inf")])
    original.model["bf16"] = torch.randn(2, 3).to(torch.bfloat16).T  # not contiguous
    path = save_checkpoint(tmp_path, original)
    assert path == tmp_path / "step_00000007"
    for name in NAMES:
        tensors, loaded = getattr(original, name), ckpt.load_tensors(path, name)
        assert tensors.keys() == loaded.keys()
        for key, value in tensors.items():
            assert loaded[key].dtype == value.dtype
            integers = torch.int16 if value.dtype == torch.bfloat16 else torch.int32
            assert torch.equal(loaded[key].view(integers), value.contiguous().view(integers))
    assert ckpt.read_state(path) == original.state
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_optimizer_goes_on_exactly_and_unstepped_parameters_have_no_state(tmp_path, kind):
    def build():
        torch.manual_seed(0)
        module = nn.ModuleDict({"used": nn.Linear(3, 2), "idle": nn.Linear(3, 2)})
        return module, kind(module.parameters(), lr=0.1, weight_decay=0.1, fused=True)

    def train(module, optimizer, seeds):
        for seed in seeds:
            optimizer.zero_grad()
            x = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
            module["used"](x).square().sum().backward()
            optimizer.step()

    module, optimizer = build()
    train(module, optimizer, range(3))
    tensors = ckpt.optimizer_tensors(optimizer, module)
    assert tensors.keys() == {f"used.{p}.{s}" for p in ("weight", "bias") for s in ("step", "exp_avg", "exp_avg_sq")}
    path = save_checkpoint(tmp_path, Checkpoint(module.state_dict(), {}, tensors, {"step": 3}))

    other, resumed = build()
    other.load_state_dict(ckpt.load_tensors(path, "model"))
    ckpt.restore_optimizer(resumed, other, ckpt.load_tensors(path, "optimizer"))
    train(module, optimizer, range(3, 6))
    train(other, resumed, range(3, 6))
    for (name, a), b in zip(module.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
    after, again = (ckpt.optimizer_tensors(o, m) for o, m in ((optimizer, module), (resumed, other)))
    assert after.keys() == again.keys()
    assert all(torch.equal(after[k], again[k]) for k in after)


class FullDisk(io.BytesIO):
    """A file with no space left."""

    def write(self, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("where", ["write", "fsync"])
def test_a_full_disk_leaves_the_previous_checkpoint_and_no_rubbish(tmp_path, monkeypatch, file, where):
    save_checkpoint(tmp_path, made(1))
    before = (tmp_path / "step_00000001" / "model.safetensors").read_bytes()
    real_open, real_fsync = os.fdopen, os.fsync

    def full_open(handle, mode="r", *args, **kwargs):
        opened = real_open(handle, mode, *args, **kwargs)
        return FullDisk() if os.readlink(f"/proc/self/fd/{handle}").endswith(file) and "w" in mode else opened

    def full_fsync(handle):
        if os.readlink(f"/proc/self/fd/{handle}").endswith(file):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real_fsync(handle)

    with monkeypatch.context() as patch:
        if where == "write":
            patch.setattr(os, "fdopen", full_open)
        else:
            patch.setattr(os, "fsync", full_fsync)
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint(tmp_path, made(2))
    assert steps(tmp_path) == [1]
    assert leftovers(tmp_path) == []
    assert (tmp_path / "step_00000001" / "model.safetensors").read_bytes() == before
    save_checkpoint(tmp_path, made(2))  # once there is space again
    assert steps(tmp_path) == [1, 2]


def test_every_file_and_folder_is_on_disk_before_the_name_is(tmp_path, monkeypatch):
    events = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(handle):
        events.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        real_fsync(handle)

    def rename(a, b):
        events.append(f"rename to {Path(b).name}")
        real_rename(a, b)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    save_checkpoint(tmp_path / "checkpoints", made(1))
    done = events.index("rename to step_00000001")
    assert events[0] == tmp_path.name  # the folder of checkpoints is new itself
    written = {"model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"}
    assert {re.sub(r"-[0-9a-f]{8}$", "", name) for name in events[1:done]} == {*written, ".step_00000001.writing"}
    assert events[done + 1 :] == ["checkpoints"]


def test_saving_a_step_again_replaces_it(tmp_path):
    save_checkpoint(tmp_path, made(3, score=0.5))
    save_checkpoint(tmp_path, made(3, score=0.25))
    assert steps(tmp_path) == [3]
    assert ckpt.read_state(list_checkpoints(tmp_path)[0])["score"] == 0.25
    assert leftovers(tmp_path) == []


def test_what_a_kill_left_is_never_listed_and_goes_with_the_next_write(tmp_path):
    save_checkpoint(tmp_path, made(1))
    whole = tmp_path / "step_00000001"
    for name in (".writing-step_00000002", ".writing-deleted-step_00000000", ".step_00000003.writing-0123abcd"):
        shutil.copytree(whole, tmp_path / name)  # even one that looks whole
    assert steps(tmp_path) == [1]
    prune(tmp_path, keep_last=1, keep_every=0)
    assert steps(tmp_path) == [1]
    save_checkpoint(tmp_path, made(5))
    assert steps(tmp_path) == [1, 5]
    assert leftovers(tmp_path) == []


def test_prune_keeps_the_newest_the_best_and_every_so_many_steps(tmp_path):
    scores = {10: 0.9, 20: 0.2, 30: None, 40: 0.3, 50: 0.4, 60: 0.5, 70: 0.6, 75: None}
    for step, score in scores.items():
        save_checkpoint(tmp_path, made(step, score))
    assert ckpt.checkpoint_step(ckpt.best_checkpoint(tmp_path)) == 20
    prune(tmp_path, keep_last=2, keep_every=30)
    assert steps(tmp_path) == [20, 30, 60, 70, 75]
    prune(tmp_path, keep_last=1, keep_every=0)
    assert steps(tmp_path) == [20, 75]
    assert leftovers(tmp_path) == []


def test_the_best_is_that_of_the_lowest_quality_where_there_is_any(tmp_path):
    qualities = {10: 3.0, 20: None, 30: 2.0, 40: None, 50: 2.0, 60: 4.0}
    for step, quality in qualities.items():
        save_checkpoint(tmp_path, made(step, score=0.01 * (70 - step), quality=quality))
    assert ckpt.checkpoint_step(ckpt.best_checkpoint(tmp_path)) == 30  # the first of equals; 60 has the lowest score
    prune(tmp_path, keep_last=1, keep_every=0)
    assert steps(tmp_path) == [30, 60]


def test_without_a_quality_the_best_is_that_of_the_lowest_score(tmp_path):
    save_checkpoint(tmp_path, made(1, score=0.2))  # from before there was a quality
    save_checkpoint(tmp_path, made(2, score=0.3, quality=None))
    assert ckpt.checkpoint_step(ckpt.best_checkpoint(tmp_path)) == 1


def test_best_needs_a_score(tmp_path):
    assert ckpt.best_checkpoint(tmp_path) is None
    save_checkpoint(tmp_path, made(1))
    assert ckpt.best_checkpoint(tmp_path) is None


def test_a_checkpoint_killed_in_mid_delete_is_not_a_checkpoint(tmp_path, monkeypatch):
    for step in (1, 2):
        save_checkpoint(tmp_path, made(step))

    def killed(path, **_):
        (path / "model.safetensors").unlink(missing_ok=True)  # the first file is gone, then the power
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            prune(tmp_path, keep_last=1, keep_every=0)
    assert steps(tmp_path) == [2]


@pytest.mark.parametrize("damage", ["truncated", "rubbish", "missing"])
def test_a_damaged_file_is_named(tmp_path, damage):
    path = save_checkpoint(tmp_path, made(1))
    file = path / "ema.safetensors"
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-7] if damage == "truncated" else b"rubbish")
    with pytest.raises(ValueError, match=r"step_00000001/ema\.safetensors: cannot be read"):
        ckpt.load_tensors(path, "ema")
    assert ckpt.load_tensors(path, "model").keys() == {"a.weight", "b"}


def test_a_damaged_state_is_named(tmp_path):
    path = save_checkpoint(tmp_path, made(1))
    (path / "state.json").write_text('{"step": 1,')
    with pytest.raises(ValueError, match=r"step_00000001/state\.json"):
        ckpt.read_state(path)


def test_nothing_is_pickled(tmp_path):
    path = save_checkpoint(tmp_path, made(1))
    assert sorted(p.name for p in path.iterdir()) == sorted([*(f"{n}.safetensors" for n in NAMES), "state.json"])
    for name in NAMES:
        data = (path / f"{name}.safetensors").read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        assert {k for k in header if k != "__metadata__"} == {"a.weight", "b"}


def test_a_users_copy_of_a_checkpoint_is_left_alone(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, made(step))
    shutil.copytree(tmp_path / "step_00000001", tmp_path / "step_00000001-good")
    prune(tmp_path, keep_last=1, keep_every=2)
    assert steps(tmp_path) == [2, 3]
    assert (tmp_path / "step_00000001-good" / "state.json").exists()


# --- damage -----------------------------------------------------------------------------------------------------------


def trained(folder: Path, step: int = 3, kind=torch.optim.Adam, **settings) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(step)
    module = nn.Linear(3, 2)
    optimizer = kind(module.parameters(), lr=0.1, **settings)
    for _ in range(step):
        optimizer.zero_grad()
        module(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()
    moments = ckpt.optimizer_tensors(optimizer, module)
    save_checkpoint(
        folder, Checkpoint(module.state_dict(), module.state_dict(), moments, {"step": step, "score": None})
    )
    return module, optimizer


def restored(folder: Path, kind=torch.optim.Adam, **settings) -> tuple[nn.Module, torch.optim.Optimizer]:
    path, module = list_checkpoints(folder)[-1], nn.Linear(3, 2)
    optimizer = kind(module.parameters(), lr=0.1, **settings)
    ckpt.restore_module(module, path, "model")
    ckpt.restore_moments(optimizer, module, path)
    return module, optimizer


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", ["a bit", "another step's"])
def test_a_file_that_is_not_what_was_written_is_refused_and_the_older_checkpoint_named(tmp_path, name, damage):
    older, path = (save_checkpoint(tmp_path, made(step)) for step in (1, 2))
    file = path / f"{name}.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data) if damage == "a bit" else (older / file.name).read_bytes())
    wanted = rf"{file.name}: cannot be read .*sha256.*; delete .*step_00000002 to go on from .* of step 1$"
    with pytest.raises(UserError, match=wanted):
        ckpt.load_tensors(path, name)
    shutil.rmtree(older)
    with pytest.raises(UserError, match="none before it: train the run anew"):
        ckpt.load_tensors(path, name)


def forged(folder: Path, name: str, change) -> None:
    """Write a file anew, its digest with it: what the digest cannot tell."""
    path = list_checkpoints(folder)[-1]
    parts = {n: ckpt.load_tensors(path, n) for n in NAMES}
    parts[name] = change(parts[name])
    save_checkpoint(folder, Checkpoint(**parts, state=ckpt.read_state(path)))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("model", lambda t: {"weight": t["weight"]}, "bias is missing"),
        ("model", lambda t: {**t, "bias": t["bias"] > 0}, r"bias is torch.bool \[2\], not torch.float32 \[2\]"),
        ("model", lambda t: {**t, "bias": t["bias"][:1].clone()}, r"bias is torch.float32 \[1\], not"),
        ("model", lambda t: {**t, "bias": t["bias"] * math.nan}, "bias is not finite"),
        ("optimizer", lambda t: {}, "holds nothing of any parameter"),
        (
            "optimizer",
            lambda t: {k: v for k, v in t.items() if k != "bias.step"},
            "the optimiser keeps exp_avg, exp_avg",
        ),
        ("optimizer", lambda t: {**t, "bias.exp_avg": torch.ones(1)}, r"bias.exp_avg is torch.float32 \[1\], not"),
        ("optimizer", lambda t: {**t, "bias.exp_avg": t["bias.exp_avg"].double()}, "bias.exp_avg is torch.float64"),
        ("optimizer", lambda t: {**t, "bias.exp_avg_sq": t["bias.exp_avg_sq"] / 0}, "bias.exp_avg_sq is not finite"),
        ("optimizer", lambda t: {**t, "bias.step": torch.tensor(1e15)}, "bias.step=1e.15 is not between 0 and 3"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path, name, change, message):
    trained(tmp_path)
    restored(tmp_path)
    forged(tmp_path, name, change)
    with pytest.raises(UserError, match=rf"step_00000003/{name}\.safetensors: .*{message}"):
        restored(tmp_path)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.AdamW, {"amsgrad": True}),
        (torch.optim.Adagrad, {}),
        (torch.optim.RMSprop, {"momentum": 0.5}),
        (torch.optim.NAdam, {}),
        (torch.optim.Adamax, {}),
    ],
)
def test_any_optimiser_goes_on_exactly(tmp_path, kind, settings):
    module, optimizer = trained(tmp_path, kind=kind, **settings)
    other, resumed = restored(tmp_path, kind=kind, **settings)
    for m, o in ((module, optimizer), (other, resumed)):
        o.zero_grad()
        m(torch.ones(1, 3)).square().sum().backward()
        o.step()
    for a, b in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_numbers_that_are_no_tensors_come_back_as_numbers(tmp_path):
    class Counting(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            for p in self.param_groups[0]["params"]:
                if p.grad is not None:
                    self.state[p]["count"] = self.state[p].get("count", 0) + 1
                    self.state[p]["unused"] = None

    trained(tmp_path, kind=Counting)
    _, resumed = restored(tmp_path, kind=Counting)
    assert [(type(s["count"]), s["count"], s["unused"]) for s in resumed.state.values()] == [(int, 3, None)] * 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("step", 10**15),
        ("step", -1),
        ("step", 1.0),
        ("step", True),
        ("step", None),
        ("images", -5),
        ("images", [1]),
        ("score", "low"),
        ("quality", {}),
        ("score", True),
        ("scaler", {"scale": "x"}),
        ("scaler", 3),
        ("sums", []),
        ("config", 1),
        ("files", []),
        ("files", {"model.safetensors": 5}),
        ("seconds", "long"),
    ],
)
def test_every_field_of_the_state_has_its_type(tmp_path, field, value):
    path = save_checkpoint(tmp_path, made(1))
    file = path / "state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))
    with pytest.raises(UserError, match=rf"step_00000001/state\.json: {field}="):
        ckpt.read_state(path)
    with pytest.raises(UserError, match=rf"state\.json: {field}="):
        ckpt.best_checkpoint(tmp_path)
