"""A run's configuration is resolved in one direction: each open key is set once, and resolving again changes nothing."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_config, tiny_data

from multistage_diffusion.config import DataConfig, RunConfig
from multistage_diffusion.config.serialization import from_dict, override, to_dict
from multistage_diffusion.data import ImageData
from multistage_diffusion.stage_finding import StageResult, StageSettings
from multistage_diffusion.training.callbacks import Callback
from multistage_diffusion.training.trainer import Trainer
from multistage_diffusion.workflow import resolve as resolve_module
from multistage_diffusion.workflow import resume as resume_module
from multistage_diffusion.workflow import train as train_module
from multistage_diffusion.workflow.differences import CHANGEABLE, differences, dotted
from multistage_diffusion.workflow.resolve import RESOLVED, PreparedRun, open_new, resolve_run
from multistage_diffusion.workflow.resume import RECORDED, resume
from multistage_diffusion.workflow.stages import find_stages
from multistage_diffusion.workflow.train import train

CPU = torch.device("cpu")
GREY = {"data.source": "digits", "data.shape": [], "training.precision": "auto"}
LATENT = {**GREY, "codec.source": "identity", "network.family": "ncsnpp", "network.channel_mult": [1]}


@dataclass(frozen=True)
class Case:
    """A configuration as a user gives it.

    Attributes:
        changes: to the tiny configuration.
        sets: the keys that resolving sets to another value.
        classes: of the images.
        on_latents: whether the stages are those found on the images' latents.
    """

    changes: Mapping[str, Any]
    sets: set[str]
    classes: int = 0
    on_latents: bool = False
    shape: tuple[int, int, int] = field(default=(1, 4, 4))


ALWAYS = {"data.fingerprint", "data.shape", "training.precision"}
CODEC = {"codec.fingerprint", "codec.shape", "codec.scale"}
CASES = {
    "pixels": Case(GREY, ALWAYS),
    "colour": Case(GREY, ALWAYS | {"network.channels"}, shape=(3, 4, 6)),
    "labels": Case({**GREY, "network.num_classes": 3}, ALWAYS | {"data.class_counts"}, classes=3),
    "labels that are not used": Case(GREY, ALWAYS, classes=3),
    "a shape of other data": Case({**GREY, "data.shape": [1, 8, 8], "data.fingerprint": "old"}, ALWAYS),
    "a relative path": Case({**GREY, "data.source": "photos"}, ALWAYS | {"data.source"}),
    "a reference": Case({**GREY, "evaluation.reference": "x.npz"}, ALWAYS | {"evaluation.reference"}),
    "latents": Case(LATENT, ALWAYS | CODEC),
    "labelled latents": Case({**LATENT, "network.num_classes": 3}, ALWAYS | CODEC | {"data.class_counts"}, classes=3),
    "latents of a given scale": Case({**LATENT, "codec.scale": 2.0}, ALWAYS | CODEC - {"codec.scale"}),
    "stages of latents": Case(LATENT, ALWAYS | CODEC, on_latents=True),
    "a given precision": Case({**GREY, "training.precision": "fp64"}, ALWAYS - {"training.precision"}),
    # an imported run: everything but the facts of its data
    "imported": Case({**GREY, "data.shape": [1, 4, 4]}, ALWAYS - {"data.shape"}),
    "imported labels": Case(
        {**GREY, "data.shape": [1, 4, 4], "network.num_classes": 3},
        ALWAYS - {"data.shape"} | {"data.class_counts"},
        classes=3,
    ),
    "imported latents": Case(
        {**LATENT, "data.shape": [1, 4, 4], "codec.shape": [1, 4, 4], "codec.scale": 0.5},
        ALWAYS - {"data.shape"} | {"codec.fingerprint"},
    ),
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSDIFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()


def given(case: Case, data: ImageData) -> tuple[RunConfig, StageResult | None]:
    if not case.on_latents:
        return tiny_config(**{key.replace(".", "__"): value for key, value in case.changes.items()}), None
    result = dataclasses.replace(found(), codec="identity", scale=1.5)
    return override(tiny_config(), {**case.changes, "stages": result.stages()}), result


@functools.cache
def found() -> StageResult:
    return find_stages(tiny_data().split(0.1)[0], StageSettings(samples=100))


def resolved(config: RunConfig, data: ImageData, result: StageResult | None) -> PreparedRun:
    return resolve_run(config, data, result, CPU).encoded(CPU)


@pytest.mark.parametrize("name", CASES)
def test_only_open_keys_are_set_and_each_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, told = CASES[name], []

    def recorded(config: Any, changes: Mapping[str, Any]) -> Any:
        told.extend(changes)
        return override(config, changes)

    data = tiny_data(classes=case.classes, shape=case.shape)
    config, result = given(case, data)
    monkeypatch.setattr(resolve_module, "override", recorded)
    complete = resolved(config, data, result).config
    assert set(differences(config, complete)) == case.sets
    assert len(told) == len(set(told))
    assert set(told) <= set(RESOLVED)


@pytest.mark.parametrize("name", CASES)
def test_resolving_again_changes_nothing(name: str) -> None:
    case = CASES[name]
    data = tiny_data(classes=case.classes, shape=case.shape)
    config, result = given(case, data)
    first = resolved(config, data, result).config
    stored = from_dict(RunConfig, json.loads(json.dumps(to_dict(first))))
    assert stored == first
    for again in (resolved(stored, data, result), resolved(stored, data, None)):
        assert to_dict(again.config) == to_dict(first)


@pytest.mark.parametrize("name", CASES)
def test_nothing_stays_open(name: str) -> None:
    case = CASES[name]
    data = tiny_data(classes=case.classes, shape=case.shape)
    open_config, result = given(case, data)
    config = resolved(open_config, data, result).config
    assert config.data.fingerprint == data.fingerprint
    assert config.data.shape == data.shape
    assert config.network.channels == config.input_shape[0]
    assert config.training.precision != "auto"
    assert sum(config.data.class_counts) == (len(data.split(0.1)[0]) if config.network.num_classes else 0)
    assert config.codec.used == bool(config.codec.fingerprint and config.codec.scale and config.codec.shape)


def named(*names: str) -> ImageData:
    images = tiny_data(classes=len(names))
    return ImageData(images.storage, images.labels, "named", names)


def test_class_names_are_those_of_the_data_or_those_given() -> None:
    config = tiny_config(network__num_classes=3)
    given = override(config, {"data.class_names": ["x", "y", "z"]})
    pets = named("cats", "dogs", "eels")
    found = [
        resolved(c, d, None).config.data.class_names for c in (config, given) for d in (pets, named("0", "1", "2"))
    ]
    assert found == [("cats", "dogs", "eels"), (), ("cats", "dogs", "eels"), ("x", "y", "z")]
    assert resolved(tiny_config(), pets, None).config.data.class_names == ()  # not class-conditional


def test_every_documented_key_exists_and_is_set_by_a_case() -> None:
    assert set(RESOLVED) <= set(dotted(tiny_config()))
    known = {key for case in CASES.values() for key in case.sets}
    # see the tests of paths, of class names and of the scale that a codec declares (test_latent.py)
    assert set(RESOLVED) - known == {"codec.source", "codec.shift", "training.init_from", "data.class_names"}
    # what an imported run gets when it is first resumed may be recorded then
    imported = {key for name, case in CASES.items() if name.startswith("imported") for key in case.sets}
    assert imported | {"data.class_names"} <= set(RECORDED) <= set(RESOLVED)


# -- runs -------------------------------------------------------------------------------------------------------------


class Keeps(Callback[Trainer]):
    """Keeps the trainer's configuration."""

    def started(self, trainer: Trainer) -> None:
        self.config = trainer.config


