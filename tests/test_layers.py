"""The house keeps its layers: imports point down, optional packages load late, and nothing is unpickled."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

import multistage_diffusion

PACKAGE = "multistage_diffusion"
SOURCE = Path(multistage_diffusion.__file__).parent

# Lowest first. A unit (a module or a whole sub-package) imports itself and units of earlier rows; units of one row are
# strangers. A module that is named here has a row of its own, whatever the row of its sub-package. A new file must be
# placed here.
LAYERS: tuple[tuple[str, ...], ...] = (
    # L0: what everything uses
    ("errors", "escaping", "progress", "version"),
    ("memory", "output_paths", "reading", "registry", "stale_files"),
    ("archives", "files"),
    ("contracts", "distributed"),
    ("rng", "schedules"),
    ("conventions", "stages"),
    ("config",),
    ("data", "records", "shares"),
    # L1: finding stages, networks, pictures
    ("nets", "optimal", "preconditioning", "palette", "reporting.captions", "trackers"),
    ("reporting.pictures",),
    ("performance", "reporting.html", "reporting.samples", "stage_finding"),
    # L2: from networks to images
    ("denoisers", "latent", "samplers"),
    # L3: training and judging, which do not know each other
    ("evaluation", "interop", "training"),
    # L4: what a user calls
    ("latent.codec_training", "planning", "reporting"),
    ("console", "workflow"),
    ("commands",),
    ("parsing",),
    ("cli",),
    ("__main__",),
)
RANK = {unit: rank for rank, row in enumerate(LAYERS) for unit in row}
FORBIDDEN = {"nets": {"schedules", "stages"}}  # networks are given stage indices and embeddings' inputs
EXTRAS = (
    "sklearn",
    "tensorboard",
    "torch.utils.tensorboard",
    "torch_fidelity",
    "diffusers",
    "datasets",
    "huggingface_hub",
    "trackio",
    "wandb",
)
PICKLES = (
    "pickle",
    "_pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
    "torch.load",
    "torch.save",
)
READ_ONLY = "interop/hub/"  # its text is written into exports, which run where the extra is; nothing imports it
MAY_UNPICKLE = "interop/published.py"  # other people's checkpoints, through a restricted reader


@dataclass(frozen=True)
class Import:
    """One imported name in full, e.g. multistage_diffusion.schedules.VP."""

    name: str
    line: int
    late: bool  # inside a function, or for type checkers only


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports(node: ast.AST, package: list[str], late: bool = False) -> Iterator[Import]:
    """Yield every import below node; `package` is what a single leading dot stands for."""
    if isinstance(node, ast.Import):
        yield from (Import(alias.name, node.lineno, late) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = package[: len(package) - node.level + 1] if node.level else []
        stem = [*base, *([node.module] if node.module else [])]
        yield from (Import(".".join([*stem, alias.name]), node.lineno, late) for alias in node.names)
    late = late or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or is_type_checking(node)
    for child in ast.iter_child_nodes(node):
        yield from imports(child, package, late)


def within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == p or name.startswith(p + ".") for p in packages)


def unit_of(parts: Sequence[str]) -> str:
    """Return the unit that a module (its path below the package) is in; "" if it has no layer."""
    names = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((name for name in names if name in RANK), "")


def layer_fault(unit: str, found: Import) -> str | None:
    """Say what is wrong with `unit` importing what was found, if anything."""
    target, parts = found.name, found.name.split(".")
    if parts[0] != PACKAGE:
        return None
    other = unit_of(parts[1:])
    if not other:
        return f"imports {target}, which is no module with a layer"
    if other in FORBIDDEN.get(unit, ()):
        return f"{unit} must not know {other}"
    if other != unit and RANK[other] >= RANK[unit]:
        return f"{unit} imports {other}, which is not below it"
    return None


def call_faults(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield calls that unpickle: torch.load without weights_only=True, numpy's load with allow_pickle."""
    alias = {a.asname or a.name: a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        owner = ast.unparse(node.func.value)
        name = f"{alias.get(owner, owner)}.{node.func.attr}"
        given = {k.arg: k.value for k in node.keywords}
        flag = {"torch.load": "weights_only", "numpy.load": "allow_pickle"}.get(name)
        value = given.get(flag) if flag else None
        constant = value.value if isinstance(value, ast.Constant) else None
        if name == "torch.load" and constant is not True:
            yield node.lineno, "torch.load needs weights_only=True"
        if name == "numpy.load" and value is not None and constant is not False:
            yield node.lineno, "numpy.load must not allow pickle"
        if name == "torch.save":
            yield node.lineno, "torch.save writes pickles; use safetensors"


def file_faults(relative: str, source: str) -> Iterator[str]:
    """Yield the faults of one file, as lines FILE:LINE: fault."""
    parts = relative.removesuffix(".py").split("/")
    tree = ast.parse(source)
    unit = unit_of(parts)
    top = relative == "__init__.py"  # the public face may import anything
    if not top and not unit:
        yield f"{relative}:1: has no layer; give {parts[0]!r} a row in LAYERS"
        return
    for found in imports(tree, [PACKAGE, *parts[:-1]]):
        fault = None if top else layer_fault(unit, found)
        if fault:
            yield f"{relative}:{found.line}: {fault}"
        if within(found.name, EXTRAS) and not found.late and not relative.startswith(READ_ONLY):
            yield f"{relative}:{found.line}: {found.name} is optional; import it where it is used"
        if within(found.name, PICKLES) and relative != MAY_UNPICKLE:
            yield f"{relative}:{found.line}: {found.name} pickles"
    if relative != MAY_UNPICKLE:
        yield from (f"{relative}:{line}: {fault}" for line, fault in call_faults(tree))


def faults(root: Path) -> list[str]:
    files = sorted(root.rglob("*.py"))
    return [
        fault for f in files for fault in file_faults(f.relative_to(root).as_posix(), f.read_text(encoding="utf-8"))
    ]


def test_the_package_keeps_its_layers() -> None:
    assert len(list(SOURCE.rglob("*.py"))) > 5
    assert faults(SOURCE) == []


def circles(root: Path) -> list[list[str]]:
    """Return the groups of modules that import one another when they are loaded; late imports make no circle."""
    modules = {
        ".".join(f.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): f for f in root.rglob("*.py")
    }
    edges: dict[str, set[str]] = {}
    for name, file in modules.items():
        package = [PACKAGE, *file.relative_to(root).parts[:-1]]
        found = (i.name.split(".") for i in imports(ast.parse(file.read_text()), package) if not i.late)
        names = (
            next((n for e in range(len(p), 1, -1) if (n := ".".join(p[1:e])) in modules), None)
            for p in found
            if p[0] == PACKAGE
        )
        edges[name] = {n for n in names if n is not None and n != name}
    reached = {name: _reach(name, edges) for name in edges}
    groups = {frozenset(m for m in edges if m in reached[n] and n in reached[m]) for n in edges if n in reached[n]}
    return sorted(sorted(group) for group in groups)


def _reach(start: str, edges: dict[str, set[str]]) -> set[str]:
    """Return the modules that importing one loads."""
    seen, waiting = set[str](), [start]
    while waiting:
        new = edges[waiting.pop()] - seen
        seen |= new
        waiting += new
    return seen


def test_no_modules_import_one_another() -> None:
    assert circles(SOURCE) == []


def test_a_circle_is_found(tmp_path: Path) -> None:
    plant(tmp_path, "data/a.py", "from .b import x\n")
    (tmp_path / "data/b.py").write_text("from ..data import a\n")
    (tmp_path / "data/c.py").write_text("def f():\n    from . import d\n")
    (tmp_path / "data/d.py").write_text("from . import c\n")
    assert circles(tmp_path) == [["data.a", "data.b"]]


MODULES_OF_THE_TRAINER = 45  # modules of this package that importing the trainer loads


@pytest.mark.slow
def test_the_trainer_loads_few_modules() -> None:
    count = f"import sys, {PACKAGE}.training.trainer; print(*(m for m in sys.modules if m.startswith('{PACKAGE}.')))"
    loaded = subprocess.run([sys.executable, "-c", count], capture_output=True, text=True, check=True).stdout.split()
    found = [name for name in loaded if _defines(SOURCE / name.removeprefix(f"{PACKAGE}.").replace(".", "/"))]
    assert len(found) <= MODULES_OF_THE_TRAINER, found
    assert f"{PACKAGE}.training.run" not in found  # what opens data, and other runs


def _defines(path: Path) -> bool:
    """Return whether a module holds code of its own: a package's __init__ that only imports does not."""
    init = path / "__init__.py"
    passive = (ast.Import, ast.ImportFrom, ast.Expr, ast.Assign)
    return not init.exists() or not all(isinstance(node, passive) for node in ast.parse(init.read_text()).body)


def test_every_unit_has_one_row() -> None:
    units = [unit for row in LAYERS for unit in row]
    assert len(units) == len(set(units))


def plant(root: Path, relative: str, source: str) -> list[str]:
    """Write a small house that is in order, add one file and return the faults."""
    house = {
        "__init__.py": "from .cli import main\n",
        "schedules.py": "import math\nfrom .contracts import as_float64\n",
        "config/run.py": "from .schedules import VP\nfrom .stages import Stages\n",
        "nets/unet.py": "from . import blocks\nfrom .blocks import Block\nfrom ..config import NetworkConfig\n",
        "training/__init__.py": "from .trainer import Trainer\n",
        "training/trainer.py": "from .. import rng\nfrom ..nets.unet import UNet\nimport multistage_diffusion.data\n",
        "data/digits.py": "def load():\n    from sklearn.datasets import load_digits\n",
        "interop/published.py": "import pickle\nimport torch\ntorch.load('x', weights_only=False)\n",
    }
    for name, text in {**house, relative: source}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return faults(root)


def test_a_house_in_order_has_no_faults(tmp_path: Path) -> None:
    assert plant(tmp_path, "cli.py", "from .training import Trainer\nfrom .config import RunConfig\n") == []


@pytest.mark.parametrize(
    ("relative", "source", "fault"),
    [
        ("stages.py", "from .config import RunConfig\n", "stages imports config, which is not below it"),
        ("rng.py", "from .schedules import VP\n", "rng imports schedules, which is not below it"),
        ("contracts.py", "def f():\n    from .rng import fold\n", "contracts.py:2: contracts imports rng"),
        ("nets/ldm.py", "from ..schedules import VP\n", "nets must not know schedules"),
        ("nets/ldm.py", "from .. import stages\n", "nets must not know stages"),
        ("training/loop.py", "from ..evaluation.metrics import frechet\n", "training imports evaluation"),
        ("evaluation/tables.py", "import multistage_diffusion.training.ema\n", "evaluation imports training"),
        ("evaluation/__init__.py", "from .. import training\n", "evaluation imports training"),
        ("samplers.py", "from multistage_diffusion.denoisers import D\n", "samplers imports denoisers"),
        (
            "cli.py",
            "from . import train\n",
            "multistage_diffusion.train, which is no module with a layer",
        ),
        ("reporting/report.py", "import multistage_diffusion\n", "no module with a layer"),
        ("helpers.py", "import math\n", "helpers.py:1: has no layer"),
        ("tools/x.py", "import math\n", "tools/x.py:1: has no layer"),
        ("cli.py", "import sklearn\n", "sklearn is optional"),
        (
            "cli.py",
            "try:\n    from torch.utils import tensorboard\nexcept ImportError:\n    pass\n",
            "cli.py:2: torch.utils",
        ),
        ("cli.py", "from torch.utils.tensorboard import SummaryWriter\n", "is optional"),
        ("cli.py", "class A:\n    import datasets\n", "datasets is optional"),
        ("__init__.py", "import diffusers\n", "__init__.py:1: diffusers is optional"),
        ("interop/published.py", "from huggingface_hub import hf_hub_download\n", "is optional"),
        ("cli.py", "import pickle as p\n", "pickle pickles"),
        ("cli.py", "def f():\n    from pickle import loads\n", "pickle.loads pickles"),
        ("cli.py", "from torch import load\n", "torch.load pickles"),
        ("cli.py", "import torch\ntorch.load('x')\n", "cli.py:2: torch.load needs weights_only=True"),
        ("cli.py", "import torch as t\nt.load('x', weights_only=False)\n", "torch.load needs"),
        ("cli.py", "import torch\ntorch.load('x', weights_only=safe)\n", "torch.load needs"),
        ("cli.py", "import torch\ntorch.save({}, 'x')\n", "torch.save writes"),
        ("cli.py", "import numpy as np\nnp.load('x', allow_pickle=True)\n", "numpy.load must not"),
    ],
)
def test_a_planted_fault_is_found(relative: str, source: str, fault: str, tmp_path: Path) -> None:
    found = plant(tmp_path, relative, source)
    assert len(found) == 1, found
    assert fault in found[0]


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load('x', weights_only=True)\n",
        "import numpy as np\nnp.load('x', allow_pickle=False)\nnp.load('y')\n",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import datasets\n",
        "from .data import datasets\n",
        "def f():\n    import diffusers\n",
        "from .version import __version__\n",
    ],
)
def test_what_is_allowed_is_not_a_fault(source: str, tmp_path: Path) -> None:
    assert plant(tmp_path, "cli.py", source) == []
