"""Finding the app that `MODULE:APP` or `FILE.py:APP` names, with an error for each way in which it may be missing."""

from __future__ import annotations

import os
import sys
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

import click

if TYPE_CHECKING:
    from streamflow import App

_HOW: Final = "write MODULE:APP or FILE.py:APP, as in shop:app"


def load_app(spec: str) -> App:
    """The app, its module imported with the current folder on the path. What the module itself raises comes through."""
    from streamflow import App

    place, colon, path = spec.rpartition(":")
    if not colon or not place or not path:
        raise _usage_error(f"{spec!r} does not name an app: {_HOW}")
    module = _import_file(place) if place.endswith(".py") or os.sep in place else _import(place)
    found: Any = module
    for name in path.split("."):
        try:
            found = getattr(found, name)
        except AttributeError:
            raise _usage_error(f"{place} has no {path!r}.{_apps_of(module, App, path)}") from None
    if not isinstance(found, App):
        kind = type(found).__name__
        raise _usage_error(f"{spec} is not an App but of type {kind}.{_apps_of(module, App, path)}")
    return found


def _import(name: str) -> ModuleType:
    if not all(part.isidentifier() for part in name.split(".")):
        raise _usage_error(f"{name!r} is not a module's name: {_HOW}")
    _search(Path.cwd())
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        # A module that the app's own imports lack is the app's bug, and keeps its traceback.
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise
        where = f"looked in {Path.cwd()} and where Python looks"
        raise _usage_error(f"no module {error.name!r} ({where}): {_HOW}") from None


def _import_file(place: str) -> ModuleType:
    file = Path(place).resolve()
    if not file.is_file():
        raise _usage_error(f"no file {place!r} in {Path.cwd()}: {_HOW}")
    if not file.suffix == ".py":
        raise _usage_error(f"{place!r} is not a Python file: {_HOW}")
    # As the module that it is inside its packages, so that its relative imports work.
    root, names = file.parent, [file.stem]
    while (root / "__init__.py").is_file():
        names.insert(0, root.name)
        root = root.parent
    _search(root)
    module = import_module(".".join(names))
    loaded = getattr(module, "__file__", None)
    if loaded is None or Path(loaded).resolve() != file:
        raise _usage_error(f"{place!r} is hidden by another module {module.__name__!r} ({loaded}): rename the file")
    return module


def _usage_error(text: str) -> click.UsageError:
    return click.UsageError(text, click.get_current_context(silent=True))


def _search(folder: Path) -> None:
    """Look there first, as `python -m` does."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _apps_of(module: ModuleType, kind: type, wanted: str) -> str:
    """What to write instead."""
    names = [name for name, value in vars(module).items() if isinstance(value, kind) and not name.startswith("_")]
    if not names:
        return f' It holds no App: make one with app = streamflow.App("{wanted.lower()}").'
    close = get_close_matches(wanted, names, n=1, cutoff=0.5) or names
    return f" Did you mean {module.__name__}:{f' or {module.__name__}:'.join(close)}?"