@pytest.mark.parametrize("codec", ["", "identity"])
def test_a_configuration_goes_from_the_user_to_the_trainer_without_a_way_back(
    codec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[tuple[str, RunConfig, RunConfig]] = []
    for module in (train_module, resume_module, resolve_module):

        def recorded(config: RunConfig, changes: Mapping[str, Any], name: str = module.__name__) -> RunConfig:
            steps.append((name.rpartition(".")[2], config, override(config, changes)))
            return steps[-1][2]

        monkeypatch.setattr(module, "override", recorded)

    def require_one_way(first: RunConfig, way: list[str]) -> None:
        assert [name for name, _, _ in steps] == way
        configs = [first, *(after for _, _, after in steps)]
        assert all(before is after for (_, before, _), after in zip(steps, configs, strict=False))
        assert keeps.config is configs[-1]
        changed = [key for a, b in itertools.pairwise(configs[1:]) for key in differences(a, b)]
        assert len(changed) == len(set(changed))
        steps.clear()

    keeps = Keeps()
    np.save(tmp_path / "data.npy", tiny_data(40).array())
    config = tiny_config(data__shape=(), training__steps=1, training__precision="auto")
    changes = {"data.source": str(tmp_path / "data.npy"), "codec.source": codec, "optimizer.lr": 0.5}
    scale = ["resolve"] if codec else []
    run = train(config, "run", changes, device="cpu", callbacks=[keeps])
    require_one_way(config, ["train", "resolve", *scale])
    assert run.config() == keeps.config
    assert (run.config().name, run.config().optimizer.lr) == ("run", 0.5)
    before = run.config()
    monkeypatch.setattr(type(run), "config", lambda _: before)
    resume("run", {"training.steps": 2}, device="cpu", callbacks=[keeps])
    require_one_way(before, ["resume", "resolve"])


def test_nothing_is_encoded_before_all_cheap_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def began(*_: object, **__: object) -> None:
        raise AssertionError("encoded")

    monkeypatch.setattr(resolve_module, "encode_parts", began)
    np.save(tmp_path / "data.npy", tiny_data(40).array())
    config = tiny_config(data__source="data.npy", data__shape=(), codec__source="identity")
    for changes, message in (
        ({"training.batch": 2}, "training.batch=2 is too small"),
        ({"network.num_classes": 2}, "has no labels"),
        ({"evaluation.every": 1, "evaluation.features": "absent"}, "evaluation.features='absent'"),
        ({"evaluation.every": 1, "evaluation.reference": "absent.npz"}, "evaluation.reference: .*absent.npz"),
    ):
        with pytest.raises(ValueError, match=message):
            train(config, "run", changes, device="cpu")
    with pytest.raises(AssertionError, match="encoded"):
        train(config, "run", device="cpu")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.npy", "photos"]


# -- single keys ------------------------------------------------------------------------------------------------------


def test_stages_and_their_origin_are_those_of_the_result() -> None:
    data, result = tiny_data(shape=(3, 4, 6)), found()
    config = override(tiny_config(**{k.replace(".", "__"): v for k, v in GREY.items()}), {"stages": result.stages()})
    stages = resolve_run(config, data, result, CPU).config.stages
    assert stages.interior == result.edges_sigma
    assert stages.origin["fingerprint"] == result.fingerprint
    other = dataclasses.replace(result.settings, data_range=(0.0, 1.0))
    with pytest.raises(ValueError, match=r"data_range \[0.0, 1.0\], but networks train on \[-1, 1\]"):
        resolve_run(config, data, dataclasses.replace(result, settings=other), CPU)


def test_paths_become_absolute_and_stay(tmp_path: Path) -> None:
    (tmp_path / "digits").mkdir()  # the word means the data set all the same
    (tmp_path / "identity").mkdir()  # and so does this one
    (tmp_path / "link").symlink_to("photos")
    for source in ("digits", "identity"):
        config = tiny_config(
            data__source=source, codec__source=source, training__init_from="link", evaluation__reference="~/x.npz"
        )
        paths = resolve_module._paths(config)
        assert paths["data.source"] == ("digits" if source == "digits" else str(tmp_path / source))
        assert paths["codec.source"] == ("identity" if source == "identity" else str(tmp_path / source))
        assert paths["training.init_from"] == str(tmp_path / "photos")
        assert paths["evaluation.reference"] == str(Path.home() / "x.npz")
        assert resolve_module._paths(override(config, paths)) == paths
    kept = str(tmp_path / "link" / "run")  # a link that changes must not change a resumed run
    assert resolve_module._paths(tiny_config(training__init_from=kept))["training.init_from"] == kept


def test_new_data_are_opened_whatever_is_recorded(tmp_path: Path) -> None:
    np.save(tmp_path / "data.npy", tiny_data(40).array())
    recorded = DataConfig(source="data.npy", fingerprint="of others", shape=(3, 9, 9))
    assert open_new(recorded).shape == (1, 4, 4)


def test_paths_of_data_and_codec_may_change_when_a_run_is_resumed() -> None:
    assert {"data.source", "codec.source"} <= set(CHANGEABLE) & set(RESOLVED)
