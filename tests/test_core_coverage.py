"""The check of core coverage fails when it must: on small trees with one thing missing each."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

CORE = '''"""Decides."""

from typing import assert_never


def decide(kind: int | str, *, loud: bool) -> str:
    """Return a word."""
    match kind:
        case int():
            word = "int"
        case str():
            word = "str"
        case _:
            assert_never(kind)
    if loud:
        word += "!"
    return word
'''
TESTS = """from streamflow.core.a.decider import decide


def test_all():
    assert decide(1, loud=True) == "int!"
"""
ONE_MORE = TESTS + '    assert decide("", loud=False) == "str"\n'


def run(tree: Path, *, core: str = CORE, tests: str | None = ONE_MORE, package: str = "") -> tuple[int, str]:
    """Lay out a tree with one core file, run the check on it, and return its exit status and what it said."""
    core_file, test_file = tree / "streamflow/core/a/decider.py", tree / "tests/core/a/test_decider.py"
    core_file.parent.mkdir(parents=True)
    core_file.write_text(core)
    for folder in (tree / "streamflow", tree / "streamflow/core", tree / "streamflow/core/a"):
        (folder / "__init__.py").write_text(package or '"""A package."""\n')
    test_file.parent.mkdir(parents=True)
    if tests is not None:
        test_file.write_text(tests)
    shutil.copy(ROOT / "pyproject.toml", tree)
    command = [sys.executable, str(ROOT / "tests/core_coverage.py"), str(tree)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    return ran.returncode, ran.stdout + ran.stderr


def test_a_covered_core_passes(tmp_path: Path) -> None:
    status, said = run(tmp_path)
    assert (status, "all 3 files at 100 %" in said) == (0, True), said


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ({"tests": TESTS}, "streamflow/core/a/decider.py: not run by tests/core/a/test_decider.py: 11, 12, 15 -> 17"),
        ({"tests": None}, "has no test file of its own; write tests/core/a/test_decider.py"),
        ({"tests": "def test_all(): assert True"}, "never imports it"),
        ({"tests": ONE_MORE + "    assert False"}, "tests/core/a/test_decider.py failed"),
        ({"package": "def f():\n    return 1\n"}, "streamflow/core/__init__.py: holds code"),
    ],
    ids=["a branch", "the test file", "the import", "the tests fail", "code in a package"],
)
def test_it_fails_without(tmp_path: Path, layout: dict[str, str | None], expected: str) -> None:
    status, said = run(tmp_path, **layout)  # type: ignore[arg-type]  # the parameters are named by the table
    assert status == 1
    assert expected in said
