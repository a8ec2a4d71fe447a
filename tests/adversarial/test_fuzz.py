"""The fuzzer finds nothing in a few cases; thousands are run by hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts/fuzz.py"


def test_thirty_cases() -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--cases", "30", "--workers", "1"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("0 found\n")
