"""The contracts on imports catch what they are for, and importing the package loads no library that does IO."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
IO_LIBRARIES = {"click", "confluent_kafka", "fastavro", "prometheus_client", "rich", "rocksdict"}


def layer_names() -> list[str]:
    """The modules that the contract names, from the top down."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = settings["tool"]["importlinter"]["contracts"][0]["layers"]
    return [name.strip(" ()") for layer in layers for name in layer.split("|")]


def lint(tree: Path, files: dict[str, str]) -> tuple[bool, str]:
    """Whether our contracts hold for a skeleton of the package with these files, and what the linter said."""
    for name in layer_names():
        package = tree / "streamflow" / name
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
    (tree / "streamflow/__init__.py").touch()
    for path, text in files.items():
        (tree / path).write_text(text)
    shutil.copy(ROOT / "pyproject.toml", tree)
    program = "from importlinter.cli import lint_imports_command as lint; lint(['--no-cache'])"
    ran = subprocess.run([sys.executable, "-c", program], cwd=tree, capture_output=True, text=True, check=False)
    return ran.returncode == 0, ran.stdout + ran.stderr


def test_the_skeleton_holds(tmp_path: Path) -> None:
    kept, said = lint(
        tmp_path,
        {
            "streamflow/cli/main.py": "import click\nfrom streamflow import serve, core\n",
            "streamflow/serve/__init__.py": "from streamflow import client, worker, log\n",
            "streamflow/workflow/app.py": "def serve():\n    from streamflow import serve\n",
            "streamflow/core/run.py": "import dataclasses, typing\nfrom streamflow import ids, errors\n",
            "streamflow/ids/__init__.py": "from streamflow import errors\n",
        },
    )
    assert kept, said
    assert "2 kept" in said


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        (
            "streamflow/core/run.py",
            "from streamflow.codec import avro",
            "core is not allowed to import streamflow.codec",
        ),
        ("streamflow/core/run.py", "def f():\n    import streamflow.worker", "not allowed to import streamflow.worker"),
        ("streamflow/store/rocks.py", "from streamflow import logs", "store is not allowed to import streamflow.logs"),
        ("streamflow/client/handle.py", "from streamflow import worker", "client is not allowed to import"),
        ("streamflow/workflow/step.py", "from streamflow import serve", "workflow is not allowed to import"),
        ("streamflow/workflow/app.py", "from streamflow import worker", "workflow is not allowed to import"),
        ("streamflow/errors/x.py", "from streamflow import ids", "errors is not allowed to import streamflow.ids"),
        ("streamflow/helpers.py", "", "helpers"),
        ("streamflow/core/run.py", "import time", "core is not allowed to import time"),
        ("streamflow/core/run.py", "def f():\n    from random import random", "core is not allowed to import random"),
        ("streamflow/ids/x.py", "import os.path", "ids is not allowed to import os"),
        ("streamflow/errors/x.py", "import fastavro.schema", "errors is not allowed to import fastavro"),
        ("streamflow/core/run.py", "import asyncio", "core is not allowed to import asyncio"),
    ],
)
def test_a_violation_is_caught(tmp_path: Path, path: str, text: str, expected: str) -> None:
    kept, said = lint(tmp_path, {path: text})
    assert not kept
    assert expected in " ".join(said.split())


@pytest.mark.parametrize("module", ["streamflow", "streamflow.core", "streamflow.ids", "streamflow.errors"])
def test_importing_loads_no_io_library(module: str) -> None:
    program = f"import sys, {module}; print(*sorted(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert IO_LIBRARIES.isdisjoint(ran.stdout.split())
