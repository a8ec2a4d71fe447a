from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from multistage_diffusion.config.serialization import override
from multistage_diffusion.denoisers import build_denoiser
from multistage_diffusion.files import write_json
from multistage_diffusion.training.checkpoint import Checkpoint, save_checkpoint
from multistage_diffusion.training.run import Run, device_name


@pytest.fixture
def run(tmp_path, tiny_config):
    return Run.create(tmp_path / "run", tiny_config())


def save(run: Run, step: int, score: float | None = None) -> dict[str, torch.Tensor]:
    """Save a checkpoint whose averaged weights are all 1 / step and whose weights are all step."""
    denoiser = build_denoiser(run.config())
    weights = {k: torch.full_like(v, float(step)) for k, v in denoiser.state_dict().items()}
    averaged = {k: torch.full_like(v, 1.0 / step) for k, v in weights.items()}
    save_checkpoint(
        run.checkpoints, Checkpoint(weights, averaged, {}, {"step": step, "score": score, "config": run.config()})
    )
    return averaged


def test_create_writes_the_configuration_and_open_reads_it(run, tiny_config):
    assert Run.open(run.path).config() == tiny_config()
    assert [p.name for p in run.path.iterdir()] == ["config.json"]


def test_create_takes_an_empty_folder_and_makes_parents(tmp_path, tiny_config):
    (tmp_path / "empty").mkdir()
    Run.create(tmp_path / "empty", tiny_config())
    assert Run.create(tmp_path / "a" / "b" / "c", tiny_config()).config_file.exists()


def test_create_refuses_what_is_there(run, tmp_path, tiny_config):
    (tmp_path / "file").write_text("precious")
    before = run.config_file.read_bytes()
    for path, mend in ((run.path, "resume it"), (tmp_path / "file", "it is not a run")):
        with pytest.raises(ValueError, match=rf"exists; {mend}.*--replace"):
            Run.create(path, tiny_config(training__steps=9))
    assert run.config_file.read_bytes() == before
    assert (tmp_path / "file").read_text() == "precious"


def test_replace_moves_the_old_run_aside(run, tiny_config):
    (run.path / "mine.txt").write_text("precious")
    new = Run.create(run.path, tiny_config(training__steps=9), replace=True)
    assert new.config().training.steps == 9
    (aside,) = (p for p in run.path.parent.iterdir() if p != run.path)
    assert aside.name.startswith("run.replaced-")
    assert (aside / "mine.txt").read_text() == "precious"
    assert Run.open(aside).config() == tiny_config()


def test_open_refuses_a_folder_that_is_no_run(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ValueError, match=r"not a run \(no config\.json\)"):
            Run.open(path)


def test_a_spoilt_configuration_is_named(run):
    data = json.loads(run.config_file.read_text())
    data["training"]["batsch"] = 3
    run.config_file.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"config\.json: training\.batsch: unknown key; did you mean 'batch'"):
        run.config()


def test_checkpoints_by_name(run):
    with pytest.raises(ValueError, match="has no checkpoint yet"):
        run.checkpoint("latest")
    for step in (10, 20, 30):
        save(run, step)
    assert run.checkpoint("best").name == "step_00000030"  # none is scored
    save(run, 40, score=0.3)
    save(run, 50, score=0.4)
    save(run, 60)
    found = {which: int(run.checkpoint(which).name[5:]) for which in ("best", "latest", "20", "00000030")}
    assert found == {"best": 40, "latest": 60, "20": 20, "00000030": 30}
    for which in ("21", "first", "-10", "1e1"):
        with pytest.raises(ValueError, match=rf"checkpoint '{which}': not kept .* latest, best or one of 10, 20, 30"):
            run.checkpoint(which)


def test_denoiser_of_a_checkpoint(run):
    save(run, 2, score=0.1)
    save(run, 4, score=0.2)
    best = run.denoiser()
    assert not best.training
    assert all(p.eq(0.5).all() and not p.requires_grad for p in best.parameters())
    assert all(p.eq(4.0).all() for p in run.denoiser("latest", weights="model").parameters())


def test_a_run_is_held_by_one_process_at_a_time(run):
    with run.locked():
        with pytest.raises(ValueError, match="another process is training this run"), Run(run.path).locked():
            pytest.fail("locked twice")
        code = (
            "import fcntl, sys\n"
            "try: fcntl.flock(open(sys.argv[1], 'w'), fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
            "except OSError: sys.exit(7)"
        )
        assert subprocess.run([sys.executable, "-c", code, str(run.path / ".lock")]).returncode == 7
    with run.locked():  # free again
        pass


