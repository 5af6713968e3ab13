"""Every file and every name in code that README.md gives exists, in the file where it says that it is."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import Final

import pytest

from streamflow.sim.lane import FATES

HERE: Final = Path(__file__).parent
ROOT: Final = HERE.parent.parent
PLACES: Final = (HERE, ROOT, ROOT / "streamflow", ROOT / "streamflow" / "logs", ROOT / "streamflow" / "sim")
"""Where files may be that are named without their folder."""
CODE: Final = re.compile(r"`([^`\n]+)`")
FILE: Final = re.compile(r"[\w./]+(\.py|\.md|/)")
NAME: Final = re.compile(r"[A-Za-z_]\w*(\.\w+)*")
OTHERS: Final = frozenset({"eager=False", "enable.gapless.guarantee", "a'"})
"""In code, and no names of ours: a call's argument, a setting of librdkafka, an owner in a trace."""


def file_of(name: str) -> Path | None:
    """The file or folder that is meant."""
    return next((place / name for place in PLACES if (place / name).exists()), None)


@cache
def defined(path: Path) -> frozenset[str]:
    """What a module defines: classes, functions, constants, and Class.member for methods, fields and attributes."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        found |= _names(node)
        if isinstance(node, ast.ClassDef):
            members = {name for each in node.body for name in _names(each)} | {
                each.attr
                for each in ast.walk(node)
                if isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Store)
            }
            found |= members | {f"{node.name}.{member}" for member in members}
    return frozenset(found)


def _names(node: ast.stmt) -> set[str]:
    match node:
        case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
            return {name}
        case ast.AnnAssign(target=ast.Name(id=name)):
            return {name}
        case ast.Assign(targets=targets):
            return {each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)}
    return set()


@cache
def everything() -> frozenset[str]:
    """What any module of the product or of the model defines."""
    modules = [*sorted((ROOT / "streamflow").rglob("*.py")), *sorted(HERE.glob("*.py"))]
    return frozenset().union(*map(defined, modules))


def missing(text: str) -> list[str]:
    """What the text names and nobody has. A name behind a file, up to the end of the cell or sentence, is in it."""
    found = []
    for part in re.split(r"\||\. |: |; |\n\n|\n- ", text):
        file: Path | None = None
        for token in CODE.findall(part):
            if token in OTHERS:
                continue
            if FILE.fullmatch(token):
                file = file_of(token)
                if file is None:
                    found.append(token)
            elif NAME.fullmatch(token):
                known = defined(file) if file is not None and file.suffix == ".py" else everything()
                if token not in known:
                    found.append(f"{token} in {file.name}" if file is not None else token)
            else:
                found.append(token)
    return found


def test_all_that_the_readme_names_is_there() -> None:
    text = re.sub(r"```.*?```", "", (HERE / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(CODE.findall(text)) > 50
    assert missing(text) == []
    fates = set(re.findall(r'fate "(\w+)"', text))
    assert fates == set(FATES) - {"unplaced", "fatal"}, "these two are about the answer, which the model may lose"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("`kafka_writing.py`, `_send`", ["kafka_writing.py"]),
        ("`worker/restore.py`, `Restorer.run`, and `Restorer.ran`", ["Restorer.ran in restore.py"]),
        ("`worker/restore.py`, `ReadingRule`", ["ReadingRule in restore.py"]),
        ("`worker/restore.py` | `ReadingRule.accepts`, `Nobody`", ["Nobody"]),
        ("`core/reading.py`, `SEQ_AFTER_GAP`, `ReadingRule.gap`; `PartitionRow`", []),
        ("`a + b`", ["a + b"]),
    ],
)
def test_a_name_that_is_not_there_is_found(text: str, found: list[str]) -> None:
    assert missing(text) == found
