"""Configurations that no run can be made of: by --set, as JSON and as YAML."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adversary import BOMB, DEEP, TINY, Case, both, cases, cut, drop, edited, fifo, file, folder_in_place, put

BASE = ("train", "--preset", "digits", "--data", "data.npz", "--out", "new", *TINY)

SETTINGS = """
training.step=1
training.=1
.steps=1
training
=1
training.steps
training.steps.more=1
a.b.c.d=1
training.steps=[1]
training.steps=null
training.steps=1.5
training.steps=true
training.steps="3"
training.steps=-1
training.steps=1e400
training.steps=.nan
training.steps=99999999999999999999999
training.batch=0
training.batch=[]
training.accumulate=7
training.update_mode=all
training.shares=[1,2]
training.shares=[0,0,0]
training.shares=[1,-1,1]
training.shares=[1,.inf,1]
training.weights=[.nan,1,1]
training.weights=half
training.ema_halflife=0
training.ema_halflife=-.inf
training.label_dropout=1.1
training.augment=-1
training.soft_intervals=2
training.soft_intervals=[0,1]
training.overlap=.inf
training.overlap=1000
training.shares=[1e308,1e308,1e308]
training.weights=[1e308,1e308,1e308]
training.sample_count=0 training.sample_every=1
diffusion.precondition=edm diffusion.sigma_data=1e300
sampling.guidance_interval=[.nan,1]
sampling.rho=1e300 sampling.spacing=edm
training.branch_at=-1
training.precision=fp8
training.seed=-1
training.keep_last=0
training.held_out_rows=0
training.init_from=7
training.init_from=absent
optimizer.kind=sgd
optimizer.lr=0
optimizer.lr=-1e-4
optimizer.lr=.nan
optimizer.lr=fast
optimizer.betas=[0.9]
optimizer.betas=[0.9,1.0]
optimizer.betas=0.9
optimizer.eps=0
optimizer.weight_decay=-1
optimizer.clip=0
network.family=unet
network.encoder_width=0
network.encoder_width=7
network.encoder_width=-8
network.encoder_width=100000000
network.encoder_width=99999999999999
network.decoder_widths=[]
network.decoder_widths=[8]
network.decoder_widths=[8,8,0]
network.decoder_widths=[8,8,[8]]
network.decoder_widths=[8,8,7]
network.decoder_widths=[8,8,4000000]
network.channel_mult=[]
network.channel_mult=[0]
network.blocks_per_level=0
network.blocks_per_level=-1
network.attention_factors=[3]
network.attention_factors=[0]
network.dropout=1.5
network.dropout=-0.5
network.num_classes=-1
network.num_classes=99999999999
network.norm_groups=0
network.augment_dim=-1
network.head_channels=0
network.decoder_attention=[true]
network.attention_shares=[0.5,0.5,0.5]
stages.interior=[2,1]
stages.interior=[1,1]
stages.interior=[0,1]
stages.interior=[-1,1]
stages.interior=[.nan,1]
stages.interior=[1,.inf]
stages.interior=[1]
stages.interior=1
stages.interior=[1,1e300]
stages.origin=[1]
diffusion.precondition=ddpm
diffusion.sigma_data=0
diffusion.sigma_data=.nan
diffusion.schedule=vp
diffusion.schedule={kind: cosine}
diffusion.schedule={beta_d: 3}
diffusion.schedule.kind=[vp]
diffusion.schedule.beta_d=-1
diffusion.schedule.beta_d=.inf
diffusion.prior={}
diffusion.prior.kind=null
diffusion.prior={kind: log-normal, mean: x}
sampling.order=4
sampling.order=0
sampling.calls=0
sampling.solver=euler
sampling.sigma_min=0
sampling.sigma_min=[1]
sampling.sigma_min=1000000
sampling.rho=0
sampling.eta=-1
sampling.guidance_interval=[2,1]
sampling.guidance_interval=[1]
sampling.threshold=0
sampling.clip=0
training.freeze=decoder
network.norm_eps=0
network.down_padding=odd
evaluation.every=-1
evaluation.count=1
evaluation.features=""
evaluation.features=7
execution.compile=maybe
execution=7
codec.source=absent
codec.scale=0
codec.shape=[1,2]
codec.shape=[0,0,0]
data.held_out=1
data.size=[8]
data.size=[0,8]
data.fit=stretch
data.max_pixels=0
data.shape=[x]
data=7
data=null
format_version=2
format_version="1"
name=7
name={1: 2}
name=!!python/object:os.system
name=!!binary aGk=
name=2001-99-99
name=2001-01-01
name=&a [*a]
name="open
name={
name=[1,2
name=\t- x
name=@x
optimizer.lr=0x
1=2
é.ü=1
[bold].x=1
""".strip().splitlines()

TEXTS: dict[str, str | bytes] = {
    "empty.json": "",
    "null.json": "null",
    "list.json": "[]",
    "number.json": "7",
    "text.json": '"digits"',
    "half.json": '{"name": "x"',
    "comma.json": '{"name": "x",}',
    "twice.json": '{"name": "x"} {"name": "y"}',
    "deep.json": DEEP,
    "deep object.json": '{"stages": {"origin": ' * 2000 + "1" + "}}" * 2000,
    "binary.json": bytes(range(256)),
    "utf-16.json": '{"name": "x"}'.encode("utf-16"),
    "latin.json": '{"name": "é"}'.encode("latin-1"),
    "zeros.json": b"\0" * 1000,
    "png.json": b"\x89PNG\r\n\x1a\n" + b"\0" * 64,
    "surrogate.json": '{"\\ud800": 1}',
    "controls.json": '{"\\u001b[2J\\u202e": 1}',
    "huge number.json": '{"training": {"steps": ' + "9" * 5000 + "}}",
    "infinity.json": '{"optimizer": {"lr": Infinity}}',
    "nan.json": '{"optimizer": {"lr": NaN}}',
    "unknown.json": '{"trainning": {}}',
    "section.json": '{"training": []}',
    "section text.json": '{"training": "fast"}',
    "long key.json": json.dumps({"k" * 100_000: 1}),
    "many lines.json": "\n" * 100_000 + "{",
    "kind.json": '{"diffusion": {"schedule": {"kind": {"kind": "vp"}}}}',
    "newline.json": '{"name\\nmsdiff: all is well": 1}',
    "empty.yaml": "",
    "list.yaml": "- 1\n- 2\n",
    "two.yaml": "a: 1\n---\nb: 2\n",
    "tab.yaml": "training:\n\tsteps: 1\n",
    "indent.yaml": "training:\n steps: 1\n   batch: 2\n",
    "bomb.yaml": BOMB,
    "cycle.yaml": "&a {name: *a}",
    "cycle key.yaml": "? &a [*a]\n: 1\n",
    "deep.yaml": "[" * 3000,
    "deeper.yaml": DEEP,
    "python.yaml": "!!python/object/apply:os.system ['touch pwned']",
    "python name.yaml": "name: !!python/name:os.system",
    "tag.yaml": "!unknown {name: x}",
    "date.yaml": "name: 2001-01-01",
    "bad date.yaml": "name: 2001-99-99",
    "number key.yaml": "1: 2",
    "null key.yaml": "null: 2",
    "true key.yaml": "training: {yes: 2}",
    "list key.yaml": "? [1]\n: 2\n",
    "set.yaml": "!!set {a, b}",
    "merge.yaml": "<<: 7",
    "merge list.yaml": "<<: [1]",
    "alias.yaml": "name: *nobody",
    "binary.yaml": bytes(range(256)),
    "sexagesimal.yaml": "training: {steps: 1:30:00:00:00:00:00:00:00:00:00:00}",
    "huge.yaml": "name: " + "x" * 300_000,
    "integer.yaml": "training: {steps: " + "9" * 5000 + "}",
    "duplicate anchors.yaml": "a: &a 1\nb: &a 2\nc: *a\n",
    "percent.yaml": "%YAML 9.9\n---\nname: x\n",
}

EDITS: dict[str, Callable[[Path], Any]] = {
    "without its file": lambda folder: (folder / "run/config.json").unlink(),
    "that is a pipe": fifo("run/config.json"),
    "that is a folder": folder_in_place("run/config.json"),
    "cut short": cut("run/config.json", 0.7),
    "of a later format": edited("run/config.json", put("format_version", value=99)),
    "of fewer stages": edited("run/config.json", put("stages", "interior", value=[1.0])),
    "of a stage that is text": edited("run/config.json", put("stages", "interior", 0, value="1")),
    "without a kind": edited("run/config.json", drop("diffusion", "schedule", "kind")),
    "of a list for a mapping": edited("run/config.json", put("network", value=[])),
    "of a null section": edited("run/config.json", put("sampling", value=None)),
    "of data that are missing": edited("run/config.json", put("data", "source", value="absent.npz")),
    "of data with a zero byte": edited("run/config.json", put("data", "source", value="a\0b")),
    "of data called like nothing": edited("run/config.json", put("data", "source", value="~nobody/x")),
    "of a codec that is a file": edited("run/config.json", put("codec", "source", value="run/config.json")),
    "of features that are unknown": edited(
        "run/config.json", put("evaluation", value={"every": 1, "features": "pixel", "count": 2})
    ),
    "of a reference that is missing": edited(
        "run/config.json", put("evaluation", value={"every": 1, "reference": "absent.npz", "count": 2})
    ),
    "with a key of two lines": edited("run/config.json", put("training", "a\nb", value=1)),
}


@cases([Case(setting, (*BASE, *setting.split(" ")), needs=("data.npz",)) for setting in SETTINGS])
def test_settings(case: Case, refuses: Callable[[Case], str]) -> None:
    refuses(case)


@cases(
    [
        Case(
            name,
            ("train", "--config", name, "--data", "data.npz", "--out", "new", "--set", "training.steps=1"),
            file(name, text),
            needs=("data.npz",),
        )
        for name, text in TEXTS.items()
        if name not in ("empty.yaml", "null.json")
    ]
)
def test_files(case: Case, refuses: Callable[[Case], str]) -> None:
    refuses(case)


@cases(
    [
        Case(f"config {name}", ("train", "--config", "run/config.json", "--out", "new"), both(make), needs=("run",))
        for name, make in EDITS.items()
    ]
)
def test_edited(case: Case, refuses: Callable[[Case], str]) -> None:
    refuses(case)
