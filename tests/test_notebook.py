"""The notebook in examples/ is clean and runs from its first cell to its last."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import multistage_diffusion as msd

NOTEBOOK = Path(__file__).parents[1] / "examples" / "first_run.ipynb"


def test_no_outputs_are_kept() -> None:
    notebook = json.loads(NOTEBOOK.read_text())
    for cell in notebook["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat", reason="nbclient is not installed: pip install -e '.[docs]'")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: pip install -e '.[docs]'")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed: pip install -e '.[docs]'")
    monkeypatch.setenv("PYTHONPATH", str(Path(msd.__file__).parents[1]))
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:  # few steps: what they reach is not the test's matter
        cell.source = cell.source.replace('"training.steps": 300', '"training.steps": 20')
    nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    printed = "".join(output.get("text", "") for output in outputs)
    assert "edges in sigma: (0.69" in printed
    assert "stage of each row: [1, 1, 2, 2, 3]" in printed
    assert "Fréchet distance" in printed
    assert msd.Run.open(tmp_path / "runs" / "notebook" / "digits").checkpoint("latest").name.endswith("20")
