"""Configurations to plain data and back; files that are either whole or as they were."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from multistage_diffusion.config import (
    DataConfig,
    DiffusionConfig,
    NetworkConfig,
    OptimizerConfig,
    RunConfig,
    SamplingConfig,
    TrainingConfig,
)
from multistage_diffusion.config.serialization import from_dict, override, read_json, to_dict
from multistage_diffusion.errors import UserError
from multistage_diffusion.files import write_json
from multistage_diffusion.schedules import LogNormal, NoiseSchedule, SigmaPrior, UniformTime
from multistage_diffusion.schedules.discrete import Discrete, UniformSteps
from multistage_diffusion.schedules.edm import EDM
from multistage_diffusion.schedules.rectified_flow import RectifiedFlow
from multistage_diffusion.schedules.ve import VE
from multistage_diffusion.schedules.vp import VP
from multistage_diffusion.stages import Stages

ODD = [1e-300, 0.1, 1 / 3, 2.5103, math.pi, 1e22]  # floats whose decimal form must come back to the last bit


def some_schedule(rng: random.Random) -> NoiseSchedule:
    return rng.choice(
        [
            VP(beta_d=rng.choice(ODD), t_min=1e-4),
            VE(sigma_min=1 / 3, sigma_max=rng.choice([50.0, 1e22])),
            EDM(t_max=rng.choice([80.0, 1e3 / 7])),
            RectifiedFlow(sigma_max=rng.choice([999.0, 80.1])),
        ]
    )


def some_run(seed: int) -> RunConfig:
    """A valid run whose every part may differ from the defaults."""
    rng = random.Random(seed)
    schedule = some_schedule(rng)
    priors: list[SigmaPrior] = [
        UniformTime(schedule=schedule),
        UniformSteps(schedule=Discrete(steps=rng.choice([500, 1000]), spacing=rng.choice(["sqrt", "linear"]))),
        LogNormal(p_mean=rng.uniform(-2, 0), p_std=rng.choice([1.2, math.pi])),
    ]
    stages = rng.choice([Stages(), Stages((1.1,)), Stages((1.1, 2.2), origin={"rule": "mean", "curve": [0.1, None]})])
    numbers = tuple(rng.uniform(0.1, 1) for _ in range(len(stages)))
    prior = UniformTime() if isinstance(schedule, VP) else rng.choice(priors)
    return RunConfig(
        name=rng.choice(["custom", "ünïcode \u2603"]),
        data=DataConfig(
            source="a b.zip", size=rng.choice([None, (8, 9)]), fit="crop", shape=rng.choice([(), (1, 8, 8)])
        ),
        network=NetworkConfig.of(family=rng.choice(["ncsnpp", "ddpmpp"]), decoder_widths=(64,) * len(stages)),
        diffusion=DiffusionConfig(
            precondition=rng.choice(("edm", "velocity")),
            schedule=schedule,
            prior=rng.choice(priors[1:]) if rng.random() < 0.5 else prior,
        ),
        stages=stages,
        optimizer=OptimizerConfig(kind=rng.choice(["adam", "adamw"]), lr=1 / 3, clip=rng.choice([None, 0.1])),
        training=TrainingConfig(
            shares=rng.choice(["uniform", "prior", numbers]),
            weights=rng.choice(["prior", "shares", numbers]),
            flip=False,
        ),
        sampling=SamplingConfig(solver="heun", sigma_min=rng.choice([None, 0.002]), rho=1 / 3),
    )


@pytest.mark.parametrize("seed", range(40))
def test_a_run_survives_json(seed: int, tmp_path: Path) -> None:
    config = some_run(seed)
    write_json(tmp_path / "run.json", config)
    back = from_dict(RunConfig, read_json(tmp_path / "run.json"))
    assert back == config
    assert back.stages.origin == config.stages.origin  # not part of equality
    assert to_dict(back) == to_dict(config)


NETWORKS = [
    NetworkConfig.of("ncsnpp"), NetworkConfig.of("ddpmpp", norm_groups=32), NetworkConfig.of("ldm", decoder_attention=(False,)),
    NetworkConfig.of("meme", attention_shares=(0.5,)),
]  # fmt: skip


PARTS: list[Any] = [
    VP(), VE(), EDM(), RectifiedFlow(), Discrete(), UniformTime(schedule=RectifiedFlow()), UniformSteps(), LogNormal(),
    Stages((1.0, 2.0)), DataConfig(), *NETWORKS, DiffusionConfig(), OptimizerConfig(kind="adamw"),
    TrainingConfig(), SamplingConfig(), RunConfig(),
]  # fmt: skip


@pytest.mark.parametrize("part", PARTS, ids=lambda p: type(p).__name__)
def test_every_part_survives_json(part: Any) -> None:
    text = json.dumps(to_dict(part), allow_nan=False)
    assert from_dict(type(part), json.loads(text)) == part
    if isinstance(part, NoiseSchedule | SigmaPrior):
        base = NoiseSchedule if isinstance(part, NoiseSchedule) else SigmaPrior
        assert json.loads(text)["kind"] == part.kind
        assert from_dict(base, json.loads(text)) == part


def test_an_ordinary_field_called_kind_is_kept() -> None:
    assert from_dict(OptimizerConfig, {"kind": "adamw"}).kind == "adamw"
    with pytest.raises(ValueError, match="kind='sgd' must be one of 'adam', 'adamw'"):
        from_dict(OptimizerConfig, {"kind": "sgd"})


@dataclass(frozen=True, kw_only=True)
class Everything:
    """One field of each annotated form."""

    flag: bool = False
    count: int = 0
    rate: float = 0.0
    word: str = ""
    mode: Literal["a", "b"] = "a"
    level: Literal[1, 2] = 1
    limit: float | None = None
    pair: tuple[int, float] = (0, 0.0)
    many: tuple[int, ...] = ()
    shares: Literal["uniform", "prior"] | tuple[float, ...] = "uniform"
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)
    nested: VE = VE()  # noqa: RUF009 (frozen)
    schedule: NoiseSchedule = VP()  # noqa: RUF009 (frozen)


@pytest.mark.parametrize(
    ("key", "given", "value"),
    [
        ("rate", 3, 3.0),
        ("limit", None, None),
        ("limit", 2, 2.0),
        ("level", 2, 2),
        ("pair", [1, 2], (1, 2.0)),
        ("many", [], ()),
        ("many", (1, 2, 3), (1, 2, 3)),
        ("shares", "prior", "prior"),
        ("shares", [1, 0.5], (1.0, 0.5)),
        ("notes", {"x": [1]}, {"x": [1]}),
        ("nested", {"sigma_max": 9}, VE(sigma_max=9.0)),
        ("nested", {"kind": "ve"}, VE()),
        ("schedule", {"kind": "edm"}, EDM()),
        ("schedule", EDM(), EDM()),
    ],
)
def test_right_values_are_converted(key: str, given: object, value: object) -> None:
    got = getattr(from_dict(Everything, {key: given}), key)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("key", "given", "message"),
    [
        ("flag", 1, "flag=1 must be true or false"),
        ("flag", "true", "flag='true' must be true or false"),
        ("count", True, "count=True must be a whole number"),
        ("count", 1.0, "count=1.0 must be a whole number"),
        ("count", "3", "count='3' must be a whole number"),
        ("count", None, "count=None must be a whole number"),
        ("rate", True, "rate=True must be a number"),
        ("rate", "1e-4", "rate='1e-4' must be a number"),
        ("word", 3, "word=3 must be text"),
        ("mode", "c", "mode='c' must be one of 'a', 'b'"),
        ("mode", ["a"], "mode=['a'] must be one of 'a', 'b'"),
        ("level", True, "level=True must be one of 1, 2"),
        ("limit", "x", "limit='x' must be a number or null"),
        ("limit", False, "limit=False must be a number or null"),
        ("pair", [1], "pair=[1] must have 2 values"),
        ("pair", [1, "x"], "pair[1]='x' must be a number"),
        ("many", 3, "many=3 must be a list"),
        ("many", "12", "many='12' must be a list"),
        ("many", [1, True], "many[1]=True must be a whole number"),
        ("shares", "weird", "shares='weird' must be one of 'uniform', 'prior' or a list"),
        ("shares", [1, "x"], "shares[1]='x' must be a number"),
        ("notes", [1], "notes=[1] must be a mapping"),
        ("nested", {"kind": "vp"}, "nested.kind='vp' is unknown; choose one of ve"),
        ("nested", {"sigma": 1}, "nested.sigma: unknown key; did you mean 'sigma_m"),
        ("nested", 3, "nested: expected a mapping, got 3"),
        ("schedule", {}, "schedule.kind is missing; choose one of discrete, edm, rectified-flow, ve, vp"),
        ("schedule", {"kind": "vpp"}, "schedule.kind='vpp' is unknown; choose one of discrete"),
        ("schedule", {"kind": ["vp"]}, "schedule.kind=['vp'] is unknown; choose one of discrete"),
        ("schedule", {"kind": "vp", "beta_dd": 1}, "schedule.beta_dd: unknown key; did you mean 'beta_d'?"),
        ("schedule", {"kind": "vp", "beta_d": "x"}, "schedule.beta_d='x' must be a number"),
        ("schedule", LogNormal(), "schedule: expected a mapping, got LogNormal"),
        ("cuont", 1, "cuont: unknown key; did you mean 'count'?"),
        ("zzz", 1, "zzz: unknown key; known: flag, count"),
        (3, 1, "3: unknown key; known: flag"),
    ],
)
def test_wrong_values_are_refused_by_name(key: Any, given: object, message: str) -> None:
    with pytest.raises(ValueError) as error:
        from_dict(Everything, {key: given})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_required_key_is_named() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Needs:
        must: int

    with pytest.raises(ValueError, match="must is missing"):
        from_dict(Needs, {})


@pytest.mark.parametrize("data", [None, 3, [1], "x"])
def test_what_is_not_a_mapping_is_refused(data: object) -> None:
    with pytest.raises(ValueError, match="RunConfig: expected a mapping"):
        from_dict(RunConfig, data)


@pytest.mark.parametrize("network", NETWORKS, ids=lambda n: n.family)
def test_a_network_is_read_as_its_family_and_has_its_settings_only(network: NetworkConfig) -> None:
    data = to_dict(network)
    assert data["family"] == network.family
    back = from_dict(NetworkConfig, data)
    assert (type(back), back) == (type(network), network)
    assert ("norm_groups" in data) == (network.family in ("ncsnpp", "ddpmpp"))
    assert ("head_channels" in data) == (network.family == "ldm")


def test_a_network_without_a_family_is_of_the_default_one() -> None:
    assert from_dict(NetworkConfig, {"norm_groups": 32}) == NetworkConfig.of("ncsnpp", norm_groups=32)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"family": "unet"}, "network.family='unet' is unknown; choose one of ddpmpp, dit, ldm, meme, ncsnpp, uvit"),
        ({"family": 3}, "network.family=3 is unknown"),
        (
            {"family": "ddpmpp", "head_channels": 16},
            "network.head_channels: unknown key of family 'ddpmpp'; it is a setting of dit, ldm, uvit",
        ),
        (
            {"family": "ldm", "norm_groups": 16},
            "network.norm_groups: unknown key of family 'ldm'; it is a setting of ddpmpp, ncsnpp",
        ),
        ({"family": "ldm", "head_channel": 16}, "network.head_channel: unknown key; did you mean 'head_channels'?"),
        ({"family": "ldm", "head_channels": "x"}, "network.head_channels='x' must be a whole number"),
    ],
)
def test_settings_that_a_family_has_not_are_refused_by_name(data: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        from_dict(RunConfig, {"network": data})
    assert message in str(error.value)


# --- override -------------------------------------------------------------------------------------------------------

EDM_RUN = RunConfig(diffusion=DiffusionConfig(precondition="edm", schedule=EDM(), prior=LogNormal()))


def test_override_changes_just_what_is_named() -> None:
    changed = override(
        EDM_RUN, {"optimizer.lr": 1e-4, "diffusion.prior.p_mean": -0.4, "name": "mine", "data.size": [4, 6]}
    )
    assert changed.diffusion.prior == LogNormal(p_mean=-0.4)
    assert changed.data.size == (4, 6)
    expected = dataclasses.replace(
        EDM_RUN,
        name="mine",
        data=DataConfig(size=(4, 6)),
        optimizer=OptimizerConfig(lr=1e-4),
        diffusion=dataclasses.replace(EDM_RUN.diffusion, prior=LogNormal(p_mean=-0.4)),
    )
    assert changed == expected
    assert EDM_RUN.optimizer.lr == 2e-4


def test_override_replaces_a_prior_by_another_kind() -> None:
    for prior in ({"kind": "uniform-time", "schedule": {"kind": "ve"}}, UniformTime(schedule=VE())):
        assert override(EDM_RUN, {"diffusion.prior": prior}).diffusion.prior == UniformTime(schedule=VE())


@pytest.mark.parametrize("reverse", [False, True])
def test_override_of_a_kind_starts_from_its_defaults(reverse: bool) -> None:
    changes: dict[str, Any] = {"diffusion.prior.kind": "log-normal", "diffusion.prior.p_std": 1.0}
    if reverse:
        changes = dict(reversed(changes.items()))
    assert override(RunConfig(), changes).diffusion.prior == LogNormal(p_std=1.0)
    schedule: dict[str, Any] = {"diffusion.schedule.beta_d": 9.0, "diffusion.schedule.kind": "vp"}
    assert override(EDM_RUN, schedule).diffusion.schedule == VP(beta_d=9.0)
    # the same kind again keeps what was set; an ordinary field called `kind` resets nothing
    kept = override(EDM_RUN, {"diffusion.prior.p_mean": -3.0})
    assert override(kept, {"diffusion.prior.kind": "log-normal"}) == kept
    assert override(EDM_RUN, {"optimizer.lr": 1.0, "optimizer.kind": "adamw"}).optimizer == OptimizerConfig(
        kind="adamw", lr=1.0
    )


@pytest.mark.parametrize("reverse", [False, True])
def test_override_of_a_kind_and_of_keys_within_its_parts(reverse: bool) -> None:
    changes: dict[str, Any] = {"diffusion.prior.kind": "uniform-time", "diffusion.prior.schedule.kind": "ve"}
    if reverse:
        changes = dict(reversed(changes.items()))
    assert override(EDM_RUN, changes).diffusion.prior == UniformTime(schedule=VE())
    steps = {"diffusion.prior.kind": "uniform-steps", "diffusion.prior.schedule.steps": 100}
    for base in (EDM_RUN, override(EDM_RUN, changes)):  # of another prior's schedule nothing is kept
        assert override(base, steps).diffusion.prior == UniformSteps(schedule=Discrete(steps=100))
    whole = {
        "diffusion": {"precondition": "edm"},
        "diffusion.prior.kind": "log-normal",
        "diffusion.schedule.kind": "ve",
    }
    made = override(RunConfig(), whole).diffusion
    assert (made.prior, made.schedule) == (LogNormal(), VE())


def test_a_part_of_another_kind_is_refused_with_the_kinds_that_have_it() -> None:
    line = "diffusion.prior.schedule is an unknown key of kind 'log-normal'; it is a setting of uniform-"
    for given in ({}, {"diffusion.prior.kind": "log-normal"}):
        with pytest.raises(UserError, match=line):
            override(EDM_RUN, {**given, "diffusion.prior.schedule.kind": "ve"})


def test_override_takes_a_replacement_and_a_change_to_it_without_touching_the_caller() -> None:
    prior = {"kind": "log-normal", "p_mean": 0.0}
    changed = override(RunConfig(), {"diffusion.prior": prior, "diffusion.prior.p_mean": 1.0})
    assert changed.diffusion.prior == LogNormal(p_mean=1.0)
    assert prior == {"kind": "log-normal", "p_mean": 0.0}


def test_of_a_part_as_a_whole_and_its_keys_the_later_wins() -> None:
    whole = {"network": {"family": "ncsnpp", "encoder_width": 64, "norm_groups": 8}}
    ldm = NetworkConfig.of("ldm", encoder_width=64)
    assert override(RunConfig(), {**whole, "network.family": "ldm"}).network == ldm
    ncsnpp = NetworkConfig.of("ncsnpp", encoder_width=64, norm_groups=8)
    assert override(RunConfig(), {"network.family": "ldm", "network.dropout": 0.3, **whole}).network == ncsnpp
    # keys of a whole that does not name them all, and a typing error before a whole
    some = {"network": {"encoder_width": 64}, "network.head_channels": 16, "network.family": "ldm"}
    assert override(RunConfig(), some).network == NetworkConfig.of("ldm", encoder_width=64, head_channels=16)
    with pytest.raises(UserError, match=r"data.sise: unknown key; did you mean 'size'"):
        override(RunConfig(), {"data.sise": 8, "data": {"source": "digits"}})


def test_a_new_family_keeps_what_both_have_and_its_defaults_otherwise() -> None:
    made = RunConfig(network=NetworkConfig.of("ncsnpp", encoder_width=64, channel_mult=(1, 2), norm_groups=32))
    changes = {"network.head_channels": 16, "network.family": "ldm"}  # in any order
    expected = NetworkConfig.of("ldm", encoder_width=64, channel_mult=(1, 2), head_channels=16)
    assert override(made, changes).network == expected
    again = override(override(made, changes), {"network.family": "ddpmpp"}).network
    assert again == NetworkConfig.of("ddpmpp", encoder_width=64, channel_mult=(1, 2))  # norm_groups: ldm had none
    assert override(made, {"network.family": "ddpmpp"}).network.norm_groups == 32
    assert override(made, {"network.family": "ncsnpp"}) == made
    with pytest.raises(UserError, match=r"network.family='unet' is unknown; choose one of"):
        override(made, {"network.family": "unet"})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("optimiser.lr", 1.0, "optimiser.lr: optimiser is an unknown key; did you mean 'optimizer'?"),
        ("optimizer.lrr", 1.0, "optimizer.lrr: unknown key; did you mean 'lr'?"),
        ("optimizer.lr.x", 1.0, "optimizer.lr.x: optimizer.lr has no keys"),
        ("diffusion.prior.p_men", 1.0, "diffusion.prior.p_men: unknown key; did you mean 'p_mean'?"),
        ("diffusion.prior.kind", "gauss", "diffusion.prior.kind='gauss' is unknown; choose one of log-normal"),
        ("optimizer.lr", "fast", "optimizer.lr='fast' must be a number"),
        ("optimizer.lr", -1.0, "optimizer.lr=-1.0 must be positive"),
        ("training.steps", 1.5, "training.steps=1.5 must be a whole number"),
        ("", 1, ": unknown key"),
        ("seed", 1, "seed: unknown key"),
    ],
)
def test_override_refuses_by_name(key: str, value: object, message: str) -> None:
    with pytest.raises(ValueError) as error:
        override(EDM_RUN, {key: value})
    assert message in str(error.value)


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1', "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"", "not valid JSON"),
    ],
)
def test_unreadable_json_names_the_file(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"broken\.json: {message}"):
        read_json(path)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.json: no such file"):
        read_json(tmp_path / "none.json")
    with pytest.raises(ValueError, match="it is a folder"):
        read_json(tmp_path)


def test_json_text_is_utf8_whatever_the_locale(tmp_path: Path) -> None:
    (tmp_path / "name.json").write_bytes('{"name": "Zürich ☃"}'.encode())
    assert read_json(tmp_path / "name.json") == {"name": "Zürich ☃"}


def test_an_infinity_that_another_program_wrote_is_refused_by_the_field(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"optimizer": {"lr": Infinity}}')
    with pytest.raises(ValueError, match=r"optimizer\.lr=inf must be a finite number"):
        from_dict(RunConfig, read_json(tmp_path / "run.json"))
