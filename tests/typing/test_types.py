"""mypy --strict and pyright agree with what check_api.py asserts of the public names."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHECKED = "tests/typing/check_api.py"


@pytest.mark.slow
def test_mypy_agrees(tmp_path: Path):
    command = [sys.executable, "-m", "mypy", "--strict", "--warn-unused-ignores", "--cache-dir", str(tmp_path), CHECKED]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    found = [line for line in ran.stdout.splitlines() if line.startswith(CHECKED) and ": error:" in line]
    assert "Success" in ran.stdout or (ran.stdout and not found), "\n".join(found) or ran.stdout + ran.stderr


@pytest.mark.slow
def test_pyright_agrees():
    pyright = shutil.which("pyright", path=str(Path(sys.executable).parent))
    if pyright is None or subprocess.run(["node", "--version"], capture_output=True, check=False).returncode:
        pytest.skip("pyright needs Node.js here, which it would download")
    ran = subprocess.run([pyright, CHECKED], cwd=ROOT, capture_output=True, text=True, check=False)
    errors = [line for line in ran.stdout.splitlines() if " - error:" in line]
    assert not errors, "\n".join(errors)
