"""The wheel and the source archive hold what they must, and the wheel works where it is installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from multistage_diffusion import __version__

ROOT = Path(__file__).parents[1]
MODULES = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src").rglob("*.py")}
SHIPPED = {
    "multistage_diffusion/py.typed",
    "multistage_diffusion/evaluation/weights/fashion_classifier.safetensors",
}
NEEDED = {
    *("LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "mkdocs.yml", "pyproject.toml"),
    *(
        "docs/get-started.md",
        "docs/concepts.svg",
        "examples/first_run.ipynb",
        "scripts/docs_pages.py",
        "tests/conftest.py",
    ),
    *("benchmarks/common.py", "benchmarks/results/efficiency-16.json"),
}
JUNK = re.compile(
    r"(^|/)(\.git|\.venv|site|runs|build|dist|__pycache__|\.[a-z]+_cache|\.ipynb_checkpoints)(/|$)|\.py[co]$|~$"
)
OFFLINE = ("Could not find a version", "No matching distribution", "Connection", "Temporary failure", "Max retries")


@pytest.fixture(name="built", scope="module")
def fixture_built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the source archive and, from it, the wheel."""
    pytest.importorskip("build", reason="build is not installed: pip install -e '.[docs]'")
    out = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--outdir", str(out), str(ROOT)], capture_output=True, text=True, cwd=out
    )
    output = done.stdout + done.stderr
    if done.returncode and any(text in output for text in OFFLINE):
        pytest.skip("no package registry: hatchling, which builds, cannot be had")
    assert done.returncode == 0, output
    return out


@pytest.mark.slow
def test_the_source_archive_is_whole_and_holds_no_junk(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    assert {f"src/{module}" for module in MODULES} | {f"src/{name}" for name in SHIPPED} | NEEDED <= names
    assert [name for name in names if JUNK.search(name)] == []


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
        told = opened.read(f"multistage_diffusion-{__version__}.dist-info/METADATA").decode()
    assert {name for name in names if ".dist-info/" not in name} == MODULES | SHIPPED
    assert f"multistage_diffusion-{__version__}.dist-info/licenses/LICENSE" in names
    for extra in ("demo", "data", "eval", "hub", "track", "docs", "dev"):
        assert f"Provides-Extra: {extra}\n" in told


@pytest.mark.slow
def test_the_wheel_works_where_it_is_installed(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    scripts = tmp_path / "venv" / "bin"
    paths = {"base": str(tmp_path / "venv"), "platbase": str(tmp_path / "venv")}
    installed = Path(sysconfig.get_path("purelib", "venv", vars=paths))
    # the packages that it needs are those of this interpreter: nothing is downloaded
    (installed / "elsewhere.pth").write_text(sysconfig.get_path("purelib") + "\n")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | {"OMP_NUM_THREADS": "1"}

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(str(scripts / "python"), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel))
    found = run(str(scripts / "python"), "-c", "import multistage_diffusion; print(multistage_diffusion.__file__)")
    assert Path(found.strip()).is_relative_to(installed)
    assert run(str(scripts / "msdiff"), "--version") == f"msdiff {__version__}\n"
    run(
        str(scripts / "msdiff"),
        *["stages", "digits", "--algorithm", "timestep", "--stages", "3", "--out", "stages.json"],
    )
    assert (tmp_path / "stages.json").exists()
    assert (tmp_path / "stages.png").exists()