def test_a_failure_frees_the_run(run):
    with pytest.raises(RuntimeError), run.locked():
        raise RuntimeError
    with run.locked():
        pass


def test_rewind_drops_later_lines_and_a_torn_one(run):
    run.rewind_metrics(0)  # nothing logged yet
    assert run.records() == []
    lines = [{"kind": "train", "step": s, "loss": [0.1 * s, None]} for s in (5, 10, 15)]
    for line in lines:
        run.log(line)
    with run.metrics_file.open("a") as file:
        file.write('{"kind": "train", "st')  # killed in mid-write
    assert run.records() == lines
    run.rewind_metrics(10)
    assert run.metrics_file.read_text() == "".join(json.dumps(line) + "\n" for line in lines[:2])
    run.log(lines[2])
    assert run.records() == lines


def test_launches_name_the_command_and_the_device(run, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/msdiff", "train", "--resume", "x"])
    for _ in range(2):
        run.log_launch(torch.device("cpu"))
    launches = [json.loads(line) for line in (run.path / "launches.jsonl").read_text().splitlines()]
    assert len(launches) == 2
    assert launches[0]["command"] == "msdiff train --resume x"
    assert launches[0]["device"] == device_name(torch.device("cpu"))
    assert launches[0]["torch"] == torch.__version__


def test_data_that_have_changed_are_refused(tmp_path, tiny_config, tiny_data):
    data = tiny_data(20)
    np.save(tmp_path / "images.npy", data.array())
    config = tiny_config(data__source=str(tmp_path / "images.npy"))
    run = Run.create(tmp_path / "run", config)
    opened = run.data()
    assert np.array_equal(opened.array(), data.array())
    pinned = dataclasses.replace(config.data, fingerprint=opened.fingerprint)
    assert len(run.data(pinned)) == 20
    np.save(tmp_path / "images.npy", data.array()[:-1])
    with pytest.raises(ValueError, match="fingerprint"):
        run.data(pinned)


def test_a_configuration_edited_since_is_not_sampled_from(run):
    save(run, 1)
    for name, change in (("stages", {"stages.interior": [0.9, 3.0]}), ("network", {"network.blocks_per_level": 2})):
        before = run.config_file.read_text()
        write_json(run.config_file, override(run.config(), change))
        with pytest.raises(ValueError, match=f"{name} was edited since step 1; put it back"):
            run.denoiser()
        run.config_file.write_text(before)
    run.denoiser()


def test_a_run_in_training_is_not_moved_aside(run, tiny_config):
    with run.locked(), pytest.raises(ValueError, match="another process is training this run"):
        Run.create(run.path, tiny_config(), replace=True)
    assert run.config_file.exists()


def test_launches_survive_a_torn_line_and_can_be_pasted(run, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/bin/msdiff", "train", "--data", "my photos"])
    run.log_launch(torch.device("cpu"))
    with (run.path / "launches.jsonl").open("a") as file:
        file.write('{"time": "2026')
    run.log_launch(torch.device("cpu"))
    commands = [json.loads(line)["command"] for line in (run.path / "launches.jsonl").read_text().splitlines()]
    assert commands == ["msdiff train --data 'my photos'"] * 2


def test_a_lock_that_is_a_link_harms_nothing(run, tmp_path):
    target = tmp_path / "precious"
    target.write_text("precious")
    (run.path / ".lock").symlink_to(target)
    with pytest.raises(ValueError, match=r"\.lock: cannot be written .*link"), run.locked():
        pass
    assert target.read_text() == "precious"


def test_weights_are_checked_before_they_sample(run):
    save(run, 2)
    path = run.checkpoint("latest")
    (path / "model.safetensors").write_bytes(b"not read for sampling")
    run.denoiser()
    file = path / "ema.safetensors"
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"ema\.safetensors: cannot be read .*sha256"):
        run.denoiser()


def test_a_run_appears_with_all_that_belongs_to_it(tmp_path, tiny_config):
    def fail(run):
        assert run.config_file.exists()
        assert not (tmp_path / "run").exists()
        raise RuntimeError

    with pytest.raises(RuntimeError):
        Run.create(tmp_path / "run", tiny_config(), fill=fail)
    assert list(tmp_path.iterdir()) == []


def test_a_launch_of_the_module_can_be_pasted(run, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/site/multistage_diffusion/__main__.py", "train", "a b"])
    run.log_launch(torch.device("cpu"))
    launch = json.loads((run.path / "launches.jsonl").read_text())
    assert launch["command"] == "python -m multistage_diffusion train 'a b'"
