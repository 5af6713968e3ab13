"""`MODULE:APP` finds the app, and says what is wrong when it does not."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from streamflow.cli.apps import load_app


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = set(sys.modules)
    (tmp_path / "shopfront.py").write_text("import streamflow as sf\napp = sf.App('shop')\nnumber = 5\n")
    (tmp_path / "emptyfront.py").write_text("x = 1\n")
    (tmp_path / "needy.py").write_text("import not_there_at_all\n")
    (tmp_path / "faulty.py").write_text("1 / 0\n")
    (tmp_path / "frontpkg/inner").mkdir(parents=True)
    (tmp_path / "frontpkg/__init__.py").write_text("")
    (tmp_path / "frontpkg/names.py").write_text("NAME = 'nested'\n")
    (tmp_path / "frontpkg/flows.py").write_text(
        "import streamflow as sf\nfrom .names import NAME\nclass Holder: app = sf.App(NAME)\n"
    )
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in {"shopfront", "emptyfront", "needy", "faulty", "frontpkg"}:
            del sys.modules[name]


@pytest.mark.parametrize("spec", ["shopfront:app", "shopfront.py:app", "./shopfront.py:app"])
def test_a_module_or_a_file(spec: str) -> None:
    assert load_app(spec).name == "shop"


@pytest.mark.parametrize("spec", ["frontpkg.flows:Holder.app", "frontpkg/flows.py:Holder.app"])
def test_a_module_of_a_package_keeps_its_relative_imports(spec: str) -> None:
    assert load_app(spec).name == "nested"


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("shopfront", "write MODULE:APP"),
        ("shopfront:", "write MODULE:APP"),
        (":app", "write MODULE:APP"),
        ("nowhere:app", "no module 'nowhere'"),
        ("shopfront.inner:app", "no module 'shopfront.inner'"),
        ("shopfront:appp", "shopfront has no 'appp'. Did you mean shopfront:app?"),
        ("shopfront:number", "is not an App but of type int. Did you mean shopfront:app?"),
        ("emptyfront:app", "It holds no App: make one with app = streamflow.App"),
        ("nowhere.py:app", "no file 'nowhere.py'"),
        ("frontpkg/:app", "no file"),
        ("..x:app", "is not a module's name"),
    ],
)
def test_what_is_not_there_is_a_usage_error(spec: str, said: str) -> None:
    with pytest.raises(click.UsageError) as caught:
        load_app(spec)
    assert said in caught.value.message


def test_a_file_that_another_module_hides(folder: Path) -> None:
    (folder / "json.py").write_text("app = 1\n")
    with pytest.raises(click.UsageError, match="hidden by another module 'json'"):
        load_app("json.py:app")


def test_what_the_module_raises_keeps_its_traceback() -> None:
    with pytest.raises(ModuleNotFoundError, match="not_there_at_all"):
        load_app("needy:app")
    with pytest.raises(ZeroDivisionError):
        load_app("faulty:app")
